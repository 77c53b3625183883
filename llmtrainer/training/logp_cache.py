"""What a frozen model said of rows, kept by their content: whatever their order, number or epoch, it is found again."""

from __future__ import annotations

import fcntl
import hashlib
import json
import os
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file

from llmtrainer.base.rundir import sync_folder
from llmtrainer.core.batch import GATES, Batch
from llmtrainer.data.packed import sha256_of

Said = Mapping[str, NDArray[Any]]
"""By the name of a signal, an entry for each target of a row that counts, in order: [n] or [n, K]."""
KEY_BYTES = 16
SHARD_BYTES = 64 * 2**20
SECONDS_BETWEEN_SHARDS = 60.0
"""What a killed process loses at most."""
SUFFIX = ".safetensors"
_KEYS, _OFFSETS = "keys", "offsets"


def key_of(tokens: NDArray[Any], weights: NDArray[Any] | None, gates: NDArray[Any] | None = None) -> bytes | None:
    """What a row is known by: its ids up to the last target that counts, which of them count, and its gates.

    tokens [n + 1]; weights: how much each counts as a target, [n + 1], None: all; None for a row of no targets.
    """
    counts = np.ones(len(tokens), dtype=bool) if weights is None else np.asarray(weights) > 0
    targets = np.flatnonzero(counts[1:]) + 1
    if not len(targets):
        return None
    last = int(targets[-1])
    digest = hashlib.blake2b(digest_size=KEY_BYTES)
    digest.update(np.asarray(tokens[: last + 1], dtype="<i8").tobytes())
    digest.update(counts[1 : last + 1].astype(np.uint8).tobytes())
    digest.update(b"" if gates is None else np.asarray(gates, dtype="<i8").tobytes())
    return digest.digest()


def keys_of(batch: Batch) -> list[bytes | None]:
    """The key of each trained sequence of a batch, the same whether it has its prompt to itself or shares it."""
    tokens, targets, weights, document, sequence = (
        value.cpu().numpy()
        for value in (batch.tokens_BT, batch.targets_BT, batch.weights_BT, batch.document_BT, batch.sequence_BT)
    )
    gates = batch.signals[GATES].cpu().numpy() if GATES in batch.signals else None
    found: list[bytes | None] = []
    for number in range(batch.sequences):
        row, columns = np.nonzero(sequence == number)
        b, first = int(row[0]), int(columns[0])
        shared = np.flatnonzero((document[b] == document[b, first]) & (sequence[b] == -1))
        read = np.concatenate([shared, columns])
        counts = np.concatenate([np.zeros(1 + len(shared)), weights[b, columns]])
        last = int(np.flatnonzero(counts > 0)[-1]) if (counts > 0).any() else 0
        # The last target itself need not be read by anybody: it is known from what stands before it.
        whole = np.append(tokens[b, read[:last]], targets[b, read[last - 1]])
        found.append(key_of(whole, counts[: last + 1], None if gates is None else gates[b, first]))
    return found


