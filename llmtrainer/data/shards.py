"""Write a token store so that it can be killed at any moment and end with the same bytes."""

from __future__ import annotations

import fcntl
import hashlib
import json
import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from llmtrainer.base.errors import UserError
from llmtrainer.base.rundir import sync_folder
from llmtrainer.data.packed import (
    COMPARISONS,
    DOCUMENTS,
    FATES,
    GATES,
    GRADES,
    LIKED,
    MANIFEST,
    MARGINS,
    OF_COMPARISONS,
    PAIRED,
    SHARED,
    VERSION,
    Compared,
    sha256_of,
    shard_name,
    weights_name,
)

_JOURNAL, _GROWING, _GROWING_WEIGHTS = "journal.jsonl", ".growing", ".growing-weights"
_SWITCH, _FLOAT = np.dtype("|u1"), np.dtype("<f4")
"""What weights are stored as: one byte while all are 0 or 1, else numbers."""
_BLOCK = 2**20


def partial_of(out: Path) -> Path:
    """Where a store lies until it is whole: hidden, beside its final place, so that a rename publishes it."""
    return out.with_name(f".{out.name}.partial")


@contextmanager
def locked(partial: Path) -> Iterator[None]:
    """Own a partial store until the block ends. The kernel drops the lock with the process, so kill -9 frees it."""
    partial.mkdir(parents=True, exist_ok=True)
    handle = os.open(partial, os.O_RDONLY)
    try:
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise UserError(
                "another process is writing this token store",
                where=str(partial),
                why="two writers would mix their shards",
                fix="wait for it, or write to another folder",
            ) from None
        yield
    finally:
        os.close(handle)


