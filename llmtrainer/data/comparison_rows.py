"""A comparison becomes rows: the prompt and each answer, the best first, cut alike where they are too long."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

import numpy as np

from llmtrainer.base.errors import UserError
from llmtrainer.core.example import Comparison, Example
from llmtrainer.data.detect import placed
from llmtrainer.data.fates import TIED
from llmtrainer.data.format import ComparisonFormat
from llmtrainer.data.length import Piece
from llmtrainer.data.outcome import Outcome, RowMaker
from llmtrainer.data.packed import Compared
from llmtrainer.data.records import Record

EQUAL = "equal answers"
"""The fate of a record whose answers are the same."""
PromptCut = Literal["keep_end", "keep_start"]


@dataclass(frozen=True)
class ComparisonChoices:
    """What decides the rows besides files, tokenizer and template."""

    longest: int
    """Tokens of the longest row, prompt and answer."""
    too_long: Literal["cut", "drop", "keep"] = "cut"
    """What becomes of a comparison whose prompt with its longest answer is longer."""
    prompt_cut: PromptCut = "keep_end"
    """Which tokens of a prompt stay that is cut."""
    max_prompt_length: int | None = None
    """So many of them; None: half of `longest`."""
    bad_records: Literal["stop", "drop"] = "stop"
    allow_truncated: bool = False
    allow_pickle: bool = False

    def facts(self) -> list[Any]:
        cut = [self.prompt_cut, self.most_of_prompt] if self.too_long == "cut" else []
        return ["comparisons", self.longest, self.too_long, *cut, self.bad_records, self.allow_truncated]

    @property
    def most_of_prompt(self) -> int:
        """Tokens that a cut leaves of a prompt."""
        return self.longest // 2 if self.max_prompt_length is None else self.max_prompt_length

    def outcome(self, maker: RowMaker, format: ComparisonFormat, ends: frozenset[int], record: Record) -> Outcome:
        """The fate of a record, and a row for every answer; UserError where it is refused and that is to stop the
        preparation."""
        try:
            comparison: Comparison = placed(format, record)
            rows, shared = rows_of(maker, comparison, record.place)
        except UserError as error:
            if self.bad_records == "stop":
                raise
            return Outcome("bad record", error.what, 0, [])
        said = sum(
            len(message.content.encode(errors="replace"))
            for turns in (comparison.prompt, *comparison.answers) for message in turns
        )  # fmt: skip
        longest = max(len(row.tokens) for row in rows)
        why = f"{longest:,} tokens"
        if not all(row.targets for row in rows):
            return Outcome("nothing to learn", why, said, [])
        fate = "kept"
        if longest > self.longest:
            if self.too_long == "drop":
                return Outcome("too long", why, said, [])
            fate = "kept (longer)"
            if self.too_long == "cut":
                rows, left = self._cut(rows, shared)
                fate = "cut" if longest - shared + left > self.longest else "prompt cut"
                shared = left
        kept, scores = (_different_pairs(rows), []) if comparison.paired else _different(rows, comparison.scores)
        if len(kept) < 2 and comparison.liked is None and comparison.grade is None:
            return Outcome(EQUAL, None, said, [])
        if len(kept) < len(rows):
            fate, why = fate if fate.endswith("cut") else TIED, f"{len(kept)} of {len(rows)} answers differ"
        margin = comparison.margin
        if margin is None and len(scores) == 2:
            margin = scores[0] - scores[1]
        low, high = comparison.grade or (None, None)
        compared = Compared(len(kept), shared, comparison.liked, margin, low, high, comparison.paired)
        return Outcome(fate, None if fate == "kept" else why, said, kept, None, compared)

    def _cut(self, rows: Sequence[Piece], shared: int) -> tuple[list[Piece], int]:
        """The prompt of all rows cut to what a cut leaves of it, then each answer to what is left of a row."""
        left = min(shared, self.most_of_prompt)
        start = shared - left if self.prompt_cut == "keep_end" else 0
        found = []
        for row in rows:
            places = np.concatenate([np.arange(start, start + left), np.arange(shared, len(row.tokens))])
            places = places[: self.longest]
            weights = row.weights[places]
            weights[:1] = 0.0    # what announced it is gone
            found.append(Piece(row.tokens[places], weights))
        return found, left


def rows_of(maker: RowMaker, comparison: Comparison, place: str) -> tuple[list[Piece], int]:
    """A row for every answer, and how many tokens all of them begin with before any learns one: the prompt. UserError
    for an answer that no single row can show."""
    if comparison.ids:
        prompt, *answers = comparison.ids
        rows = [_of_ids(prompt, answer) for answer in answers]
        return rows, len(prompt)
    rows = []
    for answer in comparison.answers:
        messages = (*(replace(message, weight=0.0) for message in comparison.prompt), *answer)
        rows.append(_row(maker, Example(messages, comparison.tools, comparison.plain), place))
    return rows, _shared(rows)


def _row(maker: RowMaker, example: Example, place: str) -> Piece:
    try:
        found = maker.rows(example)
    except UserError as error:
        error.where = place if error.where is None else f"{place}, {error.where}"
        raise
    if len(found) > 1:
        raise UserError(
            f"an answer of several turns would become {len(found)} rows", where=place,
            why="the template shows earlier turns otherwise than they were written, so no one row has the whole answer",
            fix="answers of one turn, or another template",
        )
    return Piece(np.array(found[0].tokens, dtype=np.int64), np.array(found[0].weights, dtype=np.float32))


def _of_ids(prompt: tuple[int, ...], answer: tuple[int, ...]) -> Piece:
    weights = np.zeros(len(prompt) + len(answer), dtype=np.float32)
    weights[len(prompt) :] = 1.0
    return Piece(np.array([*prompt, *answer], dtype=np.int64), weights)


def _shared(rows: Sequence[Piece]) -> int:
    """Tokens that all rows begin with, and none learns."""
    least = min(len(row.tokens) for row in rows)
    alike = np.ones(least, dtype=bool)
    for row in rows:
        alike &= (row.tokens[:least] == rows[0].tokens[:least]) & (row.weights[:least] == 0.0)
    return least if alike.all() else int(np.argmin(alike))


def _different(rows: Sequence[Piece], scores: Sequence[float]) -> tuple[list[Piece], list[float]]:
    """The rows that no better one equals, in tokens or in its score."""
    kept: list[Piece] = []
    found: list[float] = []
    for place, row in enumerate(rows):
        if any(np.array_equal(row.tokens, other.tokens) for other in kept):
            continue
        if scores and scores[place] in found:
            continue
        kept.append(row)
        found += scores[place : place + 1]
    return kept, found


def _different_pairs(rows: Sequence[Piece]) -> list[Piece]:
    """The rows of every pair, the better before the worse, whose two are not the same."""
    pairs = zip(rows[::2], rows[1::2], strict=True)
    return [row for pair in pairs if not np.array_equal(pair[0].tokens, pair[1].tokens) for row in pair]
