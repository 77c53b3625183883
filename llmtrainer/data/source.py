"""DiskSource: (seed, step) -> this rank's micro-batches, by random access, with nothing to save."""

from __future__ import annotations

import hashlib
import itertools
import json
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

import numpy as np

from llmtrainer.base.errors import UserError
from llmtrainer.base.units import Pace
from llmtrainer.core.batch import Batch
from llmtrainer.core.share import Share
from llmtrainer.data.collate import Row, collate, filler
from llmtrainer.data.critical import Critical
from llmtrainer.data.draws import Draws
from llmtrainer.data.packed import Store
from llmtrainer.data.plan import Part, Policy, plan
from llmtrainer.data.read_ahead import ReadAhead


class DiskSource:
    """Rows of a token store as a function of (seed, step).

    Step n owns draws n*R .. (n+1)*R - 1, R = `rows_per_step`; draw d is row `order(d mod P)` of epoch d div P, P the
    rows of an epoch, in an order of that epoch alone. Rank r of W takes places r, r + W, ... of the step, and worker
    w of a rank every `workers`-th of those; `tokens_per_batch` cuts them into micro-batches, as many on every rank.
    So the rows of a step depend on neither ranks nor micro-batches, and to resume at step n is to ask for step n.
    """

    def __init__(
        self,
        store: Store,
        *,
        sequence_length: int,
        rows_per_step: int,
        tokens_per_batch: int,
        seed: int,
        documents: Literal["isolated", "flowing"] = "isolated",
        policy: Policy = "stream",
        held_out: float = 0.0,
        part: Part = "train",
        shuffle: bool = True,
        rank: int = 0,
        world_size: int = 1,
        share: Share | None = None,
        worker: int = 0,
        workers: int = 1,
        cache: Path | None = None,
        prefetch: bool = True,
        critical: Critical | None = None,
    ) -> None:
        """`share` stands in place of rank and world size. `cache` is the folder of the plan's tables. Raises UserError
        if no row can be made of the data."""
        assert 0 <= rank < world_size and 0 <= worker < workers
        _require_sizes(sequence_length, rows_per_step, tokens_per_batch, held_out, part)
        self.store = store
        self.sequence_length, self.rows_per_step, self.documents = sequence_length, rows_per_step, documents
        self.rows_per_batch = tokens_per_batch // sequence_length
        self._share = share or Share((rank,), world_size)
        self._worker, self._workers, self._critical = worker, workers, critical
        self._plan = plan(
            store, sequence_length=sequence_length, policy=policy, seed=seed,
            held_out=held_out, part=part, cache=cache,
        )
        self.rows_per_epoch = self._plan.rows
        if self.rows_per_epoch == 0:
            raise _too_small(store, sequence_length, policy, held_out, part)
        facts = [store.fingerprint, sequence_length, rows_per_step, seed, documents, policy, held_out, part, shuffle]
        facts += [] if critical is None else [critical.facts]
        self.fingerprint: str = hashlib.sha256(json.dumps(facts).encode()).hexdigest()
        """SHA-256 of the store and of every setting that decides the rows of a step."""
        self._draws = Draws(self.rows_per_epoch, rows_per_step, seed, shuffle)
        self._ahead = ReadAhead(self._batches, prefetch)

    @property
    def steps_per_epoch(self) -> float:
        return self._draws.steps_per_epoch

    @property
    def pace(self) -> Pace:
        """What a step is of an epoch, and how many tokens it reads on average."""
        return self._draws.pace(self._plan.tokens_per_row())

    def epochs(self, step: int) -> float:
        """Passes over the data after so many steps."""
        return self._draws.epochs(step)

    def batches(self, step: int) -> list[Batch]:
        """This rank's micro-batches of a step; the next step's are made ready on a thread."""
        return self._ahead(step)

    def draws(self, step: int) -> list[tuple[int, int]]:
        """(epoch, row of the plan) at each place of a step, of all ranks."""
        return self._draws.of_step(step)

    def places(self) -> range:
        """The places of a step that are this rank's (and worker's), where it has one part of it."""
        (part,) = self._share.mine
        return self._places(part)

    def row(self, step: int, place: int) -> dict[str, list[Any]]:
        """One row as the model sees it, see `Row.shown`."""
        return self._row(place, *self.draws(step)[place]).shown()

    def close(self) -> None:
        """End the thread that reads ahead."""
        self._ahead.close()

    def _batches(self, step: int) -> list[Batch]:
        draws = self.draws(step)
        return [replace(batch, shard=part) for part in self._share.mine for batch in self._part(draws, part)]

    def _part(self, draws: list[tuple[int, int]], part: int) -> list[Batch]:
        places = self._places(part) if part < self._share.of else range(0)
        rows = [self._row(place, *draws[place]) for place in places]
        batches = -(-len(self._places(0, worker=0)) // self.rows_per_batch)    # of the part that has the most rows
        cuts = [len(rows) * index // batches for index in range(batches + 1)]
        return [
            # Every rank joins every collective: one that has run out of rows gets a row of padding.
            collate(rows[start:stop] or [filler(self.rows_per_step + part)])
            for start, stop in itertools.pairwise(cuts)
        ]

    def _places(self, part: int, worker: int | None = None) -> range:
        first = part + self._share.of * (self._worker if worker is None else worker)
        return range(first, self.rows_per_step, self._share.of * self._workers)

    def _row(self, place: int, epoch: int, row: int) -> Row:
        pieces = self._plan.pieces(row, epoch)
        tokens = np.concatenate([self.store.read(*piece) for piece in pieces])
        document = np.zeros(len(tokens), dtype=np.int32)
        if self.documents == "isolated" and len(pieces) > 1:
            numbers = np.array([piece.document for piece in pieces])
            lengths = [piece.stop - piece.start for piece in pieces]
            ranks = np.concatenate([[0], np.cumsum(numbers[1:] != numbers[:-1])])
            document = np.repeat(ranks, lengths).astype(np.int32)
        return Row(tokens, document, place, None if self._critical is None else self._critical.counts(tokens, None))


def _require_sizes(sequence_length: int, rows: int, tokens_per_batch: int, held_out: float, part: Part) -> None:
    if sequence_length < 1 or rows < 1:
        raise UserError(
            f"a step of {rows} rows of {sequence_length} tokens holds nothing",
            fix="data.sequence_length and the rows of a step are 1 at least",
        )
    if tokens_per_batch < sequence_length:
        raise UserError(
            f"a row of {sequence_length:,} tokens does not fit a micro-batch of {tokens_per_batch:,}",
            why="a row is never cut by the memory knob: what is trained would depend on the machine",
            fix=f"data.tokens_per_batch={sequence_length}, or a smaller data.sequence_length",
        )
    if not 0.0 <= held_out < 1.0 or (part == "held_out" and held_out == 0.0):
        raise UserError(
            f"data.held_out is {held_out}",
            why="it is the share of documents kept from training, at least 0 and below 1"
            + (", and documents of the held-out part were asked for" if part == "held_out" else ""),
            fix="data.held_out=0.01",
        )


def _too_small(store: Store, sequence_length: int, policy: Policy, held_out: float, part: Part) -> UserError:
    share = f" of which {held_out:.2%} are held out" if held_out else ""
    return UserError(
        f"the data makes no row of {sequence_length:,} tokens (part `{part}`)",
        where=str(store.path),
        why=f"the store has {store.documents:,} documents and {store.tokens:,} tokens{share}; a row takes "
        f"{sequence_length + 1:,} tokens of the stream"
        if policy == "stream"
        else f"the store has {store.documents:,} documents{share}, none of them with a token to predict",
        fix="more text, a smaller data.sequence_length, data.policy=split, or another data.held_out",
    )