class ShardWriter:
    """Appends documents to a partial store; a closed shard is on the disk for good, an open one never counts.

    The journal says what counts: its first line what the store is made of (`key`), each further line a closed
    shard. A new writer with the same key goes on behind the last line; with another key it begins anew. A shard is
    closed by the document that fills it, so its borders depend on neither batches nor workers nor interruptions.
    With `weighted` each token has a weight, in files of their own.
    """

    def __init__(
        self, partial: Path, *, key: str, dtype: np.dtype[Any], shard_tokens: int, weighted: bool = False
    ) -> None:
        assert shard_tokens > 0
        self.partial, self.dtype, self.shard_tokens, self.weighted = partial, dtype, shard_tokens, weighted
        closed = _closed_shards(partial, key, dtype.itemsize)
        if closed is None:
            _start(partial, key)
        self.closed = closed or []
        """The journal's line of each closed shard."""
        self.documents = sum(line["documents"] for line in self.closed)
        self.tokens = sum(line["tokens"] for line in self.closed)
        self.text_bytes = sum(line["text_bytes"] for line in self.closed)
        os.truncate(partial / DOCUMENTS, 8 * (self.documents + 1))
        self._offsets = (partial / DOCUMENTS).open("ab")
        self._journal = (partial / _JOURNAL).open("ab")
        self._open_shard()

    def counts(self, sources: int) -> list[int]:
        """Documents stored so far of each source file."""
        counts = [0] * sources
        for line in self.closed:
            for source, documents in line["sources"]:
                counts[source] += documents
        return counts

    def append(
        self, ids: NDArray[Any], lengths: NDArray[np.int64], sources: NDArray[np.int64], sizes: NDArray[np.int64]
    ) -> None:
        """Add documents: ids of all of them, and per document its tokens, its source's number, its UTF-8 bytes."""
        while len(lengths):
            ends = np.cumsum(lengths)
            n = min(int(np.searchsorted(ends, self.room)) + 1, len(lengths))
            tokens = int(ends[n - 1])
            self.add(ids[:tokens], lengths[:n], sources[:n], sizes[:n])
            ids, lengths, sources, sizes = ids[tokens:], lengths[n:], sources[n:], sizes[n:]

    @property
    def room(self) -> int:
        """Tokens that fill the open shard."""
        return self.shard_tokens - self._shard_count

    def add(
        self, ids: NDArray[Any], lengths: NDArray[np.int64], sources: NDArray[np.int64], sizes: NDArray[np.int64],
        weights: NDArray[np.float32] | None = None, notes: Sequence[Any] = (), gates: Sequence[str] = (),
        compared: Sequence[Compared] = (),
    ) -> None:  # fmt: skip
        """Add documents that are not to be torn apart to the open shard, and close it if they fill it. `notes` are
        written into the journal with the shard: what the writer of the documents must know to go on behind them.
        `gates`: what each document calls the adapters that it goes through, of all documents or of none. `compared`:
        the comparisons that the documents are the answers of, of all documents or of none."""
        assert (weights is not None) == self.weighted and (weights is None or len(weights) == len(ids))
        assert len(gates) in (0, len(lengths))
        assert not compared or sum(item.documents for item in compared) == len(lengths)
        self._gates += gates
        self._compared += compared
        self._write(ids.astype(self.dtype, copy=False))
        if weights is not None:
            self._shard_weights.write(weights.astype(_FLOAT, copy=False).tobytes())
            self._fractions |= bool(((weights != 0.0) & (weights != 1.0)).any())
        self._offsets.write((self.tokens + np.cumsum(lengths)).astype("<i8").tobytes())
        for source, documents in zip(*np.unique(sources, return_counts=True), strict=True):
            self._of_source[int(source)] = self._of_source.get(int(source), 0) + int(documents)
        self._notes += notes
        self._shard_count += len(ids)
        self._shard_bytes += int(sizes.sum())
        self.tokens += len(ids)
        self.documents += len(lengths)
        if self._shard_count >= self.shard_tokens:
            self._close_shard()
            self._open_shard()

    @property
    def notes(self) -> list[Any]:
        """The notes of everything added so far, those of an earlier try included."""
        return [note for line in self.closed for note in line.get("notes", ())] + self._notes

    def finish(
        self, facts: Mapping[str, Any], sources: Sequence[Mapping[str, Any]], fates: Sequence[Mapping[str, Any]] = ()
    ) -> None:
        """Close the last shard and write the manifest: `facts` of the tokenizer, and each source with its counts.
        `fates` become a file of their own, one a line."""
        if self._shard_count or self._notes:
            self._close_shard()
        self._close_files()
        counts = self.counts(len(sources))
        size = self.dtype.itemsize
        shards = {
            shard_name(index): {"bytes": line["tokens"] * size, "sha256": line["sha256"]}
            for index, line in enumerate(self.closed)
        }
        weights, kept = self._finish_weights(), self._finish_fates(fates)
        gates = [gate for line in self.closed for gate in line.get("gates", ())]
        names = sorted(set(gates))
        kept |= self._finish_gates(gates, names)
        compared = [Compared(*item) for line in self.closed for item in line.get("compared", ())]
        kept |= self._finish_compared(compared)
        offsets = {"bytes": 8 * (self.documents + 1), "sha256": sha256_of(self.partial / DOCUMENTS)}
        manifest = {
            "version": VERSION,
            "dtype": self.dtype.str,
            **({"weights": self._weight_type.str} if self.weighted else {}),
            **({"gates": names} if names else {}),
            **({"comparisons": len(compared)} if compared else {}),
            **facts,
            "documents": self.documents,
            "tokens": self.tokens,
            "text_bytes": self.text_bytes,
            "sources": [{**source, "documents": n} for source, n in zip(sources, counts, strict=True)],
            "files": {**shards, **weights, DOCUMENTS: offsets, **kept},
        }
        growing = self.partial / _GROWING
        with growing.open("w", encoding="utf-8") as file:
            json.dump(manifest, file, indent=1, ensure_ascii=False)
            file.write("\n")
            _sync(file.fileno())
        os.replace(growing, self.partial / MANIFEST)
        sync_folder(self.partial)

    @property
    def _weight_type(self) -> np.dtype[Any]:
        return _FLOAT if any(line["fractions"] for line in self.closed) else _SWITCH

    def _finish_weights(self) -> dict[str, dict[str, Any]]:
        """All files of weights in one type, each with what the manifest says of it."""
        found = {}
        for index, line in enumerate(self.closed if self.weighted else ()):
            path, dtype = self.partial / weights_name(index), self._weight_type
            # A shard may have been widened by a try that was killed before its end.
            is_switch = path.stat().st_size == line["tokens"]
            if is_switch and dtype == _FLOAT:
                _retype(path, self.partial / _GROWING_WEIGHTS, _SWITCH, _FLOAT)
                os.replace(self.partial / _GROWING_WEIGHTS, path)
            found[path.name] = {"bytes": line["tokens"] * dtype.itemsize, "sha256": sha256_of(path)}
        return found

    def _finish_fates(self, fates: Sequence[Mapping[str, Any]]) -> dict[str, dict[str, Any]]:
        if not fates:
            return {}
        return self._finish_file(FATES, "".join(json.dumps(fate, ensure_ascii=False) + "\n" for fate in fates).encode())

    def _finish_gates(self, gates: Sequence[str], names: Sequence[str]) -> dict[str, dict[str, Any]]:
        """The number of each document's name among all of them."""
        if not names:
            return {}
        assert len(gates) == self.documents
        places = {name: place for place, name in enumerate(names)}
        return self._finish_file(GATES, np.array([places[gate] for gate in gates], dtype="<i4").tobytes())

    def _finish_compared(self, compared: Sequence[Compared]) -> dict[str, dict[str, Any]]:
        """Where each comparison begins, what its answers share, and, where any says so, its label, margin or grade."""
        if not compared:
            return {}
        ends = np.cumsum([0, *(item.documents for item in compared)])
        assert ends[-1] == self.documents, "some documents belong to no comparison"
        held = {COMPARISONS: ends.astype("<i8"), SHARED: np.array([item.shared for item in compared], dtype="<i4")}
        if any(item.liked is not None for item in compared):
            assert all(item.liked is not None for item in compared), "some compare, and some are liked or not"
            held[LIKED] = np.array([item.liked for item in compared], dtype="|u1")
        if any(item.margin is not None for item in compared):
            held[MARGINS] = np.array([item.margin or 0.0 for item in compared], dtype="<f4")
        if any(item.low is not None for item in compared):
            assert all(item.low is not None for item in compared), "some are graded, and some are not"
            held[GRADES] = np.array([(item.low, item.high) for item in compared], dtype="<i4")
        if any(item.paired for item in compared):
            held[PAIRED] = np.array([item.paired for item in compared], dtype="|u1")
        found: dict[str, dict[str, Any]] = {}
        for name, numbers in held.items():
            found |= self._finish_file(name, numbers.tobytes())
        return found

    def _finish_file(self, name: str, content: bytes) -> dict[str, dict[str, Any]]:
        with (self.partial / name).open("wb") as file:
            file.write(content)
            file.flush()
            _sync(file.fileno())
        return {name: {"bytes": len(content), "sha256": hashlib.sha256(content).hexdigest()}}

    def abandon(self) -> None:
        """Let go of the files. What is closed counts; the open shard will be written again."""
        self._close_files()

    def _open_shard(self) -> None:
        self._shard = (self.partial / _GROWING).open("wb")
        self._digest = hashlib.sha256()
        self._shard_count = self._shard_bytes = 0
        self._of_source: dict[int, int] = {}
        self._notes: list[Any] = []
        self._gates: list[str] = []
        self._compared: list[Compared] = []
        if self.weighted:
            self._shard_weights = (self.partial / _GROWING_WEIGHTS).open("wb")
            self._fractions = False

    def _write(self, ids: NDArray[Any]) -> None:
        content = ids.tobytes()
        self._shard.write(content)
        self._digest.update(content)

    def _close_shard(self) -> None:
        self._shard.flush()
        _sync(self._shard.fileno())
        self._shard.close()
        os.replace(self.partial / _GROWING, self.partial / shard_name(len(self.closed)))
        if self.weighted:
            self._close_weights()
        self._offsets.flush()
        _sync(self._offsets.fileno())
        sync_folder(self.partial)
        line = {
            "tokens": self._shard_count,
            "documents": sum(self._of_source.values()),
            "text_bytes": self._shard_bytes,
            "sha256": self._digest.hexdigest(),
            "sources": sorted(self._of_source.items()),
            **({"fractions": self._fractions, "notes": self._notes} if self.weighted else {}),
            **({"gates": self._gates} if self._gates else {}),
            **({"compared": self._compared} if self._compared else {}),
        }
        # Only now does the shard count: what this line vouches for is on the disk before it.
        self._journal.write(json.dumps(line).encode() + b"\n")
        self._journal.flush()
        _sync(self._journal.fileno())
        self.closed.append(line)
        self.text_bytes += self._shard_bytes
        self._notes, self._shard_count = [], 0

    def _close_weights(self) -> None:
        self._shard_weights.close()
        growing, path = self.partial / _GROWING_WEIGHTS, self.partial / weights_name(len(self.closed))
        _retype(growing, path, _FLOAT, _FLOAT if self._fractions else _SWITCH)
        growing.unlink()

    def _close_files(self) -> None:
        weights = (self._shard_weights,) if self.weighted else ()
        for file in (self._shard, self._offsets, self._journal, *weights):
            file.close()


