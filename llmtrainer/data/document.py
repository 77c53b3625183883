"""What a reader gives: documents that know where they stood, so that an error can say so."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO, ClassVar, Literal

import numpy as np
from numpy.typing import NDArray

from llmtrainer.base.config import Kind
from llmtrainer.base.errors import UserError
from llmtrainer.data.remote import RemoteFile
from llmtrainer.data.tokens import Ids

AnyPath = Path | RemoteFile
"""A file on this machine, or behind an address."""
IDS = "input_ids"
"""The field of a record that holds token ids instead of text."""


@dataclass(frozen=True)
class SourceFile:
    """A file that holds documents."""

    path: AnyPath
    bytes: int
    """Size on the disk, compressed if it is; 0 for a remote file whose server does not tell it."""


@dataclass(frozen=True, slots=True)
class Document:
    """One text, and its place in its file."""

    text: str
    file: AnyPath
    record: int
    """Which document of its file, from 1."""
    line: int | None
    """The line it begins on, from 1; None where a format has no lines."""
    bytes: int
    """Length of the text in UTF-8."""


@dataclass(frozen=True, slots=True)
class Tokens:
    """One document that was tokenised before, checked against the vocabulary; without the end id that closed it."""

    ids: NDArray[np.int64]
    file: AnyPath
    record: int
    """Which document of its file, from 1."""


@dataclass(frozen=True)
class Reading:
    """How to read, the same for every file."""

    fields: tuple[str, ...] = ("text", "content")
    """Where a record's text is: the first of these that it has. `title+content` is had by a record that has both,
    and is their texts with a newline between, an empty or missing one left out with its newline. `input_ids` holds
    token ids."""
    errors: Literal["strict", "replace"] = "strict"
    """What bytes that are no UTF-8 become: an error, or U+FFFD."""
    allow_truncated: bool = False
    """Whether a file that breaks off is reported and read as far as it goes, instead of refused."""
    warn: Callable[[str], None] | None = None
    """Hears of every record that is left out."""
    allow_pickle: bool = False
    """Whether a pickle may run the code in it, instead of being refused if it holds more than plain values."""
    raw_ids: Literal["uint16", "uint32"] = "uint16"
    """How a raw `.bin` stores a token id, little-endian."""
    lenient: bool = False
    """Whether a record that cannot be read is given as the UserError that says why, for who counts such, instead of
    ending the reading. By formats that know where the next record begins."""
    whole: bool = False
    """Whether whole records are wanted, as a format of conversations reads them, and not the text in them."""

    def chosen(self, names: Sequence[str]) -> tuple[str, ...]:
        """The fields of a record with these names that make its text; empty if it has none of `fields`. All of
        them where whole records are wanted."""
        if self.whole:
            return tuple(names)
        for field in self.fields:
            for parts in ((field,), tuple(field.split("+"))):    # a column may have a + in its own name
                if all(part in names for part in parts):
                    return parts
        return ()

    def content_of(self, record: object, where: str) -> str | Ids:
        """The text of a record: itself, its field, or several joined; or the ids that it holds instead."""
        if isinstance(record, dict):
            found = self.chosen(list(record))
            if not found:
                raise UserError(
                    f"a record has no field {' or '.join(f'`{name}`' for name in self.fields)}",
                    where=where,
                    why=f"it has: {', '.join(f'`{name}`' for name in list(record)[:12]) or 'none'}",
                    fix="fields=[NAME], the field that holds the text, or fields=[TITLE+BODY] for several joined (in "
                    "a recipe data.train.fields)",
                )
            if found == (IDS,):
                return Ids(ids_of(record[IDS], f"{where}, field `{IDS}`"))
            if len(found) > 1:
                parts = [_text(record[name], f"{where}, field `{name}`") for name in found if record[name] is not None]
                return "\n".join(part for part in parts if part)
            record, where = record[found[0]], f"{where}, field `{found[0]}`"
        return _text(record, where)

    def broken_off(self, what: str, where: str, why: str) -> None:
        """A file ends too early: refuse it, or report it where that was allowed."""
        if not self.allow_truncated:
            raise UserError(
                what, where=where, why=why,
                fix="fetch the file again, or leave the broken record out: allow_truncated=true for prepare and "
                "evaluate, data.allow_truncated=true in a recipe",
            )
        if self.warn is not None:
            self.warn(f"{what}: left out ({where}: {why})")


def require_end(stream: BinaryIO, path: AnyPath, what: str, fix: str) -> None:
    """Refuse what stands behind the one thing that a file of this kind holds: it would be left out."""
    if stream.read(1):
        raise UserError(f"something stands behind {what}", where=str(path), why="it would not be read", fix=fix)


class Reader(Kind):
    """One file format: an open file becomes records, each with its line."""

    folder: ClassVar[str] = "llmtrainer.data.readers"
    suffixes: ClassVar[tuple[str, ...]]
    """Endings of the files it reads, such as `.jsonl`; in front of `.gz` and its like too."""

    holds: ClassVar[Literal["text", "tokens", "records"]] = "text"
    """What such files are for. In a folder, files of tokens are taken only where there is no file of text. A reader
    of records stands beside one of text for the same ending, and is asked only where records are wanted."""

    def records(self, stream: BinaryIO, path: AnyPath, reading: Reading) -> Iterator[tuple[Any, int | None]]:
        """(what the file holds, the line it begins on) in order: a text, a mapping with one, or Ids. `stream` is
        uncompressed, and can seek only if `seeks`. EOFError and its like from the stream pass through: the caller
        knows the compression."""
        raise NotImplementedError

    seeks: ClassVar[bool] = False
    """Whether the format is read by random access, so that a compressed file is unpacked to a temporary one."""


def ids_of(value: object, where: str) -> NDArray[Any]:
    """A list or an array of whole numbers as an array."""
    array = np.asarray(value) if isinstance(value, list | tuple | np.ndarray) else None
    if array is None or array.ndim != 1 or (len(array) and array.dtype.kind not in "iu"):
        raise UserError(
            "token ids are no list of whole numbers", where=where, why=f"they are {_name_of(value)}",
            fix="fields=[NAME], a field that holds text or whole numbers",
        )
    return array if len(array) else array.astype(np.int64)


def _text(value: object, where: str) -> str:
    if isinstance(value, str):
        return value
    raise UserError(
        f"a record's text is {_name_of(value)}",
        where=where,
        why="a document is one text",
        fix="fields=[NAME], a field that holds text in every record (in a recipe data.train.fields)",
    )


def _name_of(value: object) -> str:
    if value is None:
        return "null"
    names = {bool: "true or false", int: "a number", float: "a number", list: "a list", dict: "an object"}
    return names.get(type(value), f"a {type(value).__name__}")


def text_in(content: bytes, reading: Reading, path: AnyPath, *, byte: int = 0, line: int = 1) -> str:
    """UTF-8 to text; an error names the byte (counted from 0 at the file's start) and its line."""
    try:
        return content.decode("utf-8", errors=reading.errors)
    except UnicodeDecodeError as error:
        line += content.count(b"\n", 0, error.start)
        raise UserError(
            "bytes that are no UTF-8",
            where=f"{path}, line {line:,}, byte {byte + error.start:,}",
            why=f"0x{content[error.start]:02x}: {error.reason}",
            fix=f"convert the file, for example: iconv -f LATIN1 -t UTF-8 {path.name} > converted",
        ) from error
