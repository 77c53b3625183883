"""BudgetSource: (seed, step) -> this rank's micro-batches of whole sequences, packed without padding."""

from __future__ import annotations

import hashlib
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from llmtrainer.base.errors import UserError
from llmtrainer.base.units import Pace
from llmtrainer.core.batch import Batch
from llmtrainer.core.share import Share
from llmtrainer.data.budget import PAIR_COST, Numbers, cut_step
from llmtrainer.data.collate import Row, collate, end_to_end, filler
from llmtrainer.data.critical import Critical
from llmtrainer.data.draws import Draws
from llmtrainer.data.packed import Store
from llmtrainer.data.plan import Part, plan
from llmtrainer.data.read_ahead import ReadAhead


class BudgetSource:
    """Sequences of a token store, one a document, as a function of (seed, step).

    Step n owns draws n*R .. (n+1)*R - 1, R = `sequences_per_step`; draw d is sequence `order(d mod P)` of epoch
    d div P, P the sequences of an epoch, in an order of that epoch alone. Only then are the sequences of the step
    cut: into micro-batches of at most `tokens_per_batch` tokens, each one row without padding, as many on every
    rank and about the same work. So what a step learns from depends on neither ranks nor micro-batches, and to
    resume at step n is to ask for step n.
    """

    def __init__(
        self,
        store: Store,
        *,
        sequence_length: int,
        sequences_per_step: int | None = None,
        tokens_per_step: int | None = None,
        tokens_per_batch: int,
        seed: int,
        held_out: float = 0.0,
        part: Part = "train",
        shuffle: bool = True,
        rank: int = 0,
        world_size: int = 1,
        share: Share | None = None,
        cache: Path | None = None,
        prefetch: bool = True,
        pair_cost: float = PAIR_COST,
        longer_alone: bool = False,
        critical: Critical | None = None,
    ) -> None:
        """`tokens_per_step` is what a step reads on average: it becomes the nearest number of sequences, the same in
        every step. `share` stands in place of rank and world size. `cache` is the folder of the plan's tables. Raises
        UserError where a document is longer than `sequence_length` or there is none. `longer_alone`: a document may be
        longer than `tokens_per_batch`, and is then a micro-batch of its own."""
        assert 0 <= rank < world_size
        assert (sequences_per_step is None) != (tokens_per_step is None), "one of the two says how large a step is"
        most = sequence_length if not longer_alone else min(sequence_length, tokens_per_batch)
        _require_sizes(most, sequences_per_step, tokens_per_batch, held_out, part)
        self.store = store
        self.sequence_length, self.tokens_per_batch = sequence_length, tokens_per_batch
        self._share, self._pair_cost, self._critical = share or Share((rank,), world_size), pair_cost, critical
        try:
            self._plan = plan(
                store, sequence_length=sequence_length, policy="whole", seed=seed, held_out=held_out, part=part,
                cache=cache,
            )
        except UserError as error:
            # A policy is for text; what is too long of a conversation is decided when it is prepared.
            error.why = "a sequence is never cut when it is read"
            error.fix = (error.fix or "").partition(",")[0] + ", or prepare the data again for shorter rows"
            raise
        self.rows_per_epoch = self._plan.rows
        """Sequences of one epoch."""
        if self.rows_per_epoch == 0:
            raise _nothing_in(store, part)
        self.rows_per_step = sequences_per_step or self._sequences_of(tokens_per_step or 1)
        """Sequences of one step over all ranks."""
        facts = [store.fingerprint, "budget", sequence_length, self.rows_per_step, seed, held_out, part, shuffle]
        facts += [] if critical is None else [critical.facts]
        self.fingerprint: str = hashlib.sha256(json.dumps(facts).encode()).hexdigest()
        """SHA-256 of the store and of every setting that decides the sequences of a step."""
        self._draws = Draws(self.rows_per_epoch, self.rows_per_step, seed, shuffle)
        self._ahead = ReadAhead(self._batches, prefetch)

    @property
    def steps_per_epoch(self) -> float:
        return self._draws.steps_per_epoch

    @property
    def pace(self) -> Pace:
        """What a step is of an epoch, and how many tokens it reads on average."""
        return self._draws.pace(self._plan.tokens() / self.rows_per_epoch - 1)

    def epochs(self, step: int) -> float:
        """Passes over the data after so many steps."""
        return self._draws.epochs(step)

    def batches(self, step: int) -> list[Batch]:
        """This rank's micro-batches of a step; the next step's are made ready on a thread."""
        return self._ahead(step)

    def draws(self, step: int) -> list[tuple[int, int]]:
        """(epoch, sequence of the plan) at each place of a step, of all ranks."""
        return self._draws.of_step(step)

    def cut(self, step: int) -> list[list[Numbers]]:
        """The places of each micro-batch of each rank."""
        return self._cut(self.draws(step))

    def row(self, step: int, place: int) -> dict[str, list[Any]]:
        """One sequence as the model sees it, see `Row.shown`; its document is 0."""
        return self._row(place, self.draws(step)[place][1]).shown()

    def close(self) -> None:
        """End the thread that reads ahead."""
        self._ahead.close()

    def _batches(self, step: int) -> list[Batch]:
        draws = self.draws(step)
        cut = self._cut(draws)
        nothing: list[Numbers] = [np.zeros(0, dtype=np.int64)] * len(cut[0])
        return [
            replace(self._collated(draws, places, part), shard=part)
            for part in self._share.mine for places in (cut[part] if part < len(cut) else nothing)
        ]  # fmt: skip

    def _collated(self, draws: list[tuple[int, int]], places: Numbers, part: int) -> Batch:
        if len(places):
            return end_to_end([self._row(place, draws[place][1]) for place in places.tolist()])
        # Every rank joins every collective: one that has run out of sequences gets a row of padding.
        return collate([filler(self.rows_per_step + part, self.store.gate_groups)])

    def _cut(self, draws: list[tuple[int, int]]) -> list[list[Numbers]]:
        documents = [self._document(row) for _, row in draws]
        read = np.array([self.store.length(document) - 1 for document in documents], dtype=np.int64)
        return cut_step(read, self.tokens_per_batch, self._share.of, self._pair_cost)

    def _row(self, place: int, row: int) -> Row:
        document = self._document(row)
        tokens, counts = self.store.read(document), self.store.weights(document)
        one = np.zeros(len(tokens), dtype=np.int32)
        if self._critical is not None:
            counts = self._critical.counts(tokens, counts)
        return Row(tokens, one, place, counts, self.store.gates(document))

    def _document(self, row: int) -> int:
        (piece,) = self._plan.pieces(row, 0)
        return piece.document

    def _sequences_of(self, tokens: int) -> int:
        """How many sequences read so many tokens on average, 1 at least."""
        return max(1, round(tokens * self.rows_per_epoch / (self._plan.tokens() - self.rows_per_epoch)))


