"""Open a file as a stream of its uncompressed bytes, whichever of the usual programs packed it."""

from __future__ import annotations

import bz2
import gzip
import io
import lzma
import shutil
import tempfile
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO, cast

import zstandard

from llmtrainer.base.errors import UserError

SUFFIXES = (".gz", ".zst", ".xz", ".bz2")
_BLOCK = 2**17

Damage = (EOFError, gzip.BadGzipFile, zlib.error, lzma.LZMAError, zstandard.ZstdError)
"""What reading a damaged file may raise; bz2 raises a plain OSError, told apart below."""


@contextmanager
def opened(path: Path, *, seeks: bool = False) -> Iterator[BinaryIO]:
    """The uncompressed content, buffered. EOFError while reading: the file breaks off.

    With `seeks` a compressed file is unpacked to a temporary one first: O(1) memory, not O(1) disk.
    """
    suffix = path.suffix.lower()
    with path.open("rb") as packed:
        if suffix not in SUFFIXES:
            yield packed
            return
        if not packed.peek(1):
            raise EOFError("the file is empty")
        with _unpacked(packed, suffix) as stream:
            if not seeks:
                yield stream
                return
            with tempfile.TemporaryFile(prefix="llmtrainer-") as whole:
                shutil.copyfileobj(stream, whole, _BLOCK)
                whole.seek(0)
                yield cast(BinaryIO, whole)


def damage(error: Exception, path: Path) -> UserError:
    """What to tell a person about a file that cannot be unpacked."""
    return UserError(
        f"the compressed file is damaged: {path.suffix} cannot read it",
        where=str(path),
        why=str(error),
        fix="fetch or pack the file again",
    )


def _unpacked(packed: io.BufferedReader, suffix: str) -> BinaryIO:
    if suffix == ".gz":
        return cast(BinaryIO, io.BufferedReader(gzip.GzipFile(fileobj=packed, mode="rb"), _BLOCK))
    raw = {".zst": _zstd, ".xz": _xz, ".bz2": _bz2}[suffix](packed)
    return cast(BinaryIO, io.BufferedReader(_Unpacker(raw), _BLOCK))


def _zstd(packed: BinaryIO) -> Iterator[bytes]:
    # zstandard's own stream reader takes a frame that breaks off for the end of the file.
    unpacker = zstandard.ZstdDecompressor(max_window_size=2**31).decompressobj()
    started = False
    while block := packed.read(_BLOCK):
        while block:
            if unpacker.eof:    # the next frame
                unpacker = zstandard.ZstdDecompressor(max_window_size=2**31).decompressobj()
            started = True
            yield unpacker.decompress(block)
            block = unpacker.unused_data if unpacker.eof else b""
    if started and not unpacker.eof:
        raise EOFError("the last zstd frame breaks off")


def _xz(packed: BinaryIO) -> Iterator[bytes]:
    with lzma.LZMAFile(packed) as file:
        while block := file.read(_BLOCK):
            yield block


def _bz2(packed: BinaryIO) -> Iterator[bytes]:
    with bz2.BZ2File(packed) as file:
        while True:
            try:
                block = file.read(_BLOCK)
            except OSError as error:
                if error.errno is not None:    # the disk's fault, not the file's
                    raise
                raise zlib.error(str(error)) from error
            if not block:
                return
            yield block


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
