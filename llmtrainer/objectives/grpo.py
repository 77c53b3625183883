"""Policy gradients from groups of answers: one surrogate, and the published choices of its four pieces by name."""

from __future__ import annotations

from typing import Any, Literal, NamedTuple, Self

import numpy as np
import torch
from numpy.typing import NDArray
from pydantic import Field, model_validator
from torch import Tensor

from llmtrainer.base.errors import UserError
from llmtrainer.core import credit, maths
from llmtrainer.core.batch import ADVANTAGE, REFERENCE, Batch, Outputs
from llmtrainer.core.correction import Correction
from llmtrainer.core.credit import FRESH, State
from llmtrainer.core.objective import Objective, Term
from llmtrainer.core.rollout import Rollout

Advantage = Literal["group", "leave_one_out", "whitened", "group_whitened"]
Level = Literal["token", "sequence", "product"]
Shape = Literal["clip", "cap", "gate", "gamma"]
Average = Literal["answer", "token", "length", "sum"]


class Preset(NamedTuple):
    """What a published method is, in this surrogate's terms."""

    level: Level = "token"
    shape: Shape = "clip"
    average: Average = "answer"
    advantage: Advantage = "group"
    scale: Literal["population", "sample", "batch", "none"] = "population"
    clip_low: float = 0.2
    clip_high: float = 0.2


PRESETS = {
    "grpo": Preset(),                                                                   # arXiv:2402.03300 eq. 3
    "bnpo": Preset(average="token"),                                # GRPO with every token counting the same
    "dapo": Preset(average="token", clip_high=0.28),                                    # arXiv:2503.14476 eq. 8
    "dr_grpo": Preset(average="length", scale="none"),                                  # arXiv:2503.20783
    "gspo": Preset(level="sequence", clip_low=3e-4, clip_high=4e-4),                    # arXiv:2507.18071
    "luspo": Preset(level="sequence", average="sum", clip_low=3e-4, clip_high=4e-4),    # arXiv:2602.05261
    "cispo": Preset(shape="cap", average="token", clip_high=4.0),                       # arXiv:2506.13585
    "sapo": Preset(shape="gate"),                                                       # arXiv:2511.20347
    "vespo": Preset(shape="gamma", average="token"),                                    # arXiv:2602.10693
    "rloo": Preset(level="product", advantage="leave_one_out"),                         # arXiv:2402.14740
    "reinforce_pp": Preset(average="token", advantage="whitened"),                      # arXiv:2501.03262
}


