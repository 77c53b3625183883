"""Open a file as a stream of its uncompressed bytes, whichever of the usual programs packed it."""

from __future__ import annotations

import bz2
import io
import lzma
import shutil
import tempfile
import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO, cast

import zstandard

from llmtrainer.base.errors import UserError
from llmtrainer.data.remote import RemoteFile

SUFFIXES = (".gz", ".zst", ".xz", ".bz2")
_BLOCK = 2**17
_PACKED_BLOCK = 2**11

Damage = (EOFError, zlib.error, lzma.LZMAError, zstandard.ZstdError)
"""What reading a damaged file may raise."""


@contextmanager
def opened(path: Path | RemoteFile, *, seeks: bool = False) -> Iterator[BinaryIO]:
    """The uncompressed content, buffered. EOFError while reading: the file breaks off.

    With `seeks` a compressed file is unpacked to a temporary one first: O(1) memory, not O(1) disk.
    """
    suffix = path.suffix.lower()
    with path.open("rb") as packed:
        if suffix not in SUFFIXES:
            if not seeks or packed.seekable():
                yield packed
            else:    # a server that gives no parts of a file
                with _whole(packed) as whole:
                    yield whole
            return
        if len(cast(io.BufferedReader, packed).peek(2)) < 2:
            raise EOFError("the file ends before its content begins")
        with _unpacked(packed, suffix) as stream:
            if not seeks:
                yield stream
                return
            with _whole(stream) as whole:
                yield whole


@contextmanager
def _whole(stream: BinaryIO) -> Iterator[BinaryIO]:
    with tempfile.TemporaryFile(prefix="llmtrainer-") as whole:
        shutil.copyfileobj(stream, whole, _BLOCK)
        whole.seek(0)
        yield cast(BinaryIO, whole)


def damage(error: Exception, path: Path | RemoteFile) -> UserError:
    """What to tell a person about a file that cannot be unpacked."""
    return UserError(
        f"the compressed file is damaged: {path.suffix} cannot read it",
        where=str(path),
        why=str(error),
        fix="fetch or pack the file again",
    )


def _unpacked(packed: BinaryIO, suffix: str) -> BinaryIO:
    blocks = _members(packed, _UNPACKERS[suffix])
    return cast(BinaryIO, io.BufferedReader(_Unpacker(blocks), _BLOCK))


_UNPACKERS: dict[str, Callable[[], Any]] = {
    ".gz": lambda: zlib.decompressobj(16 + zlib.MAX_WBITS),
    ".zst": lambda: zstandard.ZstdDecompressor(max_window_size=2**31).decompressobj(),
    ".xz": lzma.LZMADecompressor,
    ".bz2": bz2.BZ2Decompressor,
}


def _members(packed: BinaryIO, begin: Callable[[], Any]) -> Iterator[bytes]:
    """A file is one member after another, each unpacked by an object of its own; zeros may follow the last.

    The libraries' own file readers would not do: zstd's takes a frame that breaks off for the end of the file, those
    of bz2 and xz leave out whatever they do not understand behind the first member.
    """
    unpacker = begin()
    # A little at a time: a few bytes of a very regular file become megabytes at once.
    while block := packed.read(_PACKED_BLOCK):
        while block:
            if unpacker.eof:
                block = block.lstrip(b"\0")
                if not block:
                    break
                unpacker = begin()
            try:
                content = unpacker.decompress(block)
            except OSError as error:    # what bz2 says of a damaged file
                raise zlib.error(str(error)) from error
            yield content
            block = unpacker.unused_data if unpacker.eof else b""
    if not unpacker.eof:
        raise EOFError("its last part has no end")


class _Unpacker(io.RawIOBase):
    """A stream over blocks of bytes."""

    def __init__(self, blocks: Iterator[bytes]) -> None:
        self._blocks, self._rest = blocks, memoryview(b"")

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: memoryview) -> int:    # type: ignore[override]
        while not self._rest:
            block = next(self._blocks, None)
            if block is None:
                return 0
            self._rest = memoryview(block)
        count = min(len(buffer), len(self._rest))
        buffer[:count], self._rest = self._rest[:count], self._rest[count:]
        return count
