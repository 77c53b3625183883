"""Python's own pickles (`.pkl`): plain containers, numbers, texts and arrays; more only where a person allows it."""

from __future__ import annotations

import pickle
from collections.abc import Iterator
from typing import Any, BinaryIO, ClassVar, Literal

from llmtrainer.base.errors import UserError
from llmtrainer.data.document import AnyPath, Reader, Reading
from llmtrainer.data.values import joined, records_in

HARMLESS = {
    "builtins": {"set", "frozenset", "bytearray", "complex", "list", "dict", "tuple", "int", "float", "str", "bytes"},
    "collections": {"OrderedDict", "deque"},
    "numpy": {"ndarray", "dtype"},
    "numpy.core.multiarray": {"_reconstruct", "scalar"},
    "numpy._core.multiarray": {"_reconstruct", "scalar"},
    "numpy.core.numeric": {"_frombuffer"},
    "numpy._core.numeric": {"_frombuffer"},
    "_codecs": {"encode"},
}
"""What a pickle may name by module. A pickle is a program: everything else that it could name, it could also call."""


class Pkl(Reader):
    """Lists and mappings of texts, records and arrays of ids. Loaded whole. What several dumps wrote into one file is
    one list."""

    suffixes: ClassVar[tuple[str, ...]] = (".pkl", ".pickle")
    seeks: ClassVar[bool] = True
    holds: ClassVar[Literal["text", "tokens"]] = "tokens"

    def records(self, stream: BinaryIO, path: AnyPath, reading: Reading) -> Iterator[tuple[Any, int | None]]:
        values: list[Any] = []
        try:
            while not values or _goes_on(stream):
                unpickler = pickle.Unpickler(stream) if reading.allow_pickle else _Plain(stream, path)
                values.append(unpickler.load())
        except UserError:
            raise
        except Exception as error:    # what a damaged or a foreign pickle raises may be anything
            raise UserError(
                "the pickle cannot be read", where=str(path), why=f"{type(error).__name__}: {error}",
                fix="fetch the file again, or save its texts as .jsonl",
            ) from error
        return records_in(values[0] if len(values) == 1 else joined(values), path, reading)


def _goes_on(stream: BinaryIO) -> bool:
    place = stream.tell()
    more = bool(stream.read(1))
    stream.seek(place)
    return more


class _Plain(pickle.Unpickler):
    """Reads a pickle that names nothing but what is harmless."""

    def __init__(self, stream: BinaryIO, path: AnyPath) -> None:
        super().__init__(stream)
        self._path = path

    def find_class(self, module: str, name: str) -> Any:
        if name in HARMLESS.get(module, ()):
            return super().find_class(module, name)
        raise UserError(
            f"the pickle wants to run `{module}.{name}`", where=str(self._path),
            why="a pickle is a program; plain containers, numbers, texts and arrays need nothing but themselves",
            fix="save the texts as .jsonl, or, only if you trust whoever made the file, prepare it with "
            "allow_pickle=true (in a recipe data.allow_pickle=true)",
        )
