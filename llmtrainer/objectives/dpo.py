"""Direct preference optimisation: one margin between two answers, and the published ways to punish it."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Literal, Self

import torch
from pydantic import Field, model_validator
from torch import Tensor
from torch.nn.functional import logsigmoid, relu, sigmoid

from llmtrainer.base.errors import UserError
from llmtrainer.core.batch import KL, REFERENCE, Batch, Outputs
from llmtrainer.core.maths import LOG_2
from llmtrainer.core.objective import Objective, Term
from llmtrainer.core.preferences import Pairs, log_ratio, pairs_of, preference_metrics, require_two, thinned

OF_MARGIN = ("sigmoid", "robust", "hinge", "ipo", "exo_pair")
"""Losses of the margin alone. The others look at both answers apart."""


class DPO(Objective):
    """Raise what the policy adds to the reference's log-probability of the better answer above that of the worse.

    r(x, y) = beta * log(policy(y|x) / reference(y|x)) is the reward that the policy implies (arXiv:2305.18290, eq. 5);
    z = r(better) - r(worse) is the margin. Of several ranked answers to a prompt every two are a pair.
    """

    loss: Literal[
        "sigmoid", "robust", "hinge", "ipo", "exo_pair", "sppo_hard", "nca_pair", "apo_zero", "apo_down", "kto_pair"
    ] = "sigmoid"
    """How a pair is punished. sigmoid: -log s(z), the paper's. robust: the same, unbiased under labels of which
    label_smoothing are swapped. hinge: max(0, 1 - z). ipo: (z / beta - 1 / (2 beta))^2. exo_pair: reverse KL to
    the labels. sppo_hard, nca_pair, apo_zero, apo_down, kto_pair: both answers apart (docs/preferences.md)."""

    beta: float = Field(default=0.1, gt=0.0)
    """How dear it is to leave the reference: the policy stays nearer to it the larger beta is (tau in IPO)."""

    label_smoothing: float = Field(default=0.0, ge=0.0, lt=0.5)
    """Share of pairs whose order is taken to be wrong; read by sigmoid (conservative DPO), robust and exo_pair."""

    average: Literal["sum", "mean"] = "sum"
    """Log-ratios summed over an answer's tokens, or their mean: length-normalised DPO, and IPO as its authors
    run it. A mean is smaller by the length, so beta has to be larger."""

    reference_free: bool = False
    """Take the reference to give every answer the same probability; none is built then."""

    divergence: Literal["reverse_kl", "forward_kl", "jensen_shannon"] = "reverse_kl"
    """From which divergence the implied reward is derived (arXiv:2309.16240, table 1)."""

    gamma: float = Field(default=0.0, ge=0.0)
    """By how much of reward the better answer must lead: subtracted from the margin."""

    nll_weight: float = Field(default=0.0, ge=0.0)
    """Weight of imitating the best answer beside: the mean of its tokens' -log p (arXiv:2404.19733)."""

    sampo: bool = False
    """Count as many tokens of every answer as the shortest to its prompt has, drawn at random each step, so that
    length itself earns nothing (arXiv:2406.10957)."""

    balance: bool = False
    """Scale the gradients that the answers to a prompt send into the model down to the smallest of them, so that
    pushing the worse answer away does not drown learning the better one."""

    @model_validator(mode="after")
    def _fits(self) -> Self:
        if self.gamma and self.loss not in OF_MARGIN:
            raise UserError(
                f"objective.gamma is set, and loss `{self.loss}` has no margin between the answers",
                why="it looks at each answer apart",
                fix=f"objective.gamma=0, or objective.loss= one of {', '.join(OF_MARGIN)}",
            )
        if self.loss == "exo_pair" and not self.label_smoothing:
            raise UserError(
                "objective.loss=exo_pair needs objective.label_smoothing above 0",
                why="its divergence from labels that are certain is infinite (arXiv:2402.00856, eq. 16)",
                fix="objective.label_smoothing=0.001",
            )
        return self

    @property
    def reads(self) -> tuple[str, ...]:
        return () if self.reference_free else (REFERENCE,)

    @property
    def wants(self) -> tuple[str, ...]:
        return ("logp", "balanced") if self.balance else ("logp",)

    @property
    def whole_steps(self) -> bool:
        return self.loss == "kto_pair"

    @property
    def starts_at(self) -> Mapping[str, float]:
        if self.reference_free:
            return {}
        zero_S, one = torch.zeros(2, dtype=torch.float64), torch.tensor([0])
        return {"loss/preference": float(self._loss(zero_S, Pairs(one, one + 1, one), zero_S))}

    @property
    def compares(self) -> bool:
        return True

    def terms(self, out: Outputs, batch: Batch) -> list[Term]:
        assert out.logp_BT is not None
        if self.loss not in OF_MARGIN:
            require_two(batch, self.loss)
        pairs = pairs_of(batch)
        reward_S = self._rewards(out, batch)
        loss_P = self._loss(reward_S, pairs, self._point(reward_S, pairs, batch))
        terms = [Term("loss/preference", loss_P.sum(), "pairs")]
        if self.nll_weight:
            nll_S = -batch.mean_by_sequence(out.logp_BT)
            terms.append(Term("loss/nll", nll_S[pairs.best_P].sum(), "pairs", self.nll_weight))
        return [*terms, *preference_metrics(pairs, reward_S, batch.sum_by_sequence(out.logp_BT))]

    def totals(self, out: Outputs, batch: Batch) -> Mapping[str, Tensor | float]:
        reward_S, pairs = self._rewards(out, batch), pairs_of(batch)
        sides = {"better": reward_S[pairs.better_P].sum(), "worse": reward_S[pairs.worse_P].sum()}
        return {**sides, "pairs": len(pairs.better_P)}

    def with_totals(self, batch: Batch, totals: Mapping[str, float]) -> Batch:
        """The mean reward of the step's answers on the other side, at least 0, for each answer; by beta, as the signal
        is in nats."""
        pairs, n = pairs_of(batch), self.beta * (totals["pairs"] or 1.0)
        point_S = torch.zeros(batch.sequences, dtype=torch.float64, device=batch.tokens_BT.device)
        point_S[pairs.better_P] = max(totals["worse"] / n, 0.0)
        point_S[pairs.worse_P] = max(totals["better"] / n, 0.0)
        return batch.with_signals({KL: point_S})

    def _rewards(self, out: Outputs, batch: Batch) -> Tensor:
        assert out.logp_BT is not None
        counted = thinned(batch, batch.dropout_key) if self.sampo else batch
        ratio_BT = out.logp_BT if self.reference_free else log_ratio(out.logp_BT, batch)
        over = counted.sum_by_sequence if self.average == "sum" else counted.mean_by_sequence
        return self._reward(over(ratio_BT))

    def _reward(self, ratio_S: Tensor) -> Tensor:
        """beta * f'(policy / reference), less what does not depend on the answer."""
        match self.divergence:
            case "reverse_kl":
                return self.beta * ratio_S
            case "forward_kl":
                return self.beta * -torch.expm1(-ratio_S)
            case "jensen_shannon":
                return self.beta * (LOG_2 + logsigmoid(ratio_S))

    def _loss(self, reward_S: Tensor, pairs: Pairs, point_S: Tensor) -> Tensor:
        better_P, worse_P = reward_S[pairs.better_P], reward_S[pairs.worse_P]
        z_P = better_P - worse_P - self.gamma if self.loss in OF_MARGIN else better_P - worse_P
        match self.loss:
            case "sigmoid":     # arXiv:2305.18290 eq. 7; smoothed: Mitchell 2023, "A note on DPO with noisy ..."
                eps = self.label_smoothing
                return -(1 - eps) * logsigmoid(z_P) - eps * logsigmoid(-z_P)
            case "robust":      # arXiv:2403.00409
                eps = self.label_smoothing
                return (-(1 - eps) * logsigmoid(z_P) + eps * logsigmoid(-z_P)) / (1 - 2 * eps)
            case "hinge":       # SLiC, arXiv:2305.10425, on the margin of rewards: arXiv:2309.06657
                return relu(1 - z_P)
            case "ipo":         # arXiv:2310.12036 eq. 17
                return ((z_P - 0.5) / self.beta).square()
            case "exo_pair":    # arXiv:2402.00856 eq. 16
                eps = self.label_smoothing
                right_P = sigmoid(z_P) * (logsigmoid(z_P) - math.log1p(-eps))
                return right_P + sigmoid(-z_P) * (logsigmoid(-z_P) - math.log(eps))
            case "sppo_hard":   # arXiv:2405.00675 eq. 4.7, the better wins with probability 1
                return ((better_P - 0.5).square() + (worse_P + 0.5).square()) / self.beta**2
            case "nca_pair":    # arXiv:2402.05369
                return -logsigmoid(better_P) - 0.5 * logsigmoid(-better_P) - 0.5 * logsigmoid(-worse_P)
            case "apo_zero":    # arXiv:2408.06266 eq. 7
                return sigmoid(-better_P) + sigmoid(worse_P)
            case "apo_down":    # arXiv:2408.06266 eq. 8
                return sigmoid(better_P) + sigmoid(-z_P)
            case "kto_pair":    # arXiv:2402.01306, each answer beside the other side's point
                point_P, other_P = point_S[pairs.better_P], point_S[pairs.worse_P]
                return 0.5 * (sigmoid(point_P - better_P) + sigmoid(worse_P - other_P))

    def _point(self, reward_S: Tensor, pairs: Pairs, batch: Batch) -> Tensor:
        """What KTO compares each answer with: the mean reward of the other side, at least 0, never differentiated."""
        if self.loss != "kto_pair":
            return reward_S
        if KL in batch.signals:
            return self.beta * batch.signals[KL].to(reward_S.dtype)
        point_S = reward_S.detach().clone()
        point_S[pairs.better_P] = relu(reward_S[pairs.worse_P].detach().mean())
        point_S[pairs.worse_P] = relu(reward_S[pairs.better_P].detach().mean())
        return point_S
