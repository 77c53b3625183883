"""What a reader gives: documents that know where they stood, so that an error can say so."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO, ClassVar, Literal

from llmtrainer.base.config import Kind
from llmtrainer.base.errors import UserError


@dataclass(frozen=True)
class SourceFile:
    """A file that holds documents."""

    path: Path
    bytes: int
    """Size on the disk, compressed if it is."""


@dataclass(frozen=True, slots=True)
class Document:
    """One text, and its place in its file."""

    text: str
    file: Path
    record: int
    """Which document of its file, from 1."""
    line: int | None
    """The line it begins on, from 1; None where a format has no lines."""
    bytes: int
    """Length of the text in UTF-8."""


@dataclass(frozen=True)
class Reading:
    """How to read, the same for every file."""

    fields: tuple[str, ...] = ("text", "content")
    """Names of a record's field that holds the text; the first that it has."""
    errors: Literal["strict", "replace"] = "strict"
    """What bytes that are no UTF-8 become: an error, or U+FFFD."""
    allow_truncated: bool = False
    """Whether a file that breaks off is reported and read as far as it goes, instead of refused."""
    warn: Callable[[str], None] | None = None
    """Hears of every record that is left out."""

    def text_of(self, record: object, where: str) -> str:
        """The text of a record: itself, or its field."""
        if isinstance(record, dict):
            found = next((name for name in self.fields if name in record), None)
            if found is None:
                raise UserError(
                    f"a record has no field {' or '.join(f'`{name}`' for name in self.fields)}",
                    where=where,
                    why=f"it has: {', '.join(f'`{name}`' for name in list(record)[:12]) or 'none'}",
                    fix="fields=[NAME], the field that holds the text (in a recipe data.train.fields)",
                )
            record, where = record[found], f"{where}, field `{found}`"
        if not isinstance(record, str):
            raise UserError(
                f"a record's text is {_name_of(record)}",
                where=where,
                why="a document is one text",
                fix="fields=[NAME], a field that holds text in every record (in a recipe data.train.fields)",
            )
        return record

    def broken_off(self, what: str, where: str, why: str) -> None:
        """A file ends too early: refuse it, or report it where that was allowed."""
        if not self.allow_truncated:
            raise UserError(
                what, where=where, why=why,
                fix="fetch the file again, or leave the broken record out: allow_truncated=true (in a recipe "
                "data.allow_truncated=true)",
            )
        if self.warn is not None:
            self.warn(f"{what}: left out ({where}: {why})")


class Reader(Kind):
    """One file format: an open file becomes records, each with its line."""

    folder: ClassVar[str] = "llmtrainer.data.readers"
    suffixes: ClassVar[tuple[str, ...]]
    """Endings of the files it reads, such as `.jsonl`; in front of `.gz` and its like too."""

    def records(self, stream: BinaryIO, path: Path, reading: Reading) -> Iterator[tuple[Any, int | None]]:
        """(what the file holds, the line it begins on) in order. `stream` is uncompressed, and can seek only if
        `seeks`. EOFError and its like from the stream pass through: the caller knows the compression."""
        raise NotImplementedError

    seeks: ClassVar[bool] = False
    """Whether the format is read by random access, so that a compressed file is unpacked to a temporary one."""


def _name_of(value: object) -> str:
    if value is None:
        return "null"
    names = {bool: "true or false", int: "a number", float: "a number", list: "a list", dict: "an object"}
    return names.get(type(value), f"a {type(value).__name__}")


def text_in(content: bytes, reading: Reading, path: Path, *, byte: int = 0, line: int = 1) -> str:
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
