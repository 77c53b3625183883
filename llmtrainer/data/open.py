"""Any path -> documents: a file, a folder, a pattern or the running Python's own library; packed or not."""

from __future__ import annotations

import difflib
import glob
import importlib
import os
import pkgutil
from collections.abc import Callable, Iterable, Iterator
from functools import cache
from pathlib import Path
from typing import Literal

from llmtrainer.base.errors import UserError
from llmtrainer.data import compression, readers, stdlib
from llmtrainer.data.document import Document, Reader, Reading, SourceFile

__all__ = ["Document", "SourceFile", "documents", "find"]


def find(path: Path | str, warn: Callable[[str], None] | None = None) -> list[SourceFile]:
    """The files behind a path, in an order that depends on their names alone.

    path    a file; a folder (all files below it that a reader knows, hidden ones excepted: `warn` hears how many
            others there are); a pattern such as `data/*.jsonl.gz` (`**` for any folder);
            `stdlib:train` or `stdlib:held_out`, see data/stdlib.py
    """
    text = str(path)
    if text.startswith(stdlib.PREFIX):
        return stdlib.find(text)
    place = Path(text)
    if place.is_dir():
        found = _below(place, warn)
    elif place.exists():
        found = [place]
    elif glob.has_magic(text):
        matched = glob.iglob(text, recursive=True)
        found = sorted((Path(name) for name in matched if os.path.isfile(name)), key=lambda item: item.parts)
    else:
        raise _missing(place)
    if not found:
        raise UserError(
            f"no documents in `{text}`",
            why=f"no file there ends in one of {', '.join(sorted(_readers())[:20])} ... (or that with "
            f"{', '.join(compression.SUFFIXES)})",
            fix="name a file, a folder or a pattern that holds text",
        )
    for file in found:
        reader_of(file)
    return [SourceFile(file, file.stat().st_size) for file in found]


def documents(
    files: Iterable[SourceFile],
    *,
    fields: tuple[str, ...] = ("text", "content"),
    errors: Literal["strict", "replace"] = "strict",
    allow_truncated: bool = False,
    warn: Callable[[str], None] | None = None,
) -> Iterator[Document]:
    """The documents of the files in order, as a stream: memory holds one record and a block.

    A record is a text, or an object whose first field of `fields` is the text. Raises UserError with file and line
    for anything that is not; with `allow_truncated` a file that breaks off is reported to `warn` and read as far as
    its last whole record.
    """
    reading = Reading(fields, errors, allow_truncated, warn)
    for file in files:
        yield from _documents(file, reading)


def reader_of(path: Path) -> Reader:
    """The reader of a file, by its ending; UserError names the endings there are."""
    name = path.name.lower()
    for packed in compression.SUFFIXES:
        name = name.removesuffix(packed)
    suffix = os.path.splitext(name)[1]
    if suffix not in _readers():
        near = difflib.get_close_matches(suffix, _readers(), 1)
        raise UserError(
            f"no reader for files that end in `{suffix or path.name}`",
            where=str(path),
            why=f"known: {', '.join(sorted(_readers()))}; each also with {', '.join(compression.SUFFIXES)}",
            fix=f"did you mean `{near[0]}`?" if near else "rename the file: .txt if it is one plain document",
        )
    return _readers()[suffix]


def _documents(file: SourceFile, reading: Reading) -> Iterator[Document]:
    reader, record = reader_of(file.path), 0
    line: int | None = None
    try:
        with compression.opened(file.path, seeks=reader.seeks) as stream:
            for value, line in reader.records(stream, file.path, reading):
                record += 1
                where = f"{file.path}, " + (f"line {line:,}" if line is not None else f"record {record:,}")
                text = reading.text_of(value, where)
                yield Document(text, file.path, record, line, _utf8_length(text, where))
    except EOFError as error:
        after = f"behind line {line:,}" if line else "before its first whole record"
        reading.broken_off("the compressed file breaks off", f"{file.path}, {after}", str(error))
    except compression.Damage as error:
        raise compression.damage(error, file.path) from error
    except FileNotFoundError as error:
        raise _missing(file.path) from error
    except PermissionError as error:
        raise UserError("the file may not be read", where=str(file.path), fix=f"chmod +r {file.path}") from error


def _utf8_length(text: str, where: str) -> int:
    try:
        return len(text) if text.isascii() else len(text.encode())
    except UnicodeEncodeError as error:
        raise UserError(
            "a text holds half a character",
            where=where,
            why=f"U+{ord(text[error.start]):04X}, character {error.start + 1:,} of the text: a surrogate without "
            "its other half",
            fix="mend the record: it was cut inside a character",
        ) from error


@cache
def _readers() -> dict[str, Reader]:
    found: dict[str, Reader] = {}
    for module in pkgutil.iter_modules(readers.__path__):
        for item in vars(importlib.import_module(f"{readers.__name__}.{module.name}")).values():
            if isinstance(item, type) and issubclass(item, Reader) and item is not Reader:
                found.update(dict.fromkeys(item.suffixes, item()))
    return found


def _below(folder: Path, warn: Callable[[str], None] | None) -> list[Path]:
    found, unknown = [], []
    seen = set()
    for parent, folders, names in os.walk(folder, followlinks=True):
        here = os.path.realpath(parent)
        if here in seen:    # a link that leads back up
            folders.clear()
            continue
        seen.add(here)
        folders[:] = sorted(name for name in folders if not name.startswith("."))
        for name in names:
            if name.startswith(".") or not os.path.isfile(os.path.join(parent, name)):
                continue
            path = Path(parent, name)
            try:
                reader_of(path)
                found.append(path)
            except UserError:
                unknown.append(path)
    if unknown and found and warn is not None:
        warn(f"{len(unknown):,} files below {folder} are no text and were left out, such as {min(unknown)}")
    return sorted(found, key=lambda path: path.relative_to(folder).parts)


def _missing(path: Path) -> UserError:
    parent = path.parent
    names = [item.name for item in parent.iterdir()] if parent.is_dir() else []
    near = difflib.get_close_matches(path.name, names, 1)
    return UserError(
        f"no file or folder `{path}`",
        why=None if parent.is_dir() else f"`{parent}` does not exist either (relative to {Path.cwd()})",
        fix=f"did you mean `{parent / near[0]}`?" if near else "check the path",
    )
