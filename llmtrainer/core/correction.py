"""When sampler and trainer disagree: three policies, and what is done about the gap between the first two."""

from __future__ import annotations

from typing import Literal, Self

import numpy as np
import torch
from numpy.typing import NDArray
from pydantic import Field, model_validator
from torch import Tensor

from llmtrainer.base.config import Config
from llmtrainer.base.errors import UserError
from llmtrainer.core.batch import OLD, ROLLOUT, Batch
from llmtrainer.core.maths import divergence
from llmtrainer.core.objective import Term
from llmtrainer.core.rollout import Rollout

Level = Literal["none", "token", "sequence"]


class Correction(Config):
    """Answers are drawn by the sampler (`rollout_logp_BT`), the surrogate is anchored at the trainer's policy of that
    time (`old_logp_BT`), and the trainer's policy of now is trained. rho = old / rollout is the gap of the first two:
    other kernels, other precision, older weights. Where one code does both it is 1 and nothing here is needed."""

    bypass: bool = False
    """Anchor the surrogate at the sampler's own log-probabilities: two policies, no gap, and no pass for the old
    ones. Rejection then looks at the policy of now."""

    weights: Level = "none"
    """Weigh each token by min(rho, cap): of the token, or the product over its answer (arXiv:2110.00641)."""

    cap: float = Field(default=2.0, gt=0.0)
    """The largest weight. Truncation costs some bias and bounds the variance."""

    reject: Literal["none", "token", "sequence", "mean", "k1", "k3"] = "none"
    """Leave out tokens whose rho is outside `bounds`, or answers: by the product of rho (sequence), its geometric
    mean (mean), or where the mean over the tokens of KL's estimate k1 or k3 from sampler to trainer is too large."""

    bounds: tuple[float, float] = (0.5, 2.0)
    """Smallest and largest rho that stays; of k1 and k3 only the second counts, in nats."""

    @model_validator(mode="after")
    def _fits(self) -> Self:
        if self.bypass and self.weights != "none":
            raise UserError(
                f"objective.correction.weights={self.weights} weighs a gap that objective.correction.bypass takes away",
                why="the surrogate's ratio is taken to the sampler already, so every weight is 1",
                fix="leave out one of the two",
            )
        low, high = self.bounds
        if self.reject in ("token", "sequence", "mean") and not 0.0 <= low < high:
            raise UserError(
                f"objective.correction.bounds={[low, high]} lets nothing stay",
                why="the first is the smallest rho that stays and the second the largest",
                fix="objective.correction.bounds=[0.5,2.0]",
            )
        return self

    @property
    def reads(self) -> tuple[str, ...]:
        """Signals it needs."""
        if self.bypass:
            return (ROLLOUT,)
        return (OLD, ROLLOUT) if self.weights != "none" or self.reject != "none" else (OLD,)

    def anchor(self, batch: Batch, logp_BT: Tensor) -> Tensor:
        """The log-probabilities that the surrogate's ratio is taken to, in the policy's type."""
        return batch.signals[ROLLOUT].to(logp_BT.dtype) if self.bypass else _old(batch, logp_BT)

    def apply(self, batch: Batch, logp_BT: Tensor) -> tuple[Tensor | None, list[Term]]:
        """What each token's loss is multiplied by, None for 1, and metrics of the gap where both sides are known.

        A rejected token has weight 0 and still counts in what the loss is divided by, which was counted before the
        forward pass. Nothing here is differentiated.
        """
        trainer = logp_BT.detach() if self.bypass else _old(batch, logp_BT)
        if ROLLOUT not in batch.signals:
            return None, []
        sampler = batch.signals[ROLLOUT].to(logp_BT.dtype)
        gap_BT = torch.where(batch.weights_BT > 0, trainer - sampler, 0.0)
        weight_BT = kept_BT = torch.ones_like(gap_BT)
        if self.weights != "none" and not self.bypass:
            log_rho_BT = gap_BT if self.weights == "token" else batch.by_token(batch.sum_by_sequence(gap_BT))
            weight_BT = log_rho_BT.exp().clamp(max=self.cap)
        if self.reject == "token":
            kept_BT = self._inside(gap_BT).to(gap_BT.dtype)
        elif self.reject != "none":
            kept_BT = batch.by_token(self._kept(batch, gap_BT).to(gap_BT.dtype))
        active = self.weights != "none" or self.reject != "none"
        return weight_BT * kept_BT if active else None, _metrics(batch, gap_BT, weight_BT, kept_BT)

    def keeps(self, rollout: Rollout) -> NDArray[np.bool_]:
        """Which answers of a rollout stay: those whose rejection is known before training shape no group."""
        kept_R = np.ones(len(rollout.answers), dtype=np.bool_)
        if self.reject in ("none", "token") or self.bypass or rollout.trainer_logp is None:
            return kept_R
        for row, (trainer, sampler, weight) in enumerate(
            zip(rollout.trainer_logp, rollout.old_logp, rollout.weights, strict=True)
        ):
            gap = torch.from_numpy((trainer - sampler)[weight > 0])
            kept_R[row] = not len(gap) or bool(self._accepts(gap.sum(), gap.mean(), _k3(gap).mean()))
        return kept_R

    def _kept(self, batch: Batch, gap_BT: Tensor) -> Tensor:
        total_S, mean_S = batch.sum_by_sequence(gap_BT), batch.mean_by_sequence(gap_BT)
        return self._accepts(total_S, mean_S, batch.mean_by_sequence(_k3(gap_BT)))

    def _accepts(self, total: Tensor, mean: Tensor, k3: Tensor) -> Tensor:
        match self.reject:
            case "sequence":
                return self._inside(total)
            case "mean":
                return self._inside(mean)
            case "k1":
                return -mean <= self.bounds[1]
            case _:
                return k3 <= self.bounds[1]

    def _inside(self, log_rho: Tensor) -> Tensor:
        return (log_rho.exp() >= self.bounds[0]) & (log_rho.exp() <= self.bounds[1])


def _old(batch: Batch, logp_BT: Tensor) -> Tensor:
    """What the trainer's policy said when the answers were written. Answers that are learned in one single step do not
    carry it: there it is the very policy that is trained, so the ratio is exactly 1."""
    return batch.signals[OLD].to(logp_BT.dtype) if OLD in batch.signals else logp_BT.detach()


def _k3(gap: Tensor) -> Tensor:
    """KL(sampler || trainer) of tokens that the sampler drew."""
    return divergence("k3", torch.zeros_like(gap), gap)


def _metrics(batch: Batch, gap_BT: Tensor, weight_BT: Tensor, kept_BT: Tensor) -> list[Term]:
    counted_BT = batch.weights_BT.to(gap_BT.dtype)
    figures = {
        "rollout/kl": _k3(gap_BT),
        "rollout/chi2": torch.expm1(2.0 * gap_BT),
        "rollout/weight": weight_BT,
        "rollout/rejected": 1.0 - kept_BT,
    }
    return [Term(name, (counted_BT * value_BT).sum(), "tokens", coef=0.0) for name, value_BT in figures.items()]
