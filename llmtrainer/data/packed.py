"""The token store on disk: shards of ids, of their weights where they have any, the offsets of the documents, and a
manifest that vouches for all of them."""

from __future__ import annotations

import hashlib
import json
import mmap
import os
import weakref
from collections.abc import Callable, Sequence
from functools import cached_property, lru_cache
from pathlib import Path
from typing import Any, Literal, NamedTuple, overload

import numpy as np
from numpy.typing import NDArray

from llmtrainer.base.errors import UserError

VERSION = 1
MANIFEST, DOCUMENTS, FATES, GATES = "manifest.json", "documents.bin", "fates.jsonl", "gates.bin"
COMPARISONS, SHARED, LIKED, MARGINS = "comparisons.bin", "shared.bin", "liked.bin", "margins.bin"
GRADES, PAIRED = "grades.bin", "paired.bin"
OF_COMPARISONS = (COMPARISONS, SHARED, LIKED, MARGINS, GRADES, PAIRED)
_STRIDE = 4096
OPEN_SHARDS = 256
"""Shards mapped at a time: each map holds a file descriptor, and a process may have only some thousand."""


def shard_name(index: int) -> str:
    return f"tokens-{index:05d}.bin"


def weights_name(index: int) -> str:
    return f"weights-{index:05d}.bin"


def dtype_for(vocabulary: int) -> np.dtype[Any]:
    """The narrowest id that holds a vocabulary: two bytes up to 65,536 ids, else four (little-endian)."""
    return np.dtype("<u2" if vocabulary <= 2**16 else "<u4")


class Compared(NamedTuple):
    """What is kept of a comparison besides its documents, which follow each other, the best first."""

    documents: int
    """How many answers there are, a document each."""
    shared: int
    """Tokens that all of them begin with and none of them learns: the prompt."""
    liked: bool | None = None
    """Whether the only answer was liked; None: answers are compared with each other."""
    margin: float | None = None
    """By how much the first is better than the other."""
    low: int | None = None
    high: int | None = None
    """The classes that the only answer may belong to, from low to below high; None: nobody graded it."""
    paired: bool = False
    """Whether each two neighbouring answers are compared with each other, and with no other."""


