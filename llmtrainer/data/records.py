"""Any path -> records as their file holds them, each with its place, for a format to read."""

from __future__ import annotations

import importlib
import os
import pkgutil
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

from llmtrainer.base.errors import UserError
from llmtrainer.data import compression, readers
from llmtrainer.data.document import AnyPath, Reader, Reading, SourceFile
from llmtrainer.data.open import reader_of
from llmtrainer.data.tokens import Ids

_TABLES = frozenset({"json", "parquet", "arrow", "csv", "pkl", "pt"})
"""Readers of files that may hold records."""


@dataclass(frozen=True, slots=True)
class Record:
    """What one line, row or item of a file holds."""

    value: Any
    """A UserError where it cannot be read and whoever reads wants to know (`Reading.lenient`)."""
    file: AnyPath
    number: int
    """Which record of its file, from 1."""
    line: int | None
    """The line it begins on, from 1; None where a format has no lines."""

    @property
    def place(self) -> str:
        """For people: the file, and where in it."""
        return f"{self.file}, " + (f"line {self.line:,}" if self.line is not None else f"record {self.number:,}")


def records(file: SourceFile, reading: Reading) -> Iterator[Record]:
    """The records of a file in order, as a stream. Raises UserError for a file that holds none, is damaged or
    breaks off."""
    assert reading.whole
    reader, number = _reader_of(file.path), 0
    line: int | None = None
    try:
        with compression.opened(file.path, seeks=reader.seeks) as stream:
            for value, line in reader.records(stream, file.path, reading):
                number += 1
                record = Record(value, file.path, number, line)
                if isinstance(value, Ids) or reader.kind == "text":
                    raise _no_record(record)
                yield record
    except EOFError as error:
        after = f"behind line {line:,}" if line else "before its first whole record"
        reading.broken_off("the compressed file breaks off", f"{file.path}, {after}", str(error))
    except compression.Damage as error:
        raise compression.damage(error, file.path) from error
    except FileNotFoundError as error:
        raise UserError(f"no file `{file.path}`", fix="check the path") from error
    except PermissionError as error:
        raise UserError("the file may not be read", where=str(file.path), fix=f"chmod +r {file.path}") from error


def holding(files: Sequence[SourceFile], warn: Callable[[str], None]) -> list[SourceFile]:
    """Of the files of a folder or a pattern, those that hold records; `warn` hears of the others. Source code counts
    only where there is nothing else. A file that was named alone is taken as it is."""
    if len(files) == 1:
        return list(files)
    found = [file for file in files if file.path.suffix in _of_records() or _reader_of(file.path).kind in _TABLES]
    data = [file for file in found if _reader_of(file.path).kind != "docstrings"] or found
    if data and len(data) < len(files):
        other = next(file for file in files if file not in data)
        warn(f"{len(files) - len(data):,} files hold no records and were left out, such as {other.path}")
    return data or list(files)


def first_value(file: SourceFile) -> Any:
    """What the first record of a file is that can be read, a text where the file is one; None where there is none."""
    reader = _reader_of(file.path)
    with compression.opened(file.path, seeks=reader.seeks) as stream:
        found = reader.records(stream, file.path, Reading(whole=True, lenient=True))
        return next((value for value, _ in found if not isinstance(value, UserError)), None)


def _no_record(record: Record) -> UserError:
    held = "a list of token ids" if isinstance(record.value, Ids) else "text"
    return UserError(
        f"there is {held} where a record is wanted", where=record.place,
        why="an example has a question and an answer, under keys",
        fix="name a file of records (.jsonl, .json, .parquet, .arrow, .csv, .yaml), or data.kind=documents to learn "
        "plain text",
    )


def _reader_of(path: AnyPath) -> Reader:
    name = Path(path.name.lower())
    while name.suffix in compression.SUFFIXES:
        name = name.with_suffix("")
    return _of_records().get(os.path.splitext(name.name)[1]) or reader_of(path)


@cache
def _of_records() -> dict[str, Reader]:
    """The readers that are asked first where records are wanted, by ending."""
    found: dict[str, Reader] = {}
    for module in pkgutil.iter_modules(readers.__path__):
        for item in vars(importlib.import_module(f"{readers.__name__}.{module.name}")).values():
            if isinstance(item, type) and issubclass(item, Reader) and item is not Reader and item.holds == "records":
                found.update(dict.fromkeys(item.suffixes, item()))
    return found
