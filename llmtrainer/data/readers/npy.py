"""Token ids (or texts) in one array: `.npy`."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any, BinaryIO, ClassVar, Literal

import numpy as np

from llmtrainer.base.errors import UserError
from llmtrainer.data.document import AnyPath, Reader, Reading, require_end
from llmtrainer.data.tokens import columns_of

_BLOCK = 2**20
"""Bytes read at a time."""


class Npy(Reader):
    """One dimension: ids end to end. Two: each row is a document. An array of Python objects is refused."""

    suffixes: ClassVar[tuple[str, ...]] = (".npy",)
    holds: ClassVar[Literal["text", "tokens"]] = "tokens"

    def records(self, stream: BinaryIO, path: AnyPath, reading: Reading) -> Iterator[tuple[Any, int | None]]:
        shape, by_column, dtype = _header(stream, path)
        if dtype.kind not in "iuU" or len(shape) not in (1, 2) or (dtype.kind == "U" and len(shape) != 1):
            raise UserError(
                f"an array of type {dtype} with {len(shape)} dimensions holds no documents", where=str(path),
                why="ids are whole numbers in one dimension (end to end) or two (a document a row)"
                + ("; objects would be code to run" if dtype.hasobject else ""),
                fix="numpy.save(FILE, numpy.concatenate(documents).astype('uint16')), an end id behind each document",
            )
        if by_column and len(shape) == 2:
            raise UserError(
                "the array lies column by column in its file", where=str(path),
                why="its rows could only be read by loading all of it",
                fix="numpy.save(FILE, numpy.ascontiguousarray(array))",
            )
        width = dtype.itemsize * math.prod(shape[1:])
        rows = max(_BLOCK // max(width, 1), 1)
        for first in range(0, shape[0], rows):
            count = min(rows, shape[0] - first)
            content = stream.read(count * width)
            if len(content) < count * width:
                why = f"its header promises {shape[0]:,} rows"
                reading.broken_off("the array breaks off", f"{path}, row {first + 1:,} and following", why)
                count = len(content) // max(width, 1)
            block = np.frombuffer(content[: count * width], dtype).reshape(count, *shape[1:])
            if dtype.kind == "U":
                yield from ((str(text), None) for text in block)
            else:
                yield from ((ids, None) for ids in columns_of(block, alone=True))
        require_end(stream, path, "the array", "one array a file: numpy.save(FILE, numpy.concatenate(arrays))")


def _header(stream: BinaryIO, path: AnyPath) -> tuple[tuple[int, ...], bool, np.dtype[Any]]:
    """(shape, whether column by column, type) of the array whose content follows."""
    try:
        version = np.lib.format.read_magic(stream)
        read = np.lib.format.read_array_header_1_0 if version == (1, 0) else np.lib.format.read_array_header_2_0
        shape, by_column, dtype = read(stream)
    except ValueError as error:
        raise UserError(
            "the array cannot be read", where=str(path), why=str(error).splitlines()[0],
            fix="fetch the file again; is it really a .npy?",
        ) from error
    return shape, bool(by_column), dtype


