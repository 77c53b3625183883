"""Which tokens make row r of an epoch: a function by random access, with tables on disk and none in memory."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Literal, NamedTuple

import numpy as np
from numpy.typing import NDArray

from llmtrainer.base.errors import UserError
from llmtrainer.core.randomness import derive
from llmtrainer.data.packed import DOCUMENTS, FATES, NumberFile, Store
from llmtrainer.data.permutation import hashed

Policy = Literal["stream", "split", "truncate", "sample", "whole"]
Part = Literal["train", "held_out"]

HEAD_SHARE = 0.25
"""How often policy `sample` gives the beginning of a long document instead of a random window of it."""
_SALT = np.uint64(0x68656C642D6F7574)
_BLOCK = 2**17
"""Documents looked at at a time while a table is built: some MiB, however many there are."""


class Piece(NamedTuple):
    """Tokens start..stop of one document of the store."""

    document: int
    start: int
    stop: int


@dataclass(frozen=True)
class Plan:
    """Rows of at most `sequence_length` + 1 tokens, cut from the documents of one part of a store.

    stream    one row a window of the documents laid end to end; each token is a target once, but for the first of
              all and at most `sequence_length` at the end that fill no row
    split     documents in rows of their own, long ones in several; each token but a document's first is a target
    truncate  one row a document; a long one is cut and closed by its end id
    sample    one row a document; of a long one the head (a quarter of the times) or a window drawn anew each epoch
    whole     one row a document; a long one is refused
    """

    store: Store
    sequence_length: int
    policy: Policy
    seed: int
    documents: NumberFile | None
    """Numbers of the chosen documents; None: all of them."""
    starts: NumberFile
    """Tokens (stream) or rows (else) before each chosen document, and in all: one more than documents."""

    @property
    def rows(self) -> int:
        total = int(self.starts[-1])
        return max(total - 1, 0) // self.sequence_length if self.policy == "stream" else total

    def tokens(self) -> int:
        """Tokens of the chosen documents, counted in blocks."""
        if self.documents is None or len(self.documents) == self.store.documents:
            return self.store.tokens
        return sum(map(self._tokens_in, range(0, len(self.documents), _BLOCK)))

    def tokens_per_row(self) -> float:
        """Tokens that the model reads of a row on average; where long documents are cut, at most so many."""
        if self.policy == "stream":
            return self.sequence_length
        read = self.tokens() - (len(self.starts) - 1)    # nothing is predicted from a document's last token
        return min(read / self.rows, self.sequence_length)

    def _tokens_in(self, first: int) -> int:
        assert self.documents is not None
        numbers = self.documents[first : first + _BLOCK]
        offsets = self.store.offsets[int(numbers[0]) : int(numbers[-1]) + 2]
        return int(np.diff(offsets)[numbers - numbers[0]].sum())

    def pieces(self, row: int, epoch: int) -> list[Piece]:
        """What one row is made of, in order. `epoch` matters to policy `sample` alone."""
        assert 0 <= row < self.rows, f"row {row} of {self.rows}"
        if self.policy == "stream":
            return self._window(row * self.sequence_length, (row + 1) * self.sequence_length + 1)
        chosen = int(self.starts.searchsorted(row, side="right")) - 1
        document = self._document(chosen)
        length, L = self.store.length(document), self.sequence_length
        if self.policy == "split":
            start = (row - int(self.starts[chosen])) * L
            return [Piece(document, start, min(start + L + 1, length))]
        if length <= L + 1:
            return [Piece(document, 0, length)]
        if self.policy == "truncate":
            return [Piece(document, 0, L), Piece(document, length - 1, length)]
        start = self._window_start(document, epoch, length - (L + 1))
        return [Piece(document, start, start + L + 1)]

    def _document(self, chosen: int) -> int:
        return chosen if self.documents is None else int(self.documents[chosen])

    def _window(self, start: int, stop: int) -> list[Piece]:
        first = int(self.starts.searchsorted(start, side="right")) - 1
        last = int(self.starts.searchsorted(stop, side="left"))
        pieces = []
        edges = self.starts[first : last + 1].tolist()
        for chosen, (before, after) in enumerate(pairwise(edges), first):
            if before < after:    # a document without tokens leaves no trace
                pieces.append(Piece(self._document(chosen), max(start - before, 0), min(stop, after) - before))
        return pieces

    def _window_start(self, document: int, epoch: int, last: int) -> int:
        if derive(self.seed, "head", epoch, document) < HEAD_SHARE * 2**62:
            return 0
        return 1 + derive(self.seed, "window", epoch, document) % last


def plan(
    store: Store,
    *,
    sequence_length: int,
    policy: Policy,
    seed: int,
    held_out: float = 0.0,
    part: Part = "train",
    cache: Path | None = None,
) -> Plan:
    """The plan of a part of a store. Its tables are files in `cache` (default: a hidden folder beside the store),
    built once in blocks.

    `held_out` is the share of documents kept from training, chosen by a hash of their number: the same ones in
    every run, whatever the seed. Rows of one conversation are kept together. Raises UserError if a row cannot be made.
    """
    if policy == "stream" and held_out == 0.0 and part == "train":
        return Plan(store, sequence_length, policy, seed, None, store.offsets)
    rule = _rule(store, sequence_length, policy)
    facts = [store.fingerprint, policy, sequence_length if policy in ("split", "whole") else 0, held_out, part]
    together = first_rows(store) if held_out else None
    facts += [] if together is None else ["together"]
    name = hashlib.sha256(json.dumps(facts).encode()).hexdigest()[:32]
    folder = cache if cache is not None else store.path.with_name(f".{store.path.name}.plan")
    documents, starts = folder / f"{name}.documents.bin", folder / f"{name}.starts.bin"
    if not (documents.is_file() and starts.is_file()):
        _build(store, documents, starts, rule, held_out, part, together)
    return Plan(store, sequence_length, policy, seed, NumberFile(documents), NumberFile(starts))


def is_held_out(documents: NDArray[np.int64], share: float) -> NDArray[np.bool_]:
    """Which documents, by number, are kept from training."""
    bits = hashed(documents.astype(np.uint64) ^ _SALT) >> np.uint64(11)
    return bits < np.uint64(round(share * 2**53))


Rule = Callable[[NDArray[np.int64], NDArray[np.int64]], NDArray[np.int64]]
"""(tokens of some documents, their numbers) -> what each adds to `Plan.starts`."""


def _rule(store: Store, sequence_length: int, policy: Policy) -> Rule:
    def tokens(lengths: NDArray[np.int64], numbers: NDArray[np.int64]) -> NDArray[np.int64]:
        return lengths

    def pieces(lengths: NDArray[np.int64], numbers: NDArray[np.int64]) -> NDArray[np.int64]:
        targets = np.maximum(lengths - 1, 0)
        return -(-targets // sequence_length)

    def one(lengths: NDArray[np.int64], numbers: NDArray[np.int64]) -> NDArray[np.int64]:
        return (lengths > 1).astype(np.int64)    # a lone end id has nothing to predict it from

    def whole(lengths: NDArray[np.int64], numbers: NDArray[np.int64]) -> NDArray[np.int64]:
        longest = int(lengths.argmax()) if len(lengths) else 0
        if len(lengths) and lengths[longest] > sequence_length + 1:
            raise UserError(
                f"a document of {lengths[longest]:,} tokens does not fit a row of {sequence_length:,}",
                where=store.origin(int(numbers[longest])),
                why="policy `whole` cuts nothing",
                fix=f"data.sequence_length={lengths[longest] - 1}, or data.policy=split, truncate or sample",
            )
        return one(lengths, numbers)

    return {"stream": tokens, "split": pieces, "whole": whole}.get(policy, one)


def first_rows(store: Store) -> NDArray[np.int64] | None:
    """For each row of a store of conversations the first row of its record: what is learned of one row of a
    conversation would be told in its others. None where no record became several rows."""
    if not (store.path / FATES).is_file():
        return None
    found = np.arange(store.documents)
    at = 0
    for line in (store.path / FATES).read_text(encoding="utf-8").splitlines():
        told = json.loads(line)
        rows, records = told["rows"], told["last"] - told["first"] + 1
        if rows > records and rows % records == 0:
            each = rows // records
            found[at : at + rows] = at + np.arange(rows) // each * each
        at += rows
    assert at == store.documents
    return None if (found == np.arange(store.documents)).all() else found


def _build(
    store: Store, documents: Path, starts: Path, rule: Rule, held_out: float, part: Part,
    together: NDArray[np.int64] | None,
) -> None:
    documents.parent.mkdir(parents=True, exist_ok=True)
    # Names of this process only: two ranks may build the same table at once, and either's result will do.
    growing = [path.with_name(f".{path.name}.{os.getpid()}") for path in (documents, starts)]
    total = 0
    try:
        with growing[0].open("wb") as chosen_file, growing[1].open("wb") as starts_file:
            starts_file.write(np.zeros(1, dtype="<i8").tobytes())
            for first in range(0, store.documents, _BLOCK):
                # Read, not mapped: pages of a map would count as this process's memory.
                offsets = np.fromfile(store.path / DOCUMENTS, "<i8", count=_BLOCK + 1, offset=8 * first)
                numbers = np.arange(first, first + len(offsets) - 1)
                hashed_by = numbers if together is None else together[numbers]
                kept = is_held_out(hashed_by, held_out) == (part == "held_out")
                numbers, lengths = numbers[kept], np.diff(offsets)[kept]
                added = rule(lengths, numbers)
                running = total + np.cumsum(added[added > 0])
                chosen_file.write(numbers[added > 0].astype("<i8").tobytes())
                starts_file.write(running.astype("<i8").tobytes())
                total = int(running[-1]) if len(running) else total
        for path, final in zip(growing, (documents, starts), strict=True):
            os.replace(path, final)
    finally:
        for path in growing:
            path.unlink(missing_ok=True)
