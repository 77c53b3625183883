"""KTO: learn from answers that were liked or not, one at a time, as people weigh gains and losses."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Literal

import torch
from pydantic import Field
from torch import Tensor
from torch.nn.functional import relu, sigmoid

from llmtrainer.core.batch import KL, LIKED, REFERENCE, Batch, Outputs
from llmtrainer.core.objective import Objective, Term
from llmtrainer.core.preferences import log_ratio


class KTO(Objective):
    """Bring liked answers above a point of reference and the others below it (arXiv:2402.01306, eq. 7).

    r(x, y) = beta * log(policy(y|x) / reference(y|x)); the point is beta * z0, where z0 is about how far the policy
    has left the reference, in nats: a mean of log-ratios over the whole step, at least 0. Where a batch has the signal
    `kl_S`, that is z0; where it has not, the mean log-ratio of its own answers.
    """

    loss: Literal["kto", "apo_zero"] = "kto"
    """apo_zero: the same with the point at 0, which needs no estimate (arXiv:2408.06266, eq. 7, unpaired)."""

    point: Literal["mismatched", "own"] = "mismatched"
    """Whose log-ratios z0 is the mean of. mismatched, as the paper has it: each prompt of the step with the answer that
    was given to the prompt before it, which policy and reference read before the step; about twice the time. own: the
    step's own answers, and is larger the more the policy has learned of them; costs nothing where a step is one
    micro-batch of one process, else one more forward pass."""

    beta: float = Field(default=0.1, gt=0.0)
    """How dear it is to leave the reference: the policy stays nearer to it the larger beta is."""

    liked_weight: float = Field(default=1.0, ge=0.0)
    """How much a liked answer counts (lambda_D). With unequal numbers of both kinds, weights times numbers should
    stand as 1 : 1 to 4 : 3."""

    disliked_weight: float = Field(default=1.0, ge=0.0)
    """How much an answer counts that was not liked (lambda_U)."""

    @property
    def reads(self) -> tuple[str, ...]:
        return (REFERENCE, LIKED, KL) if self._estimates else (REFERENCE, LIKED)

    @property
    def _estimates(self) -> bool:
        return self.loss == "kto" and self.point == "mismatched"

    @property
    def whole_steps(self) -> bool:
        return self.loss == "kto" and self.point == "own"

    @property
    def starts_at(self) -> Mapping[str, float]:
        return {"loss/preference": 0.5} if self.liked_weight == self.disliked_weight == 1.0 else {}

    def terms(self, out: Outputs, batch: Batch) -> list[Term]:
        assert out.logp_BT is not None
        reward_S = self.beta * batch.sum_by_sequence(log_ratio(out.logp_BT, batch))
        liked_S = batch.signals[LIKED].to(reward_S.dtype)
        over_S = reward_S - self._point(reward_S, batch)
        side_S = 2.0 * liked_S - 1.0
        weight_S = self.liked_weight * liked_S + self.disliked_weight * (1.0 - liked_S)
        margin_S = (side_S * over_S).detach()
        return [
            # 1 - s(r - point) of a liked answer, 1 - s(point - r) of the others
            Term("loss/preference", (weight_S * sigmoid(-side_S * over_S)).sum(), "sequences"),
            Term("preference/accuracy", (margin_S > 0).to(margin_S.dtype).sum(), "sequences", coef=0.0),
            Term("preference/margin", margin_S.sum(), "sequences", coef=0.0),
            Term("preference/liked", liked_S.sum(), "sequences", coef=0.0),
            Term("reward/mean", reward_S.detach().sum(), "sequences", coef=0.0),
        ]

    def totals(self, out: Outputs, batch: Batch) -> Mapping[str, Tensor | float]:
        assert out.logp_BT is not None
        return {"ratio": batch.sum_by_sequence(log_ratio(out.logp_BT, batch)).sum(), "sequences": batch.sequences}

    def with_totals(self, batch: Batch, totals: Mapping[str, float]) -> Batch:
        """The mean log-ratio of the step's sequences, at least 0, for each of them."""
        point = max(totals["ratio"] / (totals["sequences"] or 1.0), 0.0)
        point_S = torch.full((batch.sequences,), point, dtype=torch.float64, device=batch.tokens_BT.device)
        return batch.with_signals({KL: point_S})

    def _point(self, reward_S: Tensor, batch: Batch) -> Tensor:
        """What rewards are compared with: one number, never differentiated."""
        if self.loss == "apo_zero":
            return torch.zeros_like(reward_S)
        if KL in batch.signals:
            return self.beta * batch.signals[KL].to(reward_S.dtype)
        return relu(reward_S.detach().mean()).expand_as(reward_S)
