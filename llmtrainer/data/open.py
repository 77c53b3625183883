"""Any path -> documents: a file, folder, pattern or address, or the running Python's own library; packed or not."""

from __future__ import annotations

import difflib
import glob
import importlib
import os
import pkgutil
import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import cache
from itertools import chain
from pathlib import Path
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from llmtrainer.base.errors import UserError
from llmtrainer.data import compression, megatron, readers, samples, stdlib
from llmtrainer.data.document import AnyPath, Document, Reader, Reading, SourceFile, Tokens
from llmtrainer.data.packed import is_store
from llmtrainer.data.remote import RemoteFile, is_remote, remote_facts, remote_files
from llmtrainer.data.tokens import Cutter, Ids, Vocabulary

__all__ = ["Document", "SourceFile", "Tokens", "contents", "documents", "find"]

RECEIPT = "prepared.json"
"""What lies beside something that was prepared, and is no text of anybody's."""


def find(path: Path | str, warn: Callable[[str], None] | None = None) -> list[SourceFile]:
    """The files behind a path, in an order that depends on their names alone: `part-2` stands before `part-10`.

    path    a file; a folder (all files below it that a reader knows, hidden ones excepted: `warn` hears how many
            others there are); a pattern such as `data/*.jsonl.gz` (`**` for any folder); the prefix of Megatron-LM's
            pair of .bin and .idx; an address such as `s3://bucket/corpus/*.parquet`;
            `stdlib:train` or `stdlib:held_out`, see data/stdlib.py
    """
    text = str(path)
    if text.startswith(stdlib.PREFIX):
        return stdlib.find(text)
    if is_remote(text):
        return _remote(text, warn)
    place = Path(text)
    if is_store(place):
        raise UserError(
            "a token store stands where text is wanted", where=text, why="its text is not kept, only its tokens",
            fix="name the text that it was made of",
        )
    if place.is_dir():
        found = _below(place, warn)
    elif place.exists():
        found = [place]
    elif glob.has_magic(text):
        matched = glob.iglob(text, recursive=True)
        found = sorted((Path(name) for name in matched if os.path.isfile(name)), key=lambda item: natural(item.parts))
    elif (pair := megatron.of_prefix(place)) is not None:
        found = [pair]
    else:
        raise _missing(place)
    if not found:
        raise _nothing_in(text)
    for file in found:
        reader_of(file)
    return [SourceFile(file, file.stat().st_size) for file in _with_indexes(found)]


def natural(parts: Sequence[str]) -> tuple[Any, ...]:
    """A key that sorts numbers in names by their value; the names themselves decide where that is the same."""
    # Every second piece is a number, so that numbers meet numbers and words meet words.
    split = (re.split("([0-9]+)", part) for part in parts)
    key = tuple(tuple(int(piece) if place % 2 else piece for place, piece in enumerate(pieces)) for pieces in split)
    return key, tuple(parts)


def documents(
    files: Iterable[SourceFile],
    *,
    fields: tuple[str, ...] = ("text", "content"),
    errors: Literal["strict", "replace"] = "strict",
    allow_truncated: bool = False,
    allow_pickle: bool = False,
    warn: Callable[[str], None] | None = None,
) -> Iterator[Document]:
    """The documents of the files in order, as a stream: memory holds one record and a block.

    A record is a text, or an object whose first field of `fields` is the text. Raises UserError with file and line
    for anything that is not; with `allow_truncated` a file that breaks off is reported to `warn` and read as far as
    its last whole record.
    """
    reading = Reading(fields, errors, allow_truncated, warn, allow_pickle)
    for file in files:
        for document in _contents(file, reading, None, None):
            assert isinstance(document, Document)
            yield document


def contents(
    files: Iterable[SourceFile],
    vocabulary: Vocabulary,
    reading: Reading,
    tell: Callable[[str, AnyPath], None] | None = None,
) -> Iterator[Document | Tokens]:
    """As `documents`, and those of files that hold token ids. `tell` hears (how documents were told apart, file)."""
    for file in files:
        yield from _contents(file, reading, vocabulary, tell)


