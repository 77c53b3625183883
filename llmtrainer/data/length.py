"""What becomes of a row that is too long: kept, dropped, cut with its end token or without, or split."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass
from typing import Literal

import numpy as np
from numpy.typing import NDArray

TooLong = Literal["drop", "cut", "split", "keep"]
CutSide = Literal["right", "left"]
CutEnd = Literal["keep", "leave_out"]


@dataclass(frozen=True, slots=True)
class Piece:
    """A row of the store: ids, and how much each counts as a target, both [n]."""

    tokens: NDArray[np.int64]
    weights: NDArray[np.float32]

    @property
    def targets(self) -> int:
        """Tokens that are learned. The first is never one: nothing announces it."""
        return int(np.count_nonzero(self.weights[1:]))


@dataclass(frozen=True)
class LengthPolicy:
    """What is done with a row of more than `longest` tokens."""

    longest: int
    too_long: TooLong = "drop"
    cut_side: CutSide = "right"
    """Which end of the row goes: `right` cuts the last answer, `left` the beginning of the conversation."""
    cut_end: CutEnd = "keep"
    """Of an answer that is cut: whether its end token stays behind what is left, or is left out, so that the model
    does not learn to stop there. No token of the answer is overwritten: one less fits where the end token stays."""

    def applied(self, row: Piece, ends: Collection[int]) -> tuple[str, list[Piece]]:
        """(what became of the row, the rows that are stored): `kept` as it is, `kept (longer)`, `cut`, `split` into
        several, or `too long` and none. `ends` are the ids at which an answer stops."""
        if len(row.tokens) <= self.longest:
            return "kept", [row]
        if self.too_long == "keep":
            return "kept (longer)", [row]
        if self.too_long == "drop":
            return "too long", []
        if self.too_long == "split":
            return "split", self._split(row)
        return "cut", [self._left(row) if self.cut_side == "left" else self._right(row, ends)]

    def _split(self, row: Piece) -> list[Piece]:
        """Stretches that overlap by a token, so that each token but the first of all is a target once; those with
        nothing to learn are left out."""
        stride = self.longest - 1
        starts = range(0, len(row.tokens) - 1, stride)
        pieces = [_between(row, start, start + self.longest) for start in starts]
        return [piece for piece in pieces if piece.targets]

    def _left(self, row: Piece) -> Piece:
        return _between(row, len(row.tokens) - self.longest, len(row.tokens))

    def _right(self, row: Piece, ends: Collection[int]) -> Piece:
        """The beginning of the row. Where the cut goes through an answer whose end token is to stay, that token
        takes the last place, behind one token of the answer at least."""
        last = self.longest
        learned = row.weights > 0
        if self.cut_end == "keep" and last >= 2 and learned[last - 2 : last + 1].all():
            others = np.flatnonzero(~learned[last:])
            stop = last + int(others[0]) if len(others) else len(row.tokens)
            found = np.flatnonzero(np.isin(row.tokens[last:stop], list(ends)))
            # An answer that was whole in front of the cut needs no second end.
            if len(found) and not np.isin(row.tokens[last - 2 : last], list(ends)).any():
                places = np.append(np.arange(last - 1), last + int(found[0]))
                return Piece(row.tokens[places], row.weights[places])
        return _between(row, 0, last)


def _between(row: Piece, start: int, stop: int) -> Piece:
    weights = row.weights[start:stop].copy()
    if start > 0:
        weights[0] = 0.0    # what announced it is gone
    return Piece(row.tokens[start:stop], weights)
