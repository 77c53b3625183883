"""Megatron-LM's indexed datasets: PREFIX.bin holds ids end to end, PREFIX.idx where its sequences and documents are.

The index, little-endian: the nine bytes `MMIDIDX\\0\\0`; uint64 version 1; one byte for the type of an id; uint64
number of sequences; uint64 number of document borders; int32 length of each sequence in ids; int64 place of each in
the .bin in bytes; int64 number of the first sequence of each document, and behind the last document that of all.
"""

from __future__ import annotations

import io
import os
import struct
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO, TypeVar

import numpy as np
from numpy.typing import NDArray

from llmtrainer.base.errors import UserError
from llmtrainer.base.rundir import sync_folder
from llmtrainer.data import compression
from llmtrainer.data.packed import NumberFile, Store, shard_name
from llmtrainer.data.remote import RemoteFile

AnyFile = TypeVar("AnyFile", Path, RemoteFile, Path | RemoteFile)
MAGIC = b"MMIDIDX\x00\x00"
DTYPES = {1: "<u1", 2: "<i1", 3: "<i2", 4: "<i4", 5: "<i8", 8: "<u2"}
"""Codes of the types an id may have; 6 and 7 are for numbers with a fraction."""
_HEADER = struct.Struct("<9sQBQQ")
_BLOCK = 2**20


@dataclass(frozen=True)
class Index:
    """What an `.idx` says."""

    dtype: np.dtype[Any]
    lengths: NDArray[np.int32]
    """Ids of each sequence."""
    places: NDArray[np.int64]
    """Where each begins in the .bin, in bytes."""
    borders: NDArray[np.int64]
    """First sequence of each document, and the number of sequences: one more than documents."""


def partner(path: AnyFile) -> AnyFile | None:
    """The .idx of a .bin or the .bin of an .idx, in capitals or packed as well; None where there is none, and for
    any other file."""
    stem, ending, packing = parts(path.name)
    other = {".bin": ".idx", ".idx": ".bin"}.get(ending.lower())
    return _first(path, stem, other, packing, ending.isupper()) if other else None


def of_prefix(prefix: Path) -> Path | None:
    """The .bin of the pair PREFIX.bin and PREFIX.idx, in capitals or packed as well; None where there is no pair."""
    found = _first(prefix, prefix.name, ".bin", "", False) if prefix.name else None
    return found if found is not None and partner(found) is not None else None


def parts(name: str) -> tuple[str, str, str]:
    """`corpus.bin.gz` -> `corpus`, `.bin`, `.gz`."""
    inner, packing = os.path.splitext(name)
    if packing.lower() not in compression.SUFFIXES:
        inner, packing = name, ""
    return *os.path.splitext(inner), packing


def _first(path: AnyFile, stem: str, ending: str, packing: str, capitals: bool) -> AnyFile | None:
    """The first file beside `path` that is there: most likely it is spelled and packed as its partner is."""
    own, other = (ending.upper(), ending) if capitals else (ending, ending.upper())
    names = [own + packing, own]
    if isinstance(path, Path):    # behind an address each look is a request, and most files of ids have no index
        names += [spelled + packed for spelled in (own, other) for packed in ("", *compression.SUFFIXES)]
    for name in dict.fromkeys(names):
        found = path.with_name(stem + name)
        if found.is_file():
            return found
    return None


