"""Comparisons -> Batch: the answers of each side by side, the prompt that they share read once or by each of them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from llmtrainer.core.batch import GROUP, HIGH, LIKED, LOW, MARGIN, ROW, Batch

Numbers = NDArray[np.int64]


@dataclass(frozen=True)
class AnswerRows:
    """The answers of one comparison, ready for a batch."""

    rows: tuple[NDArray[Any], ...]
    """Ids of the prompt and each answer, the best first."""
    weights: tuple[NDArray[np.float32], ...]
    """How much each of them counts as a target."""
    shared: int
    """Tokens that all rows begin with and none learns."""
    first: int
    """Which document of the store the first row is; the others follow."""
    place: int
    """Place of the first row in its optimizer step; the others follow."""
    liked: bool | None = None
    margin: float | None = None
    grade: tuple[int, int] | None = None
    """The classes that the only answer may belong to, from the first to below the second."""
    paired: bool = False
    """Whether each two neighbouring answers are compared with each other, and with no other."""

    def branches(self, share: bool) -> bool:
        """Whether the prompt is read once: where there is more of it than the token that each answer repeats."""
        return share and len(self.rows) > 1 and self.shared > 1


def read_tokens(rows: Numbers, answers: Numbers, shared: Numbers, share: bool) -> Numbers:
    """Tokens that the model reads of comparisons, of which one has `rows` tokens in all its `answers` rows: [C].

    p + c + r + 1 of a pair with a prompt of p tokens and answers of c and r, which share it: p - 1, then twice the last
    token of the prompt with an answer behind it. 2 p + c + r where each has its own.
    """
    return rows - ((answers - 1) * np.maximum(shared - 1, 0) if share else 0)


def collate_comparisons(
    comparisons: Sequence[AnswerRows], *, share: bool, liked: bool = False, margin: bool = False, graded: bool = False
) -> Batch:
    """One row [1, T] of whole comparisons, without padding. Each sequence of the batch is an answer.

    Shared: a comparison is one document; first its prompt but for the last token, sequence -1; then, for each answer,
    that token again and the answer, of which each sees the prompt and itself, at the positions that it would have
    alone. Every token is read, the last of an answer too: what a score is read behind. `liked`, `margin` and `graded`
    say whether the batch carries these signals; a comparison without a margin has 0. Pairs of segments are
    comparisons of their own, whatever else follows their prompt.
    """
    pieces: list[_Piece] = []
    document = 0
    for item in comparisons:
        made = _branches(item) if item.branches(share) else _alone(item)
        pieces += [piece.moved(document) for piece in made]
        document += made[-1].document + 1
    sequences = [piece for piece in pieces if piece.answer >= 0]
    numbers = np.full(len(pieces), -1)
    numbers[[piece.answer >= 0 for piece in pieces]] = np.arange(len(sequences))
    sizes = [len(piece.tokens) for piece in pieces]

    def of_pieces(values: Sequence[int] | Numbers, dtype: type) -> torch.Tensor:
        return torch.from_numpy(np.repeat(np.asarray(values, dtype=dtype), sizes)[None])

    def joined(parts: Sequence[NDArray[Any]], dtype: type) -> torch.Tensor:
        return torch.from_numpy(np.concatenate(parts).astype(dtype)[None])

    answers = [len(item.rows) for item in comparisons]
    return Batch(
        tokens_BT=joined([piece.tokens for piece in pieces], np.int64),
        targets_BT=joined([piece.targets for piece in pieces], np.int64),
        weights_BT=joined([piece.weights for piece in pieces], np.float32),
        document_BT=of_pieces([piece.document for piece in pieces], np.int32),
        position_BT=joined([piece.start + np.arange(len(piece.tokens)) for piece in pieces], np.int32),
        sequence_BT=of_pieces(numbers, np.int32),
        place_B=torch.tensor([comparisons[0].place], dtype=torch.int64),
        place_BT=of_pieces([piece.place for piece in pieces], np.int64),
        signals=_signals(comparisons, answers, liked=liked, margin=margin, graded=graded),
    )


def no_comparison(place: int, *, liked: bool = False, margin: bool = False, graded: bool = False) -> Batch:
    """A batch of one token of padding, for a rank that has run out of comparisons."""
    zeros, none = torch.zeros((1, 1), dtype=torch.int64), torch.full((1, 1), -1, dtype=torch.int32)
    return Batch(
        zeros, zeros.clone(), torch.zeros((1, 1)), none, torch.zeros((1, 1), dtype=torch.int32), none.clone(),
        torch.tensor([place], dtype=torch.int64), signals=_signals((), (), liked=liked, margin=margin, graded=graded),
    )  # fmt: skip


@dataclass(frozen=True)
class _Piece:
    """Tokens that follow each other in the row: a prompt that is shared, or an answer with what it repeats of it."""

    tokens: NDArray[Any]
    targets: NDArray[Any]
    weights: NDArray[np.float32]
    start: int
    """Position of the first."""
    document: int
    answer: int
    """Which answer of its comparison; -1: shared."""
    place: int

    def moved(self, first: int) -> _Piece:
        return _Piece(
            self.tokens, self.targets, self.weights, self.start, first + self.document, self.answer, self.place
        )


def _branches(item: AnswerRows) -> list[_Piece]:
    start = item.shared - 1
    prompt = item.rows[0][:start]
    nothing = np.zeros(start, dtype=np.float32)
    shared = _Piece(prompt, item.rows[0][1 : item.shared], nothing, 0, 0, -1, item.place)
    return [shared, *(_answer(item, answer, start, 0) for answer in range(len(item.rows)))]


def _alone(item: AnswerRows) -> list[_Piece]:
    return [_answer(item, answer, 0, answer) for answer in range(len(item.rows))]


def _answer(item: AnswerRows, answer: int, start: int, document: int) -> _Piece:
    """A row from token `start` on. Nothing follows the last: its target counts 0."""
    tokens, weights = item.rows[answer][start:], item.weights[answer][start:]
    targets = np.append(tokens[1:], tokens[-1:])
    counts = np.append(weights[1:], np.zeros(1, dtype=np.float32))
    return _Piece(tokens, targets, counts, start, document, answer, item.place + answer)


def _signals(
    comparisons: Sequence[AnswerRows], answers: Sequence[int], *, liked: bool, margin: bool, graded: bool
) -> dict[str, torch.Tensor]:
    rows = [len(item.rows) for item in comparisons]
    pairs = [[2] * (number // 2) if item.paired else [number] for number, item in zip(rows, comparisons, strict=True)]
    sizes = [size for group in pairs for size in group]
    found = {
        GROUP: torch.from_numpy(np.repeat(np.arange(len(sizes), dtype=np.int64), sizes)),
        ROW: torch.tensor(
            [item.first + place for item in comparisons for place in range(len(item.rows))], dtype=torch.int64
        ),
    }
    if liked:
        found[LIKED] = torch.from_numpy(np.repeat(np.array([bool(i.liked) for i in comparisons], np.float32), answers))
    if margin:
        found[MARGIN] = torch.from_numpy(np.repeat(np.array([i.margin or 0 for i in comparisons], np.float32), answers))
    if graded:
        grades = np.array([item.grade for item in comparisons], np.int64).reshape(-1, 2)
        found[LOW], found[HIGH] = (torch.from_numpy(np.repeat(end, answers)) for end in grades.T)
    return found
