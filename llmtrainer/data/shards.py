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
from llmtrainer.data.packed import DOCUMENTS, MANIFEST, VERSION, sha256_of, shard_name

_JOURNAL, _GROWING = "journal.jsonl", ".growing"


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
    """

    def __init__(self, partial: Path, *, key: str, dtype: np.dtype[Any], shard_tokens: int) -> None:
        assert shard_tokens > 0
        self.partial, self.dtype, self.shard_tokens = partial, dtype, shard_tokens
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
        ids = ids.astype(self.dtype, copy=False)
        while len(lengths):
            ends = np.cumsum(lengths)
            room = self.shard_tokens - self._shard_count
            n = min(int(np.searchsorted(ends, room)) + 1, len(lengths))
            tokens = int(ends[n - 1])
            self._write(ids[:tokens])
            self._offsets.write((self.tokens + ends[:n]).astype("<i8").tobytes())
            for source, documents in zip(*np.unique(sources[:n], return_counts=True), strict=True):
                self._of_source[int(source)] = self._of_source.get(int(source), 0) + int(documents)
            self._shard_count += tokens
            self._shard_bytes += int(sizes[:n].sum())
            self.tokens += tokens
            self.documents += n
            if self._shard_count >= self.shard_tokens:
                self._close_shard()
                self._open_shard()
            ids, lengths, sources, sizes = ids[tokens:], lengths[n:], sources[n:], sizes[n:]

    def finish(self, facts: Mapping[str, Any], sources: Sequence[Mapping[str, Any]]) -> None:
        """Close the last shard and write the manifest: `facts` of the tokenizer, and each source with its counts."""
        if self._shard_count:
            self._close_shard()
        self._close_files()
        counts = self.counts(len(sources))
        size = self.dtype.itemsize
        shards = {
            shard_name(index): {"bytes": line["tokens"] * size, "sha256": line["sha256"]}
            for index, line in enumerate(self.closed)
        }
        offsets = {"bytes": 8 * (self.documents + 1), "sha256": sha256_of(self.partial / DOCUMENTS)}
        manifest = {
            "version": VERSION,
            "dtype": self.dtype.str,
            **facts,
            "documents": self.documents,
            "tokens": self.tokens,
            "text_bytes": self.text_bytes,
            "sources": [{**source, "documents": n} for source, n in zip(sources, counts, strict=True)],
            "files": {**shards, DOCUMENTS: offsets},
        }
        growing = self.partial / _GROWING
        with growing.open("w", encoding="utf-8") as file:
            json.dump(manifest, file, indent=1, ensure_ascii=False)
            file.write("\n")
            _sync(file.fileno())
        os.replace(growing, self.partial / MANIFEST)
        sync_folder(self.partial)

    def abandon(self) -> None:
        """Let go of the files. What is closed counts; the open shard will be written again."""
        self._close_files()

    def _open_shard(self) -> None:
        self._shard = (self.partial / _GROWING).open("wb")
        self._digest = hashlib.sha256()
        self._shard_count = self._shard_bytes = 0
        self._of_source: dict[int, int] = {}

    def _write(self, ids: NDArray[Any]) -> None:
        content = ids.tobytes()
        self._shard.write(content)
        self._digest.update(content)

    def _close_shard(self) -> None:
        self._shard.flush()
        _sync(self._shard.fileno())
        self._shard.close()
        os.replace(self.partial / _GROWING, self.partial / shard_name(len(self.closed)))
        self._offsets.flush()
        _sync(self._offsets.fileno())
        sync_folder(self.partial)
        line = {
            "tokens": self._shard_count,
            "documents": sum(self._of_source.values()),
            "text_bytes": self._shard_bytes,
            "sha256": self._digest.hexdigest(),
            "sources": sorted(self._of_source.items()),
        }
        # Only now does the shard count: what this line vouches for is on the disk before it.
        self._journal.write(json.dumps(line).encode() + b"\n")
        self._journal.flush()
        _sync(self._journal.fileno())
        self.closed.append(line)
        self.text_bytes += self._shard_bytes

    def _close_files(self) -> None:
        for file in (self._shard, self._offsets, self._journal):
            file.close()


def publish(partial: Path, out: Path) -> None:
    """Give a finished store its final name: from one moment to the next it exists, whole."""
    for name in (_JOURNAL, _GROWING):
        (partial / name).unlink(missing_ok=True)
    sync_folder(partial)
    partial.rename(out)
    sync_folder(out.parent)


def _sync(handle: int) -> None:
    os.fsync(handle)


def _start(partial: Path, key: str) -> None:
    for item in partial.iterdir():
        if item.name in (_JOURNAL, _GROWING, MANIFEST, DOCUMENTS) or item.match("tokens-*.bin"):
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
    sizes.append((partial / DOCUMENTS, 8 * (1 + sum(line["documents"] for line in lines))))
    for path, size in sizes:
        if not path.is_file() or path.stat().st_size < size:
            return None
    # A torn last line would join with the next one appended.
    os.truncate(partial / _JOURNAL, len(whole) + 1)
    return lines