def read_index(path: Path | RemoteFile) -> Index:
    """The index of a pair, packed or not; UserError if it is none, is cut, or contradicts itself."""
    try:
        with compression.opened(path) as file:
            content = file.read()
    except EOFError as error:
        raise _wrong(path, f"it breaks off: {error}") from error
    except compression.Damage as error:
        raise compression.damage(error, path) from error
    if len(content) < _HEADER.size or content[:9] != MAGIC:
        raise _wrong(path, "its first bytes are not those of an index")
    _, version, code, sequences, borders = _HEADER.unpack_from(content)
    if version != 1 or code not in DTYPES:
        raise _wrong(path, f"it has version {version} and a type of ids numbered {code}")
    wanted = _HEADER.size + 12 * sequences + 8 * borders
    # One byte a sequence may follow, the modes of a multimodal corpus, which a corpus of text has no use for.
    if len(content) not in (wanted, wanted + sequences):
        raise _wrong(path, f"it has {len(content):,} bytes, and its counts make {wanted:,}")
    at = _HEADER.size
    lengths = np.frombuffer(content, "<i4", sequences, at)
    places = np.frombuffer(content, "<i8", sequences, at + 4 * sequences)
    document = np.frombuffer(content, "<i8", borders, at + 12 * sequences)
    if not len(document) or document[0] != 0 or document[-1] != sequences or (np.diff(document) < 0).any():
        raise _wrong(path, "its documents do not cover its sequences")
    return Index(np.dtype(DTYPES[code]), lengths, places, document)


def documents(stream: BinaryIO, path: Path | RemoteFile, index_path: Path | RemoteFile) -> Iterator[NDArray[Any]]:
    """The ids of each document, from the .bin's own stream. Sequences must lie one behind the other."""
    index = read_index(index_path)
    size = index.dtype.itemsize
    expected = np.concatenate([[0], np.cumsum(index.lengths, dtype=np.int64) * size])
    if not np.array_equal(expected[:-1], index.places):
        raise _wrong(index_path, "its sequences do not lie one behind the other in the .bin")
    for start, stop in zip(index.borders[:-1].tolist(), index.borders[1:].tolist(), strict=True):
        wanted = int(expected[stop] - expected[start])
        content = stream.read(wanted)
        if len(content) < wanted:
            raise _wrong(path, f"the index promises {int(expected[-1]):,} bytes, and there are less")
        yield np.frombuffer(content, index.dtype)
    if stream.read(1):
        raise _wrong(path, f"the index knows {int(expected[-1]):,} bytes, and there are more")


def write_pair(store: Store, prefix: Path, report: Callable[[int], None] | None = None) -> None:
    """A token store as PREFIX.bin and PREFIX.idx, each document one sequence that ends with its end id.

    Ids take two bytes (type 8) where the store's do, else four (type 4). Memory holds one block. `report` hears
    bytes of ids.
    """
    wide = store.dtype.itemsize == 4
    with prefix.with_suffix(".bin").open("wb") as file:
        shards = sum(1 for name in store.manifest["files"] if name.startswith("tokens-"))
        for number in range(shards):
            # An id below 2**31 has the same four bytes as uint32 and as int32.
            with (store.path / shard_name(number)).open("rb") as shard:
                while block := shard.read(_BLOCK):
                    file.write(block)
                    if report is not None:
                        report(len(block))
        _sync(file)
    with prefix.with_suffix(".idx").open("wb") as file:
        file.write(_HEADER.pack(MAGIC, 1, 4 if wide else 8, store.documents, store.documents + 1))
        for edges in _blocks(store.offsets):
            file.write(np.diff(edges).astype("<i4").tobytes())
        for edges in _blocks(store.offsets):
            file.write((edges[:-1] * store.dtype.itemsize).astype("<i8").tobytes())
        for first in range(0, store.documents + 1, _BLOCK):
            file.write(np.arange(first, min(first + _BLOCK, store.documents + 1), dtype="<i8").tobytes())
        _sync(file)
    sync_folder(prefix.parent)


def _blocks(offsets: NumberFile) -> Iterator[NDArray[np.int64]]:
    """The offsets in blocks that share their edges."""
    for first in range(0, len(offsets) - 1, _BLOCK):
        yield offsets[first : first + _BLOCK + 1]


def _sync(file: io.BufferedWriter) -> None:
    file.flush()
    os.fsync(file.fileno())


def _wrong(path: Path | RemoteFile, why: str) -> UserError:
    return UserError(
        "the indexed dataset cannot be read", where=str(path), why=why,
        fix="fetch or make both files again, PREFIX.bin and PREFIX.idx",
    )