class LogpCache:
    """A folder of shards, each written whole, named by its own SHA-256 and never changed.

    Shards are mapped, not loaded; in memory are some bytes for each row. One process fills a folder at a time, the
    others wait for it; anyone may read.
    """

    def __init__(self, folder: Path, facts: Mapping[str, Any], shard_bytes: int = SHARD_BYTES) -> None:
        """facts: whose words these are and how they were worked out; written beside them for people."""
        self.folder, self._facts, self._shard_bytes = folder, facts, shard_bytes
        self.damaged: list[str] = []
        """Shards that were found damaged and removed."""
        self._shards: list[_Shard] = []
        self._names: set[str] = set()
        self._places: dict[bytes, tuple[int, int]] = {}
        self._fresh: dict[bytes, Said] = {}
        self._bytes, self._written = 0, time.monotonic()
        self._open_shards()

    def __contains__(self, key: bytes) -> bool:
        return key in self._places or key in self._fresh

    def __len__(self) -> int:
        return len(self._places) + len(self._fresh)

    def __getitem__(self, key: bytes) -> Said:
        """What was said of the row with this key. KeyError where nothing was."""
        if key in self._fresh:
            return self._fresh[key]
        shard, row = self._places[key]
        return self._shards[shard].read(row)

    def nothing(self) -> Said:
        """What is said of a row without targets: the same names and types, of length 0."""
        return {name: value[:0] for name, value in self[next(iter(self._places))].items()}

    @contextmanager
    def filling(self, alone: bool = True) -> Iterator[None]:
        """Be the one who adds; what was added is on disk at the end, however the block ends. alone: False for a
        process whose job another one of its processes answers for."""
        self.folder.mkdir(parents=True, exist_ok=True)
        if not alone:
            self._open_shards()
            try:
                yield
            finally:
                self.flush()
            return
        with (self.folder / ".lock").open("w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            for left in self.folder.glob(".partial-*"):
                left.unlink()
            (self.folder / "about.json").write_text(json.dumps(self._facts, indent=2) + "\n", encoding="utf-8")
            self._open_shards()      # somebody else may have filled it meanwhile
            self._written = time.monotonic()
            try:
                yield
            finally:
                self.flush()

    def add(self, key: bytes, said: Said) -> None:
        """Keep what is said of a row, within `filling`."""
        self._fresh[key] = said
        self._bytes += sum(value.nbytes for value in said.values())
        if self._bytes >= self._shard_bytes or time.monotonic() - self._written > SECONDS_BETWEEN_SHARDS:
            self.flush()

    def look_again(self) -> None:
        """Find what others have written."""
        self._open_shards()

    def flush(self) -> None:
        """Put what was added on disk."""
        self._written = time.monotonic()
        if not self._fresh:
            return
        rows = list(self._fresh.values())
        tensors = {name: np.concatenate([row[name] for row in rows]) for name in rows[0]}
        lengths = [len(next(iter(row.values()))) for row in rows]
        tensors[_OFFSETS] = np.concatenate([[0], np.cumsum(lengths)]).astype(np.int64)
        tensors[_KEYS] = np.frombuffer(b"".join(self._fresh), dtype=np.uint8).reshape(-1, KEY_BYTES)
        aside = self.folder / f".partial-{os.getpid()}"
        save_file(tensors, aside)
        with aside.open("rb") as handle:
            os.fsync(handle.fileno())
        path = aside.rename(self.folder / (sha256_of(aside) + SUFFIX))
        sync_folder(self.folder)
        self._fresh, self._bytes = {}, 0
        self._open(path)    # and nothing that others write meanwhile: what is known decides how rows are cut

    def _open_shards(self) -> None:
        """Open what is new in the folder. A shard that is not what its name says is taken away."""
        for path in sorted(self.folder.glob(f"[!.]*{SUFFIX}")):
            self._open(path)

    def _open(self, path: Path) -> None:
        if path.name in self._names:
            return
        shard = _Shard.opened(path)
        if shard is None:
            path.unlink(missing_ok=True)
            self.damaged.append(path.name)
            return
        self._names.add(path.name)
        self._places |= {key: (len(self._shards), row) for row, key in enumerate(shard.keys)}
        self._shards.append(shard)


class _Shard:
    """One mapped file."""

    def __init__(self, file: Any) -> None:
        self.keys = [row.tobytes() for row in file.get_tensor(_KEYS)]
        self._offsets = file.get_tensor(_OFFSETS)
        names = set(file.keys()) - {_KEYS, _OFFSETS}
        self._slices = {name: file.get_slice(name) for name in sorted(names)}
        self._file = file

    @classmethod
    def opened(cls, path: Path) -> _Shard | None:
        """None where the file is not the one that was written."""
        try:
            if sha256_of(path) != path.stem:
                return None
            return cls(safe_open(path, framework="numpy"))
        except (OSError, SafetensorError):
            return None

    def read(self, row: int) -> Said:
        start, stop = int(self._offsets[row]), int(self._offsets[row + 1])
        return {name: values[start:stop] for name, values in self._slices.items()}


def said_of(cache: LogpCache, keys: Sequence[bytes | None]) -> list[Said]:
    """What was said of each row. KeyError for a row of which nothing was."""
    return [cache.nothing() if key is None else cache[key] for key in keys]
