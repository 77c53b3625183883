"""Graded texts: a score, and cut points that divide its line into classes."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import logsigmoid

from llmtrainer.base.errors import UserError
from llmtrainer.core.batch import HIGH, LOW, Batch, Outputs
from llmtrainer.core.maths import log1mexp
from llmtrainer.core.objective import Objective, Term


class Ordinal(Objective):
    """Make the class, or the range of classes, that a text was graded with likely.

    With cut points c_1 < .. < c_(K-1) and a score s, P(class < k) = sigmoid(c_k - s) (McCullagh 1980, section 2), so
    that classes low <= class < high have sigmoid(c_high - s) - sigmoid(c_low - s), c_0 and c_K infinite. Needs
    model.head.kind=ordinal; every sequence says `low_S` and `high_S`.
    """

    @property
    def wants(self) -> tuple[str, ...]:
        return ("score", "cut_points")

    @property
    def reads(self) -> tuple[str, ...]:
        return (LOW, HIGH)

    def terms(self, out: Outputs, batch: Batch) -> list[Term]:
        assert out.score_S is not None and out.cut_points_K is not None
        low_S, high_S = batch.signals[LOW], batch.signals[HIGH]
        _require_classes(low_S, high_S, len(out.cut_points_K) + 1)
        class_S = classes_of(out.score_S, out.cut_points_K)
        right_S = (class_S >= low_S) & (class_S < high_S)
        off_S = (low_S - class_S).clamp(min=0) + (class_S - high_S + 1).clamp(min=0)
        return [
            Term("loss/ordinal", -log_probability(out.score_S, out.cut_points_K, low_S, high_S).sum(), "sequences"),
            Term("ordinal/accuracy", right_S.to(out.score_S.dtype).sum(), "sequences", coef=0.0),
            Term("ordinal/distance", off_S.to(out.score_S.dtype).sum(), "sequences", coef=0.0),
        ]


def classes_of(score_S: Tensor, cut_points_K: Tensor) -> Tensor:
    """The class that each score lies in: the number of cut points not above it, int64."""
    return (cut_points_K <= score_S[:, None]).sum(1)


def log_probability(score_S: Tensor, cut_points_K: Tensor, low_S: Tensor, high_S: Tensor) -> Tensor:
    """Logarithm of the probability that the class of each score is at least low and below high."""
    # sigmoid(b) - sigmoid(a) = sigmoid(b) sigmoid(-a) (1 - exp(a - b)): no digits are lost where both are near 0 or 1.
    K = len(cut_points_K) + 1
    above_S = cut_points_K[(high_S - 1).clamp(0, K - 2)] - score_S
    below_S = cut_points_K[(low_S - 1).clamp(0, K - 2)] - score_S
    zero = score_S.new_zeros(())
    ends_S, begins_S = high_S < K, low_S > 0
    within_S = (below_S - above_S).masked_fill(~(ends_S & begins_S), -1.0)
    return (
        torch.where(ends_S, logsigmoid(above_S), zero)
        + torch.where(begins_S, logsigmoid(-below_S), zero)
        + torch.where(ends_S & begins_S, log1mexp(within_S), zero)
    )


def _require_classes(low_S: Tensor, high_S: Tensor, K: int) -> None:
    wrong_S = (low_S < 0) | (high_S > K) | (low_S >= high_S)
    if bool(wrong_S.any()):
        low, high = int(low_S[wrong_S][0]), int(high_S[wrong_S][0])
        raise UserError(
            f"a text is graded with the classes from {low} to below {high}, and the model has 0 to {K - 1}",
            where="data", why="a grade is a range of at least one class",
            fix=("data.format.lowest=1 if the lowest grade is 1, or " if high == K + 1 else "")
            + f"model.head.classes={max(high, K)}",
        )
