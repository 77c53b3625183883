"""ComparisonSource: (seed, step) -> this rank's micro-batches of whole comparisons, packed without padding."""

from __future__ import annotations

import hashlib
import json
from dataclasses import replace
from functools import cached_property
from typing import Any

import numpy as np
from numpy.typing import NDArray

from llmtrainer.base.errors import UserError
from llmtrainer.base.units import Pace
from llmtrainer.core.batch import Batch
from llmtrainer.core.share import Share
from llmtrainer.data.branches import AnswerRows, collate_comparisons, no_comparison, read_tokens
from llmtrainer.data.budget import PAIR_COST, Numbers, cut_step
from llmtrainer.data.draws import Draws
from llmtrainer.data.packed import COMPARISONS, GRADES, LIKED, MARGINS, PAIRED, SHARED, Store
from llmtrainer.data.plan import Part, is_held_out
from llmtrainer.data.read_ahead import ReadAhead


class ComparisonTable:
    """What a store keeps of its comparisons besides their tokens, by number; some bytes of memory for each."""

    def __init__(self, store: Store) -> None:
        self.store = store
        if not store.comparisons:
            raise UserError(
                "the token store holds no comparisons", where=str(store.path),
                fix="name files of comparisons (prompt, chosen, rejected), or data.kind=examples",
            )
        self.starts: Numbers = self._read(COMPARISONS, "<i8").astype(np.int64)
        """First document of each comparison, and the end of the last: [C + 1]."""
        self.shared: Numbers = self._read(SHARED, "<i4").astype(np.int64)
        """Tokens that all its documents begin with: [C]."""
        self.liked: NDArray[np.uint8] | None = self._read(LIKED, "|u1") if store.holds(LIKED) else None
        self.margin: NDArray[np.float32] | None = self._read(MARGINS, "<f4") if store.holds(MARGINS) else None
        self.grade_C2: NDArray[np.int32] | None = None
        """From which class to below which each only answer may belong."""
        if store.holds(GRADES):
            self.grade_C2 = self._read(GRADES, "<i4").reshape(-1, 2)
        self.paired: NDArray[np.uint8] | None = self._read(PAIRED, "|u1") if store.holds(PAIRED) else None

    def __len__(self) -> int:
        return len(self.shared)

    @property
    def answers(self) -> Numbers:
        """Documents of each comparison: [C]."""
        return np.diff(self.starts)

    @cached_property
    def tokens(self) -> Numbers:
        """Tokens of all documents of each comparison: [C]."""
        return np.diff(self.store.offsets[0 : self.store.documents + 1][self.starts])

    def read(self, number: int, place: int) -> AnswerRows:
        """A comparison whose first answer has this place in its step."""
        documents = range(int(self.starts[number]), int(self.starts[number + 1]))
        weights = [self.store.weights(document) for document in documents]
        return AnswerRows(
            tuple(self.store.read(document) for document in documents),
            tuple(item for item in weights if item is not None), int(self.shared[number]), documents[0], place,
            None if self.liked is None else bool(self.liked[number]),
            None if self.margin is None else float(self.margin[number]),
            None if self.grade_C2 is None else (int(self.grade_C2[number, 0]), int(self.grade_C2[number, 1])),
            self.paired is not None and bool(self.paired[number]),
        )  # fmt: skip

    def _read(self, name: str, dtype: str) -> NDArray[Any]:
        return np.fromfile(self.store.path / name, dtype)


