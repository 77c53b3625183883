"""JSON: an array, or values one after another, as a stream."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from typing import Any, BinaryIO, ClassVar

from llmtrainer.base.errors import UserError
from llmtrainer.data.document import AnyPath, Reader, Reading, text_in

LONGEST = 2**30
"""Bytes of one record: a file whose first record has no end is refused before it has filled the memory."""
_BLOCK = 2**18
_BLANK = re.compile(rb"[ \t\r\n]*+")
_INSIDE_STRING = re.compile(rb'[^"\\\n]*+(?:\\[^\n][^"\\\n]*+)*+')
_OUTSIDE_STRING = re.compile(rb'[^"{}\[\],]*+')


class Json(Reader):
    """`.jsonl` holds one value a line; `.json` an array if it begins with `[`, else values one after another."""

    suffixes: ClassVar[tuple[str, ...]] = (".jsonl", ".ndjson", ".json")

    def records(self, stream: BinaryIO, path: AnyPath, reading: Reading) -> Iterator[tuple[Any, int | None]]:
        if any(suffix.lower() == ".json" for suffix in path.suffixes[-2:]):
            return _Values(stream, path, reading).records()
        return _lines(stream, path, reading)


def _lines(stream: BinaryIO, path: AnyPath, reading: Reading) -> Iterator[tuple[Any, int]]:
    number = byte = 0
    while line := stream.readline(LONGEST + 1):
        number += 1
        if len(line) > LONGEST:
            raise _endless(path, number)
        if content := line.removeprefix(b"\xef\xbb\xbf" if number == 1 else b"").strip():
            try:
                yield _value(content, path, reading, byte, number), number
            except UserError as error:
                whole = line.endswith(b"\n") or (isinstance(error.__cause__, UnicodeDecodeError) and _more(content))
                if not whole:
                    reading.broken_off("the last line breaks off", f"{path}, line {number:,}", error.why or error.what)
                elif reading.lenient:
                    yield error, number
                else:
                    raise
        byte += len(line)


def _more(content: bytes) -> bool:
    """Whether bad UTF-8 is more than a character cut at the end."""
    try:
        content.decode("utf-8")
    except UnicodeDecodeError as error:
        return error.reason != "unexpected end of data"
    return False


class _Values:
    """Finds where each value ends by brackets and strings alone, and leaves the rest to `json`.

    The text in memory is the current value and one block, however long the file.
    """

    def __init__(self, stream: BinaryIO, path: AnyPath, reading: Reading) -> None:
        self.stream, self.path, self.reading = stream, path, reading
        self.buffer, self.at, self.line, self.byte, self.ended = b"", 0, 1, 0, False

    def records(self) -> Iterator[tuple[Any, int]]:
        self._fill()
        self.at = 3 if self.buffer.startswith(b"\xef\xbb\xbf") else 0
        array = self._next_byte() == b"["
        if array:
            self.at += 1
        first = True
        while (byte := self._next_byte()) and byte != b"]":
            if array and not first:
                if byte != b",":
                    raise self._wrong("a comma is missing between two records")
                self.at += 1
                self._next_byte()
            first, line = False, self.line
            end = self._end()
            if end is None or self.at == len(self.buffer):
                self._broken_off(line)
                return
            if end == self.at:
                raise self._wrong("a record is missing")
            content, byte_at = self.buffer[self.at : end].rstrip(), self.byte + self.at
            try:
                value = _value(content, self.path, self.reading, byte_at, line)
            except UserError as error:
                if not self.reading.lenient:
                    raise
                value = error
            yield value, line
            self.line += self.buffer.count(b"\n", self.at, end)
            self.at = end
        if array and byte != b"]":
            self._broken_off(self.line)
        elif byte == b"]":
            self.at += 1
            if not array or self._next_byte():
                raise self._wrong("text after the end of the array" if array else "a `]` without its `[`")

    def _end(self) -> int | None:
        """Where the value that begins here ends in the buffer; None if the file ends first."""
        depth, place = 0, self.at
        scalar = self.buffer[self.at : self.at + 1] not in (b"{", b"[", b'"')
        while True:
            place = self._skip(_OUTSIDE_STRING, place)
            char = self.buffer[place : place + 1]
            if not char:
                return place if scalar and depth == 0 else None
            if scalar and depth == 0:
                # A bare number or word: it ends at a comma, a bracket or a blank.
                blank = re.search(rb"[ \t\r\n]", self.buffer[self.at : place])
                return self.at + blank.start() if blank else place
            if char in b",":
                assert depth > 0
                place += 1
                continue
            if char == b'"':
                place = self._string_end(place)
                if place < 0:
                    return None
            else:
                depth += 1 if char in b"{[" else -1
                place += 1
            if depth <= 0:    # below 0: a bracket that nothing opened, for `json` to refuse
                return place

    def _string_end(self, place: int) -> int:
        """Behind the closing quote of the string that begins at `place`; -1 if the file ends first."""
        place += 1
        while True:
            place = self._skip(_INSIDE_STRING, place)
            char = self.buffer[place : place + 1]
            if char == b'"':
                return place + 1
            if char == b"\n" or (char == b"\\" and self.buffer[place + 1 : place + 2] == b"\n"):
                self.line += self.buffer.count(b"\n", self.at, place)
                raise self._wrong("a line ends inside a string")
            if not self._fill():
                return -1

    def _skip(self, pattern: re.Pattern[bytes], place: int) -> int:
        """Behind the longest match, across blocks; at the buffer's end only if the file ends there."""
        while True:
            found = pattern.match(self.buffer, place)
            assert found is not None
            place = found.end()
            if place < len(self.buffer) or not self._fill():
                return place

    def _next_byte(self) -> bytes:
        """The next byte that is not blank, without taking it; empty at the end of the file."""
        while True:
            self._forget()
            found = _BLANK.match(self.buffer, self.at)
            assert found is not None
            self.line += self.buffer.count(b"\n", self.at, found.end())
            self.at = found.end()
            if self.at < len(self.buffer) or not self._fill():
                return self.buffer[self.at : self.at + 1]

    def _forget(self) -> None:
        if self.at > _BLOCK:
            self.buffer, self.byte, self.at = self.buffer[self.at :], self.byte + self.at, 0

    def _fill(self) -> bool:
        if len(self.buffer) - self.at > LONGEST:
            raise _endless(self.path, self.line)
        # Twice what is held, so that a long record is copied only some times.
        block = self.stream.read(max(_BLOCK, len(self.buffer) - self.at)) if not self.ended else b""
        self.ended = not block
        self.buffer += block
        return bool(block)

    def _broken_off(self, line: int) -> None:
        self.reading.broken_off(
            "the last record breaks off" if self.at < len(self.buffer) else "the array has no end",
            f"{self.path}, line {line:,}", "the file ends before the record or the array is closed",
        )

    def _wrong(self, why: str) -> UserError:
        return _no_json(why, self.path, self.line)


def _value(content: bytes, path: AnyPath, reading: Reading, byte: int, line: int) -> Any:
    try:
        return json.loads(text_in(content, reading, path, byte=byte, line=line))
    except json.JSONDecodeError as error:
        raise _no_json(f"{error.msg}, column {error.colno:,}", path, line + error.lineno - 1) from error
    except RecursionError as error:
        raise _no_json("brackets are nested too deeply", path, line) from error


def _no_json(why: str, path: AnyPath, line: int) -> UserError:
    return UserError(
        "a record is no JSON", where=f"{path}, line {line:,}", why=why,
        fix="mend or delete the record; nothing is left out silently",
    )


def _endless(path: AnyPath, line: int) -> UserError:
    return UserError(
        f"a record has no end within {LONGEST // 2**20:,} MiB", where=f"{path}, line {line:,}",
        fix="one document a record; is this really JSON?",
    )