def holds_tokens(files: Iterable[SourceFile]) -> bool:
    """Whether some of the files are made for token ids."""
    return any(reader_of(file.path).holds == "tokens" for file in files)


def is_container(path: AnyPath) -> bool:
    """Whether a file's size is not that of its text."""
    return path.suffix.lower() in compression.SUFFIXES or reader_of(path).kind != "text"


def reader_of(path: AnyPath) -> Reader:
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


def _contents(
    file: SourceFile, reading: Reading, vocabulary: Vocabulary | None,
    tell: Callable[[str, AnyPath], None] | None,
) -> Iterator[Document | Tokens]:
    reader, record, rule = reader_of(file.path), 0, ""
    line: int | None = None
    try:
        with compression.opened(file.path, seeks=reader.seeks) as stream:
            found = reader.records(stream, file.path, reading)
            for value, line in found:
                where = f"{file.path}, " + (f"line {line:,}" if line is not None else f"record {record + 1:,}")
                content = value if isinstance(value, Ids) else reading.content_of(value, where)
                if isinstance(content, str):
                    record += 1
                    yield Document(content, file.path, record, line, _utf8_length(content, where))
                elif vocabulary is None:
                    raise _no_text(where)
                elif content.border == "stream":
                    cutter = Cutter(vocabulary)
                    for ids in cutter.cut(_stretches(content, found, vocabulary, file.path), str(file.path)):
                        record += 1
                        yield Tokens(vocabulary.opened(ids), file.path, record)
                    rule = cutter.rule
                else:
                    record, rule = record + 1, content.rule
                    yield Tokens(vocabulary.opened(vocabulary.checked(content.ids, where)), file.path, record)
        if rule and tell is not None:
            tell(rule, file.path)
    except EOFError as error:
        after = f"behind line {line:,}" if line else "before its first whole record"
        reading.broken_off("the compressed file breaks off", f"{file.path}, {after}", str(error))
    except compression.Damage as error:
        raise compression.damage(error, file.path) from error
    except FileNotFoundError as error:
        raise _missing(Path(str(file.path))) from error
    except PermissionError as error:
        raise UserError("the file may not be read", where=str(file.path), fix=f"chmod +r {file.path}") from error


def _stretches(
    first: Ids, rest: Iterator[tuple[Any, int | None]], vocabulary: Vocabulary, path: AnyPath
) -> Iterator[NDArray[np.int64]]:
    """The checked ids of a file that is one stream."""
    before = 0
    for ids in chain([first], (value for value, _ in rest)):
        assert isinstance(ids, Ids) and ids.border == "stream"
        yield vocabulary.checked(ids.ids, str(path), before)
        before += len(ids.ids)


def _no_text(where: str) -> UserError:
    return UserError(
        "there are token ids where text is wanted", where=where,
        why="a vocabulary is learned from text, and text is measured as text",
        fix="name the text that the ids were made of",
    )


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
            if isinstance(item, type) and issubclass(item, Reader) and item is not Reader and item.holds != "records":
                found.update(dict.fromkeys(item.suffixes, item()))
    return found


def _remote(text: str, warn: Callable[[str], None] | None) -> list[SourceFile]:
    found = remote_files(text)
    if len(found) != 1 or found[0].url != text:    # a file that was named is read or refused, never left out
        found = _documents_of(found, text, warn)
    if not found:
        raise _nothing_in(text)
    found = _with_indexes(sorted(found, key=lambda file: natural(file.url.split("/"))))
    for file in found:
        reader_of(file)
    return [SourceFile(file, remote_facts(file).bytes or 0) for file in found]


