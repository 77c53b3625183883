"""A file that is one document: prose, markup or source code."""

from __future__ import annotations

from collections.abc import Iterator
from typing import BinaryIO, ClassVar

from llmtrainer.data.document import AnyPath, Reader, Reading, text_in


class Text(Reader):
    """The whole file is the document, byte for byte but for a byte order mark."""

    suffixes: ClassVar[tuple[str, ...]] = (
        ".txt", ".md", ".rst", ".tex", ".html", ".xml", ".css", ".yaml", ".yml", ".toml", ".ini",
        ".py", ".pyi", ".pyx", ".c", ".h", ".cc", ".cpp", ".cxx", ".hpp", ".cu", ".cuh", ".rs", ".go", ".java",
        ".kt", ".scala", ".js", ".mjs", ".jsx", ".ts", ".tsx", ".rb", ".php", ".pl", ".lua", ".r", ".jl", ".m",
        ".swift", ".cs", ".hs", ".ml", ".ex", ".erl", ".clj", ".lisp", ".el", ".vim", ".sh", ".bash", ".sql",
        ".cmake", ".asm", ".s", ".f90", ".zig", ".dart",
    )

    def records(self, stream: BinaryIO, path: AnyPath, reading: Reading) -> Iterator[tuple[str, int | None]]:
        yield text_in(stream.read(), reading, path).removeprefix("\ufeff"), 1