class ComparisonSource:
    """The comparisons of a token store as a function of (seed, step).

    Step n owns draws n*R .. (n+1)*R - 1, R = `pairs_per_step`; draw d is comparison `order(d mod P)` of epoch d div P,
    P the comparisons of an epoch, in an order of that epoch alone. Only then are they cut: into micro-batches of at
    most `tokens_per_batch` tokens, each one row of whole comparisons without padding, as many on every rank and about
    the same work. So what a step learns from depends on neither ranks nor micro-batches, nor on whether a prompt is
    read once for all its answers (`share_prompt`).
    """

    def __init__(
        self, store: Store, *, pairs_per_step: int, tokens_per_batch: int, seed: int, held_out: float = 0.0,
        part: Part = "train", shuffle: bool = True, share_prompt: bool = True, rank: int = 0, world_size: int = 1,
        share: Share | None = None, prefetch: bool = True, pair_cost: float = PAIR_COST,
    ) -> None:  # fmt: skip
        """`held_out` is the share of comparisons kept from training, chosen by a hash of their number. `share` stands
        in place of rank and world size. Raises UserError where there is none, or one does not fit a micro-batch."""
        assert 0 <= rank < world_size and pairs_per_step > 0
        self.store, self.share_prompt, self.tokens_per_batch = store, share_prompt, tokens_per_batch
        self.table = ComparisonTable(store)
        self._share, self._pair_cost = share or Share((rank,), world_size), pair_cost
        numbers = np.arange(len(self.table))
        self._numbers = numbers[is_held_out(numbers, held_out) == (part == "held_out")]
        if not len(self._numbers):
            raise UserError(
                f"the data has no comparison to learn from (part `{part}`)", where=str(store.path),
                why=f"the store has {len(numbers):,} comparisons", fix="more data, or another data.held_out",
            )
        self._signals = {
            "liked": self.table.liked is not None, "margin": self.table.margin is not None,
            "graded": self.table.grade_C2 is not None,
        }  # fmt: skip
        self._lengths = read_tokens(self.table.tokens, self.table.answers, self.table.shared, share_prompt)
        self._require_fit()
        self.rows_per_epoch, self.rows_per_step = len(self._numbers), pairs_per_step
        facts = [store.fingerprint, "comparisons", pairs_per_step, seed, held_out, part, shuffle]
        self.fingerprint: str = hashlib.sha256(json.dumps(facts).encode()).hexdigest()
        """SHA-256 of the store and of every setting that decides the comparisons of a step."""
        self._draws = Draws(self.rows_per_epoch, pairs_per_step, seed, shuffle)
        self._ahead = ReadAhead(self._batches, prefetch)

    @property
    def branches(self) -> bool:
        """Whether any prompt is read once for several answers."""
        shared = (self.table.shared > 1) & (self.table.answers > 1)
        return self.share_prompt and bool(shared[self._numbers].any())

    @property
    def longest(self) -> int:
        """Tokens of the longest row, prompt and answer."""
        return int(np.diff(self.store.offsets[0 : self.store.documents + 1]).max())

    @property
    def steps_per_epoch(self) -> float:
        return self._draws.steps_per_epoch

    @property
    def pace(self) -> Pace:
        """What a step is of an epoch, and how many tokens it reads on average."""
        return self._draws.pace(float(self._lengths[self._numbers].mean()))

    def epochs(self, step: int) -> float:
        """Passes over the data after so many steps."""
        return self._draws.epochs(step)

    def batches(self, step: int) -> list[Batch]:
        """This rank's micro-batches of a step; the next step's are made ready on a thread."""
        return self._ahead(step)

    def comparisons(self, step: int) -> list[int]:
        """The number of the comparison at each place of a step, of all ranks."""
        return self._numbers[[row for _, row in self._draws.of_step(step)]].tolist()

    def cut(self, step: int) -> list[list[Numbers]]:
        """The comparisons of each micro-batch of each rank, by their place in the step."""
        return self._cut(self.comparisons(step))

    def row(self, step: int, place: int) -> dict[str, list[Any]]:
        """One comparison as the model sees it: `tokens`; for each how much it counts as a target (`weights`), its place
        in its document (`positions`), the number of its `document`, and its `answer`, -1 where all share it."""
        batch = self._collated([self.table.read(self.comparisons(step)[place], 0)])
        sequence, document = batch.sequence_BT[0], batch.document_BT[0]
        weights = _as_targets(batch)
        return {
            "tokens": batch.tokens_BT[0].tolist(), "weights": weights, "positions": batch.position_BT[0].tolist(),
            "document": document.tolist(), "answer": sequence.tolist(),
        }  # fmt: skip

    def largest(self) -> Batch:
        """The micro-batch that needs the most memory: the longest comparisons that fit one together."""
        lengths = self._lengths[self._numbers]
        order = np.argsort(-lengths, kind="stable")
        fit = max(1, int(np.searchsorted(np.cumsum(lengths[order]), self.tokens_per_batch, side="right")))
        return self._collated(self._placed(self._numbers[order[:fit]].tolist()))

    def mismatched(self, step: int) -> list[Batch]:
        """This rank's micro-batches of the step's prompts, each with the answer to the prompt at the place before it,
        and the first with the last's: what is said of an answer by those who were asked something else. As many
        micro-batches on every rank. A row that would be longer than every row of the store is cut at its end.

        For comparisons of one answer. UserError where a step has one, whose answer would be its own.
        """
        numbers = self.comparisons(step)
        if len(numbers) < 2:
            raise UserError(
                "a step of one answer has no other prompt to put it to", where="data.pairs_per_step",
                why="the point of reference is estimated on answers to other prompts of the step",
                fix="data.pairs_per_step=64",
            )
        rows = [self.table.read(number, place) for place, number in enumerate(numbers)]
        made = [_put_to(rows[place], rows[place - 1], self.longest) for place in range(len(rows))]
        lengths = np.array([len(item.rows[0]) for item in made])
        budget = max(self.tokens_per_batch, int(lengths.max()))
        return [
            replace(
                self._collated([made[place] for place in chosen.tolist()])
                if len(chosen) else no_comparison(len(numbers) + part, **self._signals),
                shard=part,
            )
            for part, chosen in self._mine(cut_step(lengths, budget, self._share.of, self._pair_cost))
        ]  # fmt: skip

    def close(self) -> None:
        """End the thread that reads ahead."""
        self._ahead.close()

    def _batches(self, step: int) -> list[Batch]:
        numbers = self.comparisons(step)
        places = np.concatenate([[0], np.cumsum(self.table.answers[numbers])])
        return [
            # Every rank joins every collective: one that has run out of comparisons gets a token of padding.
            replace(
                self._collated([self.table.read(numbers[place], int(places[place])) for place in chosen.tolist()])
                if len(chosen) else no_comparison(int(places[-1]) + part, **self._signals),
                shard=part,
            )
            for part, chosen in self._mine(self._cut(numbers))
        ]  # fmt: skip

    def _mine(self, cut: list[list[Numbers]]) -> list[tuple[int, Numbers]]:
        """Of the parts of a step, the micro-batches of this process's, each with the number of its part."""
        nothing: list[Numbers] = [np.zeros(0, dtype=np.int64)] * len(cut[0])
        return [(part, chosen) for part in self._share.mine for chosen in (cut[part] if part < len(cut) else nothing)]

    def _cut(self, numbers: list[int]) -> list[list[Numbers]]:
        return cut_step(self._lengths[numbers], self.tokens_per_batch, self._share.of, self._pair_cost)

    def _placed(self, numbers: list[int]) -> list[AnswerRows]:
        places = np.concatenate([[0], np.cumsum(self.table.answers[numbers])]).tolist()
        return [self.table.read(number, place) for number, place in zip(numbers, places, strict=False)]

    def _collated(self, comparisons: list[AnswerRows]) -> Batch:
        return collate_comparisons(comparisons, share=self.share_prompt, **self._signals)

    def _require_fit(self) -> None:
        lengths = self._lengths[self._numbers]
        longest = int(lengths.argmax())
        if lengths[longest] <= self.tokens_per_batch:
            return
        too_long = int((lengths > self.tokens_per_batch).sum())
        raise UserError(
            f"{too_long:,} of {len(lengths):,} comparisons do not fit a micro-batch of {self.tokens_per_batch:,} "
            "tokens",
            where=f"{self.store.origin(int(self.table.starts[self._numbers[longest]]))}, the longest: "
            f"{int(lengths[longest]):,} tokens",
            why="the answers of a comparison are learned together",
            fix=f"data.tokens_per_batch={int(lengths[longest])}, or a smaller data.sequence_length",
        )


def _put_to(asked: AnswerRows, answered: AnswerRows, longest: int) -> AnswerRows:
    """The prompt of one comparison with the answer of another."""
    assert len(asked.rows) == len(answered.rows) == 1, "comparisons of one answer"
    parts = ((asked.rows[0], asked.weights[0]), slice(asked.shared)), ((answered.rows[0], answered.weights[0]), slice(
        answered.shared, None
    ))
    tokens, weights = (np.concatenate([kept[which][part] for kept, part in parts])[:longest] for which in (0, 1))
    return replace(asked, rows=(tokens,), weights=(weights,))


def _as_targets(batch: Batch) -> list[float]:
    """How much each token of a batch of one row counts as a target: what the token before it is told, in its own
    sequence."""
    weights, sequence = batch.weights_BT[0].tolist(), batch.sequence_BT[0].tolist()
    return [0.0] + [
        weights[place] if sequence[place] == sequence[place + 1] else 0.0 for place in range(len(weights) - 1)
    ]