def _documents_of(files: list[RemoteFile], text: str, warn: Callable[[str], None] | None) -> list[RemoteFile]:
    """Those files of a remote folder or pattern that a local one would give: nothing hidden, no receipt of ours, and
    token ids only where there is no text."""
    seen = [file for file in files if file.name != RECEIPT and not _is_hidden(file.url, text)]
    known = [file for file in seen if _is_known(file)]
    texts = [file for file in known if reader_of(file).holds == "text"]
    unknown = [file for file in seen if file not in (texts or known)]
    if unknown and known and warn is not None:
        first = min(file.url for file in unknown)
        warn(f"{len(unknown):,} files below {text} are no text and were left out, such as {first}")
    return texts or known


def _is_hidden(url: str, folder: str) -> bool:
    """Whether a name below the folder begins with a dot; names above it are the user's own choice."""
    place, above = (address.partition("://")[2].lstrip("/") for address in (url, folder))
    below = place.removeprefix(above) if place.startswith(above) else place.rpartition("/")[2]
    return any(name.startswith(".") for name in below.split("/"))


def _is_known(path: AnyPath) -> bool:
    try:
        reader_of(path)
    except UserError:
        return False
    return True


def _with_indexes(paths: Sequence[megatron.AnyFile]) -> list[megatron.AnyFile]:
    """A .bin that Megatron-LM wrote comes with its .idx, which says where its documents are: both are the data."""
    whole: dict[megatron.AnyFile, None] = {}
    for path in paths:
        other = megatron.partner(path)
        pair = [path] if other is None else [path, other]
        if megatron.parts(path.name)[1].lower() == ".idx":
            if other is None or megatron.partner(other) is None:
                raise _half_a_pair(path, other)
            pair.reverse()
        whole |= dict.fromkeys(pair)
    return list(whole)


def _half_a_pair(index: AnyPath, ids: AnyPath | None) -> UserError:
    if ids is None:
        return UserError(
            "an .idx without its .bin", where=str(index), why="it says where documents are, and a .bin holds their ids",
            fix="fetch both files of the pair",
        )
    return UserError(
        "an .idx and its .bin are not named alike", where=str(index), why=f"{ids.name} would be read without it",
        fix="pack both in the same way, or neither, and give both one name before the ending",
    )


def _nothing_in(text: str) -> UserError:
    return UserError(
        f"no documents in `{text}`",
        why=f"no file there ends in one of {', '.join(sorted(_readers())[:20])} ... (or that with "
        f"{', '.join(compression.SUFFIXES)})",
        fix="name a file, a folder or a pattern that holds text",
    )


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
            if name.startswith(".") or name == RECEIPT or not os.path.isfile(os.path.join(parent, name)):
                continue
            path = Path(parent, name)
            try:
                reader_of(path)
                found.append(path)
            except UserError:
                unknown.append(path)
    text = [path for path in found if reader_of(path).holds == "text"]
    if text:    # a model or an array among texts is no document
        unknown += [path for path in found if reader_of(path).holds != "text"]
        found = text
    if unknown and found and warn is not None:
        warn(f"{len(unknown):,} files below {folder} are no text and were left out, such as {min(unknown)}")
    indexes = samples.indexes_in(folder) if not text else []
    if not indexes:
        return sorted(found, key=lambda path: natural(path.relative_to(folder).parts))
    # The index numbers its files by plain names, however many digits those have.
    found.sort(key=lambda path: path.relative_to(folder).parts)
    raw = [(path, path.stat().st_size // 2) for path in found if path.suffix == ".bin"]
    for index in indexes:
        samples.require_index(index, raw)
    return found


def _missing(path: Path) -> UserError:
    parent = path.parent
    names = [item.name for item in parent.iterdir()] if parent.is_dir() else []
    near = difflib.get_close_matches(path.name, names, 1)
    return UserError(
        f"no file or folder `{path}`",
        why=None if parent.is_dir() else f"`{parent}` does not exist either (relative to {Path.cwd()})",
        fix=f"did you mean `{parent / near[0]}`?" if near else "check the path",
    )