def _require_sizes(
    sequence_length: int, sequences: int | None, tokens_per_batch: int, held_out: float, part: Part
) -> None:
    if sequence_length < 1 or (sequences is not None and sequences < 1):
        raise UserError(
            f"a step of {sequences} sequences of {sequence_length} tokens holds nothing",
            fix="data.sequence_length and data.sequences_per_step are 1 at least",
        )
    if tokens_per_batch < sequence_length:
        raise UserError(
            f"a sequence of {sequence_length:,} tokens does not fit a micro-batch of {tokens_per_batch:,}",
            why="a sequence is never cut by the memory knob: what is trained would depend on the machine",
            fix=f"data.tokens_per_batch={sequence_length}, or a smaller data.sequence_length",
        )
    if not 0.0 <= held_out < 1.0 or (part == "held_out" and held_out == 0.0):
        raise UserError(
            f"data.held_out is {held_out}",
            why="it is the share of documents kept from training, at least 0 and below 1"
            + (", and documents of the held-out part were asked for" if part == "held_out" else ""),
            fix="data.held_out=0.01",
        )


def _nothing_in(store: Store, part: Part) -> UserError:
    return UserError(
        f"the data has no sequence to learn from (part `{part}`)",
        where=str(store.path),
        why=f"the store has {store.documents:,} documents and {store.tokens:,} tokens; a sequence has 2 at least",
        fix="more data, or another data.held_out",
    )