class GRPO(Objective):
    """Make tokens of answers that earned more than their group likelier, within bounds of the policy that wrote them.

    -f(r, A), averaged: A how much better than expected (`advantage`), r = policy / old policy of a token or an answer
    (`level`), f how far r may carry (the method's shape), and what every token counts (`average`).
    """

    loss: Literal[
        "grpo", "bnpo", "dapo", "dr_grpo", "gspo", "luspo", "cispo", "sapo", "vespo", "rloo", "reinforce_pp"
    ] = "grpo"
    """The published method. It chooses what the fields below leave open (docs/reinforcement.md has the table)."""

    advantage: Advantage | None = None
    """What an answer is compared with. group: the mean of the answers to its prompt, over their deviation.
    leave_one_out: the mean of the others. whitened: all tokens of the rollout. group_whitened: one after the other."""

    scale: Literal["population", "sample", "batch", "none"] | None = None
    """The deviation that `group` divides by: of the group, by n or n - 1; of all answers; or nothing."""

    level: Level | None = None
    """Ratio of each token; geometric mean over the answer (sequence); or of the whole answer (product)."""

    average: Average | None = None
    """answer: each answer counts once, whatever its length. token: each token of the step once. length: a token counts
    1 / max_new_tokens, whatever answer it is in. sum: each token of an answer once, over the number of answers."""

    clip_low: float | None = Field(default=None, ge=0.0, le=1.0)
    """How far below 1 a ratio still has a gradient."""

    clip_high: float | None = Field(default=None, ge=0.0)
    """How far above 1 a ratio still has a gradient; of `cispo`, how far above 1 its weight may be."""

    delta: float | None = Field(default=None, gt=1.0)
    """The largest ratio at all, also of tokens that are to become less likely (two-sided clipping). None: no bound."""

    gate: tuple[float, float] = (1.0, 1.05)
    """Steepness of `sapo` for good and for bad tokens."""

    gamma: tuple[tuple[float, float], tuple[float, float]] = ((2.0, 3.0), (3.0, 2.0))
    """(k, lambda) of `vespo` for good and for bad tokens."""

    kl: float = Field(default=0.0, ge=0.0)
    """Weight of the divergence from the reference. 0: no reference is built."""

    kl_estimator: Literal["k1", "k2", "k3"] = "k3"
    """How the divergence is estimated from the drawn tokens."""

    kl_in: Literal["loss", "reward"] = "loss"
    """Whether it is differentiated, or taken off what the answer earned."""

    entropy: float = Field(default=0.0, ge=0.0)
    """Weight of the entropy of every prediction, which is to stay high. 0: it is not even computed."""

    max_new_tokens: int | None = Field(default=None, ge=1)
    """Tokens of the longest answer there may be: what `average: length` and `overlong` are measured by."""

    overlong: int = Field(default=0, ge=0)
    """So many tokens before max_new_tokens an answer begins to lose reward, up to 1 at the end."""

    skip_unfinished: bool = False
    """Leave out answers that were cut off, from groups and from training."""

    skip_even_groups: bool = False
    """Leave out groups that earned the same throughout (dynamic sampling): they would only thin out the step."""

    correction: Correction = Correction()
    """What to do where sampler and trainer give the same token different probabilities."""

    @model_validator(mode="after")
    def _fits(self) -> Self:
        measured = "average=length" if self._chosen("average") == "length" else "overlong" if self.overlong else None
        if measured and self.max_new_tokens is None:
            raise UserError(
                f"objective.{measured} needs objective.max_new_tokens",
                why="what an answer is divided by must be one number, never the width of a batch",
                fix="objective.max_new_tokens=512, the sampler's own limit",
            )
        if self.kl and self.kl_in == "loss" and self.kl_estimator == "k1":
            raise UserError(
                "objective.kl_estimator=k1 does nothing in the loss",
                why="the mean of its gradient is 0: it is the gradient of log-probabilities alone",
                fix="objective.kl_estimator=k3, or objective.kl_in=reward",
            )
        if self.level is not None and PRESETS[self.loss].shape == "gamma":
            raise UserError(
                f"objective.level does nothing with objective.loss={self.loss}",
                why="its weight is a function of the whole answer's ratio", fix="leave out objective.level",
            )
        return self

    @property
    def reads(self) -> tuple[str, ...]:
        reference = (REFERENCE,) if self.kl else ()
        return (*self.correction.reads, ADVANTAGE, *reference)

    @property
    def wants(self) -> tuple[str, ...]:
        return ("logp", "entropy") if self.entropy else ("logp",)

    def terms(self, out: Outputs, batch: Batch) -> list[Term]:
        assert out.logp_BT is not None
        logp_BT = out.logp_BT
        old_BT = self.correction.anchor(batch, logp_BT)
        weight_BT, terms = self.correction.apply(batch, logp_BT)
        log_ratio_BT = torch.where(batch.weights_BT > 0, logp_BT - old_BT, 0.0)
        ratio_BT = self._at_level(log_ratio_BT, batch).exp()
        loss_BT = self._shaped(ratio_BT, log_ratio_BT, logp_BT, batch)
        terms.append(self._averaged("loss/policy", loss_BT if weight_BT is None else loss_BT * weight_BT, batch, 1.0))
        if self.kl:
            kl_BT = maths.divergence(self.kl_estimator, logp_BT, batch.signals[REFERENCE].to(logp_BT.dtype))
            in_loss = self.kl_in == "loss"
            terms.append(self._averaged("loss/kl" if in_loss else "policy/kl", kl_BT, batch, self.kl * in_loss))
        if self.entropy:
            assert out.entropy_BT is not None
            terms.append(_over_tokens("policy/entropy", out.entropy_BT, batch, -self.entropy))
        return [*terms, *self._metrics(ratio_BT.detach(), log_ratio_BT.detach(), logp_BT.detach(), batch)]

    def trains(self, rollout: Rollout) -> NDArray[np.bool_]:
        kept_R = rollout.valid_R & self.correction.keeps(rollout)
        if self.skip_unfinished:
            kept_R = kept_R & rollout.ended_R
        if self.skip_even_groups:
            kept_R = kept_R & ~credit.even_groups(np.where(kept_R, rollout.reward_R, np.nan), rollout.group_R)
        return kept_R

    def credit(self, rollout: Rollout, state: State = FRESH) -> list[NDArray[np.float64]]:
        kept_R = self.trains(rollout)
        reward_R = np.where(kept_R, rollout.reward_R, np.nan)
        if self.overlong:
            assert self.max_new_tokens is not None
            length_R = np.array([np.count_nonzero(weight) for weight in rollout.weights], dtype=np.int64)
            reward_R = reward_R + credit.overlong(length_R, self.max_new_tokens, self.overlong)
        weights = [weight * kept for weight, kept in zip(rollout.weights, kept_R, strict=True)]
        spent, kind = self._spent(rollout), self._chosen("advantage")
        if kind == "whitened":
            found = [credit.to_go(*each) for each in zip(reward_R, spent, weights, strict=True)]
        else:
            advantage_R = self._beside_its_group(kind, reward_R - [part.sum() for part in spent], rollout.group_R)
            found = [np.where(weight > 0, a, 0.0) for a, weight in zip(advantage_R, weights, strict=True)]
        return credit.whiten(found, weights) if "whitened" in kind else found

    def _beside_its_group(
        self, kind: Advantage, reward_R: NDArray[np.float64], group_R: NDArray[np.int64]
    ) -> NDArray[np.float64]:
        if kind == "leave_one_out":
            return credit.leave_one_out(reward_R, group_R)
        return credit.group_advantage(reward_R, group_R, "none" if kind == "group_whitened" else self._chosen("scale"))

    def _spent(self, rollout: Rollout) -> list[NDArray[np.float64]]:
        """What each token costs for leaving the reference, where that is part of the reward."""
        if not self.kl or self.kl_in == "loss":
            return [np.zeros(len(weight)) for weight in rollout.weights]
        return [self.kl * part for part in rollout.divergence(self.kl_estimator)]

    def _at_level(self, log_ratio_BT: Tensor, batch: Batch) -> Tensor:
        match self._chosen("level"):
            case "sequence":
                return batch.by_token(batch.mean_by_sequence(log_ratio_BT))
            case "product":
                return batch.by_token(batch.sum_by_sequence(log_ratio_BT))
            case _:
                return log_ratio_BT

    def _shaped(self, ratio_BT: Tensor, log_ratio_BT: Tensor, logp_BT: Tensor, batch: Batch) -> Tensor:
        """What each token costs, before weights and averages."""
        advantage_BT = batch.signals[ADVANTAGE].to(logp_BT.dtype)
        match PRESETS[self.loss].shape:
            case "clip":
                low, high = self._chosen("clip_low"), self._chosen("clip_high")
                return maths.clipped(ratio_BT, advantage_BT, low, high, self.delta)
            case "cap":
                return maths.capped(ratio_BT, advantage_BT, logp_BT, self._chosen("clip_high"))
            case "gate":
                return maths.soft_gate(ratio_BT, advantage_BT, *self.gate)
            case "gamma":
                log_w_BT = batch.by_token(batch.sum_by_sequence(log_ratio_BT.clamp(-20.0, 20.0)))
                return -maths.gamma_weight(log_w_BT, advantage_BT, *self.gamma) * advantage_BT * logp_BT

    def _averaged(self, name: str, loss_BT: Tensor, batch: Batch, coef: float) -> Term:
        """One surrogate, four published ways to average it. The unit is most of the difference.

        answer  GRPO        each answer counts once                        arXiv:2402.03300 eq. 3
        token   DAPO        each token counts once, over the whole step    arXiv:2503.14476 eq. 8
        length  Dr. GRPO    a token's share never depends on its answer    arXiv:2503.20783
        sum     LUSPO       a token's share depends on no length at all    arXiv:2602.05261
        """
        total = (loss_BT * batch.weights_BT.to(loss_BT.dtype)).sum()
        match self._chosen("average"):
            case "answer":
                return Term(name, batch.mean_by_sequence(loss_BT).sum(), "sequences", coef)
            case "token":
                return Term(name, total, "tokens", coef)
            case "length":
                assert self.max_new_tokens is not None
                return Term(name, total / self.max_new_tokens, "sequences", coef)
            case _:
                return Term(name, total, "sequences", coef)

    def _metrics(self, ratio_BT: Tensor, log_ratio_BT: Tensor, logp_BT: Tensor, batch: Batch) -> list[Term]:
        figures = {
            "policy/ratio": ratio_BT,
            "policy/moved": maths.divergence("k3", torch.zeros_like(log_ratio_BT), log_ratio_BT),
            "policy/surprise": -logp_BT,
        }
        if PRESETS[self.loss].shape == "clip":
            advantage_BT = batch.signals[ADVANTAGE]
            figures["policy/clipped_low"] = (ratio_BT < 1.0 - self._chosen("clip_low")) & (advantage_BT < 0)
            figures["policy/clipped_high"] = (ratio_BT > 1.0 + self._chosen("clip_high")) & (advantage_BT > 0)
        return [_over_tokens(name, value_BT, batch, 0.0) for name, value_BT in figures.items()]

    def _chosen(self, name: str) -> Any:
        """A field's own value, or what the method says."""
        own = getattr(self, name)
        return getattr(PRESETS[self.loss], name) if own is None else own


def _over_tokens(name: str, value_BT: Tensor, batch: Batch, coef: float) -> Term:
    return Term(name, (value_BT * batch.weights_BT).sum(), "tokens", coef)
