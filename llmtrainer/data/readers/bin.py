"""Raw token ids (`.bin`), and Megatron-LM's pairs of `.bin` and `.idx`."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, BinaryIO, ClassVar, Literal

import numpy as np
from numpy.typing import NDArray

from llmtrainer.base.errors import UserError
from llmtrainer.data import megatron
from llmtrainer.data.document import AnyPath, Reader, Reading
from llmtrainer.data.tokens import Ids

_BLOCK = 2**20
_MOST_HIGH_PART = 16
"""Four-byte ids of any vocabulary below a million have no more in their upper two bytes."""


class Bin(Reader):
    """A `.bin` beside an `.idx` of the same name, either of them packed or not, is Megatron-LM's: each of its
    documents is one. Any other is ids end to end, two bytes each, or four with `raw_ids=uint32`."""

    suffixes: ClassVar[tuple[str, ...]] = (".bin", ".idx")
    holds: ClassVar[Literal["text", "tokens"]] = "tokens"

    def records(self, stream: BinaryIO, path: AnyPath, reading: Reading) -> Iterator[tuple[Any, int | None]]:
        if megatron.parts(path.name)[1].lower() == ".idx":    # a file of the corpus, and no document
            return
        index = megatron.partner(path)
        if index is not None:
            for ids in megatron.documents(stream, path, index):
                yield Ids(ids, rule="documents are as the .idx says"), None
            return
        dtype = np.dtype("<u2" if reading.raw_ids == "uint16" else "<u4")
        first = True
        while block := stream.read(_BLOCK):
            if len(block) % dtype.itemsize:
                reading.broken_off(
                    "the file breaks off inside a token id", str(path), f"an id takes {dtype.itemsize} bytes"
                )
                block = block[: len(block) - len(block) % dtype.itemsize]
            ids = np.frombuffer(block, dtype)
            if first and dtype.itemsize == 2:
                _require_two_bytes(ids, path)
            first = False
            yield Ids(ids, "stream"), None


def _require_two_bytes(ids: NDArray[Any], path: AnyPath) -> None:
    upper = ids[1::2]
    if len(upper) >= 32 and len(ids) % 2 == 0 and int(upper.max()) <= _MOST_HIGH_PART:
        raise UserError(
            "the file seems to hold ids of four bytes", where=str(path),
            why=f"read as two bytes, every second id is at most {int(upper.max())}",
            fix="llmtrainer prepare FILE OUT tokenizer=FOLDER raw_ids=uint32 (in a recipe data.train.raw_ids=uint32)",
        )