def publish(partial: Path, out: Path) -> None:
    """Give a finished store its final name: from one moment to the next it exists, whole."""
    for name in (_JOURNAL, _GROWING, _GROWING_WEIGHTS):
        (partial / name).unlink(missing_ok=True)
    sync_folder(partial)
    partial.rename(out)
    sync_folder(out.parent)


def _sync(handle: int) -> None:
    os.fsync(handle)


def _retype(source: Path, target: Path, old: np.dtype[Any], new: np.dtype[Any]) -> None:
    """Copy a file of weights into another type, safe on the disk."""
    with source.open("rb") as read, target.open("wb") as written:
        while block := read.read(_BLOCK * old.itemsize):
            written.write(np.frombuffer(block, old).astype(new).tobytes())
        written.flush()
        _sync(written.fileno())


def _start(partial: Path, key: str) -> None:
    for item in partial.iterdir():
        known = (_JOURNAL, _GROWING, _GROWING_WEIGHTS, MANIFEST, DOCUMENTS, FATES, GATES, *OF_COMPARISONS)
        if item.name in known or item.match("tokens-*.bin") or item.match("weights-*.bin"):
            item.unlink()
    (partial / DOCUMENTS).write_bytes(np.zeros(1, dtype="<i8").tobytes())
    with (partial / _JOURNAL).open("wb") as file:
        file.write(json.dumps({"key": key}).encode() + b"\n")
        file.flush()
        _sync(file.fileno())
    sync_folder(partial)


def _closed_shards(partial: Path, key: str, itemsize: int) -> list[dict[str, Any]] | None:
    """The journal's shards if it was begun with this key and its files are there, else None."""
    try:
        whole, _, _ = (partial / _JOURNAL).read_bytes().rpartition(b"\n")    # a killed writer may leave half a line
        head, *lines = [json.loads(line) for line in whole.split(b"\n")]
    except (OSError, ValueError):
        return None
    if head != {"key": key}:
        return None
    sizes = [((partial / shard_name(index)), line["tokens"] * itemsize) for index, line in enumerate(lines)]
    sizes += [(partial / weights_name(index), line["tokens"]) for index, line in enumerate(lines) if "notes" in line]
    sizes.append((partial / DOCUMENTS, 8 * (1 + sum(line["documents"] for line in lines))))
    for path, size in sizes:
        if not path.is_file() or path.stat().st_size < size:
            return None
    # A torn last line would join with the next one appended.
    os.truncate(partial / _JOURNAL, len(whole) + 1)
    return lines