class Store:
    """Documents as token ids, each closed by the tokenizer's end id, read by random access.

    Nothing is loaded: shards are memory maps, offsets are read by position, so RAM does not grow with the corpus.
    Raises UserError if the folder is no store, or if a file is missing, foreign or of another size.
    """

    def __init__(self, path: Path | str) -> None:
        self.path = Path(path)
        self.manifest = _manifest(self.path)
        self.dtype = np.dtype(self.manifest["dtype"])
        self.vocabulary = int(self.manifest["vocabulary"])
        self.tokenizer = str(self.manifest["tokenizer"])
        self.documents = int(self.manifest["documents"])
        self.tokens = int(self.manifest["tokens"])
        self.text_bytes = int(self.manifest["text_bytes"])
        self.end = int(self.manifest["end"])
        self._files: dict[str, dict[str, Any]] = self.manifest["files"]
        self._require_files()
        self.offsets = NumberFile(self.path / DOCUMENTS)
        """First token of each document in the stream of all documents, and the end of the last: [D + 1]."""
        names = [name for name in self._files if name.startswith("tokens-")]
        sizes = [self._files[name]["bytes"] // self.dtype.itemsize for name in names]
        self._first_token = np.concatenate([[0], np.cumsum(sizes, dtype=np.int64)])
        self._shard = lru_cache(OPEN_SHARDS)(lambda index: _Shard(self.path / names[index], self.dtype))
        weight = self.manifest.get("weights")
        self.weight_dtype = None if weight is None else np.dtype(weight)
        """How the weights of the tokens are stored; None: it is plain text, and each counts 1."""
        self._weight_shard = lru_cache(OPEN_SHARDS)(
            lambda index: _Shard(self.path / weights_name(index), np.dtype(self.weight_dtype))
        )
        self.gate_names: list[str] = self.manifest.get("gates", [])
        """What rows call the adapters of a mixture that they go through; empty where no row says."""
        self._gate_D = np.memmap(self.path / GATES, "<i4", "r") if self.gate_names else np.zeros(0, dtype="<i4")
        self._gates_NG: NDArray[np.int64] | None = None
        self.comparisons = int(self.manifest.get("comparisons", 0))
        """How many comparisons the documents are the answers of; 0 where they are none. See comparisons.py."""
        if len(self.offsets) != self.documents + 1 or self.offsets[-1] != self.tokens:
            raise self._damaged(DOCUMENTS, "its offsets do not match the counts of the manifest")
        if self.gate_names and len(self._gate_D) != self.documents:
            raise self._damaged(GATES, "it does not hold a number for each document")
        if self._first_token[-1] != self.tokens:
            raise self._damaged(MANIFEST, "the sizes of the shards do not add up to its count of tokens")

    @property
    def fingerprint(self) -> str:
        """SHA-256 of what the store holds: ids, weights, borders and tokenizer, wherever the folder lies."""
        held = {name: facts["sha256"] for name, facts in sorted(self._files.items()) if name != FATES}
        weights = [] if self.weight_dtype is None else [self.weight_dtype.str]
        gates = [self.gate_names] if self.gate_names else []
        facts = [*weights, *gates, self.dtype.str, self.tokenizer, self.vocabulary, self.end, held]
        return hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()

    def length(self, document: int) -> int:
        """Tokens of a document, its end id included."""
        first, last = self.offsets[document : document + 2]
        return int(last - first)

    def read(self, document: int, start: int = 0, stop: int | None = None) -> NDArray[Any]:
        """Tokens start..stop of one document, a copy in the store's dtype."""
        first, last = map(int, self.offsets[document : document + 2])
        length = last - first
        stop = length if stop is None else stop
        assert 0 <= start <= stop <= length, f"document {document} has {length} tokens, not {start}..{stop}"
        return self.span(first + start, first + stop)

    def weights(self, document: int, start: int = 0, stop: int | None = None) -> NDArray[np.float32] | None:
        """How much each of these tokens counts as a target, as many as `read` gives; None in a store of text."""
        if self.weight_dtype is None:
            return None
        first, last = map(int, self.offsets[document : document + 2])
        stop = last - first if stop is None else stop
        assert 0 <= start <= stop <= last - first
        return self._span(self._weight_shard, self.weight_dtype, first + start, first + stop).astype(np.float32)

    def gate(self, document: int) -> str | None:
        """What a row calls the adapters that it goes through; None in a store whose rows do not say."""
        return self.gate_names[self._gate_D[document]] if self.gate_names else None

    def number_gates(self, numbers: Callable[[str], Sequence[int]]) -> None:
        """Say what the names of gates mean: from now on `gates` gives these numbers. UserError, with the first row
        of that name, for one that `numbers` refuses."""
        found = []
        for number, name in enumerate(self.gate_names):
            try:
                found.append(list(numbers(name)))
            except UserError as error:
                error.where = self.origin(int(np.flatnonzero(self._gate_D == number)[0]))
                raise
        self._gates_NG = np.array(found, dtype=np.int64)

    def gates(self, document: int) -> NDArray[np.int64] | None:
        """The gates of a row as `number_gates` had them, a number for each group: [G]. None before that."""
        return None if self._gates_NG is None else self._gates_NG[self._gate_D[document]]

    def holds(self, name: str) -> bool:
        """Whether it has this file."""
        return name in self._files

    @property
    def gate_groups(self) -> int:
        """G, the length of what `gates` gives; 0 where that is None."""
        return 0 if self._gates_NG is None else self._gates_NG.shape[1]

    def span(self, start: int, stop: int) -> NDArray[Any]:
        """Tokens start..stop of the stream of all documents, across shards: a copy in the store's dtype."""
        return self._span(self._shard, self.dtype, start, stop)

    def _span(self, shards: Callable[[int], _Shard], dtype: np.dtype[Any], start: int, stop: int) -> NDArray[Any]:
        assert 0 <= start <= stop <= self.tokens, f"the store has {self.tokens} tokens, not {start}..{stop}"
        found = np.empty(stop - start, dtype=dtype)
        at = start
        shard = int(np.searchsorted(self._first_token, start, side="right")) - 1
        while at < stop:
            first, last = self._first_token[shard], min(stop, int(self._first_token[shard + 1]))
            found[at - start : last - start] = shards(shard).read(at - first, last - first)
            at, shard = last, shard + 1
        return found

    def origin(self, document: int) -> str:
        """Where a document came from, for error messages: the source file and its place in it, from 1."""
        for source in self.manifest["sources"]:
            if document < source["documents"]:
                return f"{source['path']}, document {document + 1:,}"
            document -= source["documents"]
        return f"{self.path}, document {document + 1:,}"

    def verify(self, report: Callable[[int], None] | None = None) -> None:
        """Compare every file with the manifest's SHA-256; UserError names the first that differs."""
        for name, facts in self._files.items():
            if sha256_of(self.path / name, report) != facts["sha256"]:
                raise self._damaged(name, "its SHA-256 is not the manifest's")

    def require_tokenizer(self, fingerprint: str, vocabulary: int) -> None:
        """Refuse a tokenizer whose ids are not this store's."""
        if fingerprint != self.tokenizer:
            raise UserError(
                "the token store was made with another tokenizer",
                where=str(self.path),
                why=f"its fingerprint is {self.tokenizer[:12]} with {self.vocabulary:,} ids, the tokenizer's is "
                f"{fingerprint[:12]} with {vocabulary:,}: the same ids would mean other text",
                fix="prepare the text again with this tokenizer, or give the tokenizer the store was made with",
            )

    def _require_files(self) -> None:
        found = {item.name for item in self.path.iterdir() if item.suffix == ".bin" or item.name == FATES}
        for name in sorted(found.symmetric_difference(self._files)):
            raise self._damaged(name, "it is not in the manifest" if name in found else "it is missing")
        for name, facts in self._files.items():
            size = (self.path / name).stat().st_size
            if size != facts["bytes"]:
                raise self._damaged(name, f"it has {size:,} bytes, the manifest says {facts['bytes']:,}")

    def _damaged(self, name: str, why: str) -> UserError:
        return UserError(
            "the token store is damaged or was changed",
            where=str(self.path / name),
            why=why,
            fix=f"rm -r {self.path}, then prepare the text again",
        )


def sha256_of(path: Path, report: Callable[[int], None] | None = None) -> str:
    """SHA-256 of a file in blocks of 1 MiB; `report` hears the bytes of each."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(2**20):
            digest.update(block)
            if report is not None:
                report(len(block))
    return digest.hexdigest()


def is_store(path: Path) -> bool:
    return (path / MANIFEST).is_file() and (path / DOCUMENTS).is_file()


def _manifest(path: Path) -> dict[str, Any]:
    try:
        manifest = json.loads((path / MANIFEST).read_text(encoding="utf-8"))
        version = manifest["version"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(
            f"no token store at `{path}`",
            why=f"{MANIFEST} is missing or no manifest: {error}",
            fix=f"llmtrainer prepare data=TEXT tokenizer=FOLDER out={path}",
        ) from error
    if version != VERSION:
        raise UserError(
            f"the token store has format {version}, this version reads {VERSION}",
            where=str(path / MANIFEST),
            fix=f"rm -r {path}, then prepare the text again",
        )
    return dict(manifest)


class NumberFile:
    """An ascending array of int64 in a file, indexed and searched like a numpy array; memory holds one in 4,096.

    Read by position instead of mapped: a search ends anywhere, the kernel maps 64 KiB around each place it touches,
    and before long all of the file counts as this process's memory.
    """

    def __init__(self, path: Path) -> None:
        self._handle = os.open(path, os.O_RDONLY)
        weakref.finalize(self, os.close, self._handle)
        self._length = os.fstat(self._handle).st_size // 8

    def __len__(self) -> int:
        return self._length

    @overload
    def __getitem__(self, index: int) -> np.int64: ...
    @overload
    def __getitem__(self, index: slice) -> NDArray[np.int64]: ...
    def __getitem__(self, index: int | slice) -> np.int64 | NDArray[np.int64]:
        if isinstance(index, slice):
            start, stop, step = index.indices(self._length)
            assert step == 1
            return self._read(start, max(start, stop))
        index = index + self._length if index < 0 else index
        if not 0 <= index < self._length:
            raise IndexError(f"number {index:,} of {self._length:,}")
        return np.int64(self._read(index, index + 1)[0])

    def searchsorted(self, value: int, side: Literal["left", "right"] = "left") -> int:
        """Where `value` would be inserted, as numpy says it: before its equals (left) or behind them (right)."""
        block = int(np.searchsorted(self._coarse, value, side=side))
        if block == 0:
            return 0
        start = (block - 1) * _STRIDE
        return start + int(np.searchsorted(self[start : start + _STRIDE], value, side=side))

    @cached_property
    def _coarse(self) -> NDArray[np.int64]:
        return np.array([self[place] for place in range(0, self._length, _STRIDE)], dtype=np.int64)

    def _read(self, start: int, stop: int) -> NDArray[np.int64]:
        content = os.pread(self._handle, 8 * (stop - start), 8 * start)
        assert len(content) == 8 * (stop - start), "the file was cut while it was open"
        return np.frombuffer(content, dtype="<i8")


class _Shard:
    """One mapped file of ids."""

    def __init__(self, path: Path, dtype: np.dtype[Any]) -> None:
        with path.open("rb") as file:
            self._map = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
        self._ids = np.frombuffer(self._map, dtype=dtype)
        # Rows are drawn in random order: reading ahead would fetch for nothing.
        self._advise("MADV_RANDOM")

    def read(self, start: int, stop: int) -> NDArray[Any]:
        """A copy of ids start..stop."""
        found = self._ids[start:stop].copy()
        # The kernel maps up to 2 MiB around a place that is read. What was copied may stay in its cache, but shall not
        # count as this process's memory: over a large corpus that would be all there is.
        self._advise("MADV_DONTNEED")
        return found

    def _advise(self, name: str) -> None:
        if hasattr(mmap, name):
            self._map.madvise(getattr(mmap, name))
