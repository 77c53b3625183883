"""A conversation becomes rows: each answer learned once, and what is too long dropped, cut or split."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any, Literal

import numpy as np

from llmtrainer.base.errors import UserError
from llmtrainer.core.example import Example, Message, TokenRow
from llmtrainer.data.detect import placed
from llmtrainer.data.fates import KEPT
from llmtrainer.data.format import RecordFormat
from llmtrainer.data.length import LengthPolicy, Piece
from llmtrainer.data.outcome import Outcome, RowMaker
from llmtrainer.data.records import Record

Learn = Literal["answers", "last_answer", "everything"]


@dataclass(frozen=True)
class Choices:
    """What decides the rows besides files, tokenizer and template."""

    length: LengthPolicy
    bad_records: Literal["stop", "drop"] = "stop"
    """What a record that its format or the template refuses does: end the preparation, or become a fate."""
    allow_truncated: bool = False
    allow_pickle: bool = False
    learn: Learn = "answers"
    """Which tokens are targets: those of the answers, of the last one alone, or all of the last row of a record."""
    gate: str | None = None
    """The key of a record under which it names the adapters of a mixture that it goes through."""

    def facts(self) -> list[Any]:
        length = self.length
        cut = [length.cut_side, length.cut_end] if length.too_long == "cut" else []
        found: list[Any] = [length.longest, length.too_long, *cut, self.bad_records, self.allow_truncated]
        found += [] if self.learn == "answers" else [self.learn]
        return found if self.gate is None else [*found, ["gate", self.gate]]

    def outcome(self, maker: RowMaker, format: RecordFormat, ends: frozenset[int], record: Record) -> Outcome:
        """The fate and the rows of a record; UserError where it is refused and that is to stop the preparation."""
        try:
            example = placed(format, record)
            gate = _gate(example, record, self.gate)
            rows = _rows(maker, example, record, self.learn)
        except UserError as error:
            if self.bad_records == "stop":
                raise
            return Outcome("bad record", error.what, 0, [])
        said = sum(len(message.content.encode(errors="replace")) for message in example.messages)
        fates, kept = [], []
        for row in rows:
            fate, pieces = _shortened(row, self.length, ends)
            fates.append(fate)
            kept += pieces
        other = [fate for fate in fates if fate != "kept"]
        lost = any(fate not in KEPT for fate in other)
        fate = "kept in part" if kept and lost else other[0] if other else "kept"
        longest = max(len(row.tokens) for row in rows)
        return Outcome(fate, None if fate == "kept" else f"{longest:,} tokens", said, kept, gate)


def _gate(example: Example, record: Record, key: str | None) -> str | None:
    """What a record calls the adapters that it goes through; None where nobody asks."""
    if key is None:
        return None
    gate = example.facts.get(key)
    if not isinstance(gate, str):
        raise UserError(
            "a record names no gates", where=f"{record.place}, key `{key}`",
            why="every sample of a gated mixture names its adapters in a text, such as `t1a3`; an empty one: none"
            if gate is None else f"it is {gate!r} where a text is wanted",
            fix="mend the record, or name the key that has them (data.gate=KEY)",
        )
    return gate


def _shortened(row: Piece, length: LengthPolicy, ends: frozenset[int]) -> tuple[str, list[Piece]]:
    """(fate, rows that are stored) of one row; a row without a target is never stored."""
    if not row.targets:
        return "nothing to learn", []
    fate, pieces = length.applied(row, ends)
    found = [piece for piece in pieces if piece.targets]
    return ("targets cut away" if pieces and not found else fate), found


def _rows(maker: RowMaker, example: Example, record: Record, learn: str) -> list[Piece]:
    if learn == "last_answer":
        example = _with_one_answer(example)
    try:
        rows = maker.rows(example)
    except UserError as error:
        error.where = record.place if error.where is None else f"{record.place}, {error.where}"
        raise
    assert rows and all(len(row.tokens) == len(row.weights) for row in rows)
    if learn == "everything":
        rows = [TokenRow(rows[-1].tokens, (1.0,) * len(rows[-1].tokens))]
    return [Piece(np.array(row.tokens, dtype=np.int64), np.array(row.weights, dtype=np.float32)) for row in rows]


def _with_one_answer(example: Example) -> Example:
    """The conversation, of which the last answer that counts is learned and what lies before it is only read."""
    counting = [place for place, message in enumerate(example.messages) if _counts(message)]
    earlier = counting[:-1]
    messages = [
        replace(message, weight=0.0) if place in earlier else message for place, message in enumerate(example.messages)
    ]
    return replace(example, messages=tuple(messages))


def _counts(message: Message) -> bool:
    return message.role == "assistant" and (message.weight is None or message.weight > 0)
