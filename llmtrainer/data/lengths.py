"""How long each sequence of some data is: of a token store, or of records that only say so."""

from __future__ import annotations

import re
from collections.abc import Iterator

import numpy as np
from numpy.typing import NDArray

from llmtrainer.base.errors import UserError
from llmtrainer.data import compression
from llmtrainer.data.document import Reading, SourceFile
from llmtrainer.data.open import reader_of
from llmtrainer.data.packed import Store

LENGTH = "length"
"""The field of a record that says how many tokens a sequence has."""
_BLOCK = 2**20
_LINES = re.compile(rb'(?:\{"length": ?[0-9]{1,9}\}\r?\n)*+')
_AROUND = b'{}"length: \r'


def lengths_in_store(store: Store) -> NDArray[np.int64]:
    """Tokens of each document: [D]."""
    starts = range(0, store.documents, _BLOCK)
    blocks = [np.diff(store.offsets[start : start + _BLOCK + 1]) for start in starts]
    return np.concatenate(blocks).astype(np.int64) if blocks else np.zeros(0, dtype=np.int64)


def hold_lengths(files: list[SourceFile]) -> bool:
    """Whether these are files of lengths, by their first record: `{"length": 12}`."""
    first = next((record for file in files for record, _ in _records(file)), None)
    return isinstance(first, dict) and LENGTH in first and len(first) <= 2


def lengths_in_records(files: list[SourceFile]) -> NDArray[np.int64]:
    """The field `length` of every record. Raises UserError for one that has none, or no positive number."""
    found = []
    for file in files:
        plain = _plain_lengths(file)
        found.append(np.fromiter(_lengths(file), dtype=np.int64) if plain is None else plain)
    return np.concatenate([np.zeros(0, dtype=np.int64), *found])


def _plain_lengths(file: SourceFile) -> NDArray[np.int64] | None:
    """The lengths of a file of which every line is `{"length": 12}` and nothing else, a block at a time: a million
    of them are read in a moment. None for any other file, which is read record by record."""
    if not {".jsonl", ".ndjson"} & set(file.path.suffixes[-2:]):
        return None
    found, begun = [], b""
    with compression.opened(file.path, seeks=False) as stream:
        while read := stream.read(_BLOCK):
            whole, newline, begun = (begun + read).rpartition(b"\n")
            if len(begun) > _BLOCK or not _LINES.fullmatch(whole + newline):
                return None
            found.append(np.array([int(word) for word in whole.translate(None, _AROUND).split()], dtype=np.int64))
    lengths = np.concatenate([np.zeros(0, dtype=np.int64), *found])
    return lengths if not begun and (lengths > 0).all() else None


def _lengths(file: SourceFile) -> Iterator[int]:
    for number, (record, line) in enumerate(_records(file), 1):
        length = record.get(LENGTH) if isinstance(record, dict) else None
        if type(length) is not int or not 0 < length < 2**31:
            raise UserError(
                f"a record has no `{LENGTH}` that is a number of tokens",
                where=f"{file.path}, " + (f"line {line:,}" if line is not None else f"record {number:,}"),
                why=f"the first record of the data says `{LENGTH}`, so all are read as lengths",
                fix='write {"length": 12} for a sequence of 12 tokens',
            )
        yield length


def _records(file: SourceFile) -> Iterator[tuple[object, int | None]]:
    reader = reader_of(file.path)
    with compression.opened(file.path, seeks=reader.seeks) as stream:
        yield from reader.records(stream, file.path, Reading())
