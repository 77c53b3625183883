"""PPO: a clipped policy beside a critic that says what to expect from every token on."""

from __future__ import annotations

from dataclasses import replace
from typing import Literal, Self

import numpy as np
import torch
from numpy.typing import NDArray
from pydantic import Field, model_validator
from torch import Tensor
from torch.nn.functional import huber_loss

from llmtrainer.base.errors import UserError
from llmtrainer.core import credit, maths
from llmtrainer.core.batch import ADVANTAGE, OLD_VALUE, REFERENCE, RETURN, Batch, Outputs
from llmtrainer.core.correction import Correction
from llmtrainer.core.credit import FRESH, State
from llmtrainer.core.objective import Objective, Term
from llmtrainer.core.rollout import Rollout


class PPO(Objective):
    """Make tokens likelier that turned out better than the critic expected, within bounds of the policy that wrote them
    (arXiv:1707.06347), and teach the critic what was earned. Leaving the reference costs reward token by token
    (arXiv:1909.08593)."""

    clip_low: float = Field(default=0.2, ge=0.0, le=1.0)
    """How far below 1 a token's ratio still has a gradient."""

    clip_high: float = Field(default=0.2, ge=0.0)
    """How far above 1 a token's ratio still has a gradient."""

    delta: float | None = Field(default=None, gt=1.0)
    """The largest ratio at all, also of tokens that are to become less likely. None: no bound."""

    value_weight: float = Field(default=0.1, ge=0.0)
    """Weight of the critic's loss, half the squared error (arXiv:1707.06347, eq. 9)."""

    value_clip: float | None = Field(default=0.2, gt=0.0)
    """How far the critic may move from what it expected when the answers were written: of the error there and the error
    here the larger counts. None: it may go anywhere."""

    huber: float | None = Field(default=None, gt=0.0)
    """Errors of the critic above this count in a line instead of squared. None: all squared."""

    entropy: float = Field(default=0.0, ge=0.0)
    """Weight of the entropy of every prediction, which is to stay high. 0: it is not even computed."""

    gamma: float = Field(default=1.0, gt=0.0, le=1.0)
    """How much what is earned one token later counts."""

    lam: float = Field(default=0.95, ge=0.0, le=1.0)
    """lambda of generalised advantage estimation (arXiv:1506.02438): 1 believes what was earned, 0 the critic."""

    kl: float = Field(default=0.05, ge=0.0)
    """What one nat of divergence from the reference costs, at every token. 0: no reference is built."""

    kl_estimator: Literal["k1", "k3"] = "k1"
    """How the divergence is estimated from the drawn tokens."""

    kl_target: float | None = Field(default=None, gt=0.0)
    """Nats an answer that the divergence is steered to, by making `kl` larger or smaller after each rollout. None: `kl`
    stays."""

    kl_horizon: int = Field(default=10_000, ge=1)
    """Answers in which `kl` changes by about a fifth where it is far off the target."""

    missing_end_penalty: float = Field(default=0.0, ge=0.0)
    """Reward that an answer loses which did not come to its end."""

    rewards: Literal["plain", "running", "batch"] = "plain"
    """Rewards as they are; divided by the deviation of all so far (running); or with mean 0 and deviation 1 in each
    rollout (batch)."""

    whiten_rewards: bool = False
    """Divide the rewards of all tokens, divergence included, by their deviation in the rollout."""

    whiten_advantages: bool = True
    """Give the advantages of all tokens mean 0 and deviation 1 in the rollout."""

    bootstrap: bool = False
    """Behind an answer that was cut off, let the critic say what would have followed. Otherwise nothing does."""

    correction: Correction = Correction()
    """What to do where sampler and trainer give the same token different probabilities."""

    @model_validator(mode="after")
    def _fits(self) -> Self:
        if self.kl_target is not None and not self.kl:
            raise UserError(
                "objective.kl_target is set, and objective.kl is 0",
                why="a weight of 0 stays 0 however it is multiplied",
                fix="objective.kl=0.05, or leave out objective.kl_target",
            )
        return self

    @property
    def reads(self) -> tuple[str, ...]:
        return (*self.correction.reads, ADVANTAGE, OLD_VALUE, RETURN, *((REFERENCE,) if self.kl else ()))

    @property
    def wants(self) -> tuple[str, ...]:
        return ("logp", "value", *(("entropy",) if self.entropy else ()))

    def terms(self, out: Outputs, batch: Batch) -> list[Term]:
        assert out.logp_BT is not None and out.value_BT is not None
        logp_BT = out.logp_BT
        weight_BT, terms = self.correction.apply(batch, logp_BT)
        advantage_BT = batch.signals[ADVANTAGE].to(logp_BT.dtype)
        log_ratio_BT = torch.where(batch.weights_BT > 0, logp_BT - self.correction.anchor(batch, logp_BT), 0.0)
        ratio_BT = log_ratio_BT.exp()
        policy_BT = maths.clipped(ratio_BT, advantage_BT, self.clip_low, self.clip_high, self.delta)
        figures = {
            "loss/policy": (policy_BT if weight_BT is None else policy_BT * weight_BT, 1.0),
            "loss/value": (self._value_loss(out.value_BT, batch), self.value_weight),
        }
        if self.entropy:
            assert out.entropy_BT is not None
            figures["policy/entropy"] = out.entropy_BT, -self.entropy
        log_ratio_BT, ratio_BT, logp_BT = log_ratio_BT.detach(), ratio_BT.detach(), logp_BT.detach()
        outside_BT = torch.where(advantage_BT > 0, ratio_BT > 1.0 + self.clip_high, ratio_BT < 1.0 - self.clip_low)
        told = {
            "policy/ratio": ratio_BT, "policy/clipped": outside_BT & (advantage_BT != 0),
            "policy/moved": maths.divergence("k3", torch.zeros_like(log_ratio_BT), log_ratio_BT),
            "policy/surprise": -logp_BT, "value/mean": out.value_BT.detach(), "value/return": batch.signals[RETURN],
        }
        if self.kl:
            told["policy/kl"] = maths.divergence(self.kl_estimator, logp_BT, batch.signals[REFERENCE].to(logp_BT.dtype))
        figures.update({name: (value_BT, 0.0) for name, value_BT in told.items()})
        return terms + [
            Term(name, (value_BT * batch.weights_BT).sum(), "tokens", coef)
            for name, (value_BT, coef) in figures.items()
        ]

    def trains(self, rollout: Rollout) -> NDArray[np.bool_]:
        return rollout.valid_R & self.correction.keeps(rollout)

    def advance(self, state: State, rollout: Rollout) -> State:
        if self.rewards == "running":
            state = replace(state, rewards=state.rewards.with_more(self._earned(rollout)))
        if self.kl_target is not None:
            kept = np.flatnonzero(self.trains(rollout))
            spent = rollout.divergence(self.kl_estimator)
            if len(kept):
                nats = float(np.mean([spent[row].sum() for row in kept]))
                now = self.kl if state.kl is None else state.kl
                state = replace(state, kl=credit.adapted(now, nats, self.kl_target, len(kept), self.kl_horizon))
        return state

    def credit(self, rollout: Rollout, state: State = FRESH) -> list[NDArray[np.float64]]:
        found = [advantages for advantages, _ in self._estimated(rollout, state)]
        return credit.whiten(found, self._counting(rollout)) if self.whiten_advantages else found

    def returns(self, rollout: Rollout, state: State = FRESH) -> list[NDArray[np.float64]]:
        return [returns for _, returns in self._estimated(rollout, state)]

    def _estimated(
        self, rollout: Rollout, state: State
    ) -> list[tuple[NDArray[np.float64], NDArray[np.float64]]]:
        """Advantages and returns of each answer's trained tokens, 0 at the others: what an environment said between two
        turns is passed over."""
        assert rollout.values is not None
        found, closed_R = [], rollout.ended_R | (not self.bootstrap)
        earned = self._rewards(rollout, state)
        for row, (rewards, weight) in enumerate(zip(earned, self._counting(rollout), strict=True)):
            advantages, returns = np.zeros(len(weight)), np.zeros(len(weight))
            trained, values = np.flatnonzero(weight > 0), rollout.values[row]
            expected = np.concatenate([values[trained], values[len(weight) :]])
            advantages[trained], returns[trained] = credit.gae(
                rewards[trained], expected, self.gamma, self.lam, ended=bool(closed_R[row])
            )
            found.append((advantages, returns))
        return found

    def _rewards(self, rollout: Rollout, state: State) -> list[NDArray[np.float64]]:
        """What each token earned: less for leaving the reference, at the last one also what the answer earned."""
        earned_R, weights = self._earned(rollout), self._counting(rollout)
        if self.rewards == "running":
            earned_R = state.rewards.normalised(earned_R)
        elif self.rewards == "batch":
            earned_R = credit.Moments().with_more(earned_R).normalised(earned_R, shift=True)
        found = [np.zeros(len(weight)) for weight in weights]
        if self.kl:
            rate = self.kl if state.kl is None else state.kl
            found = [-rate * spent for spent in rollout.divergence(self.kl_estimator)]
        for rewards, weight, earned in zip(found, weights, earned_R, strict=True):
            trained = np.flatnonzero(weight > 0)
            if len(trained):
                rewards[trained[-1]] += earned
        return credit.whiten(found, weights, shift=False) if self.whiten_rewards else found

    def _earned(self, rollout: Rollout) -> NDArray[np.float64]:
        lost_R = np.where(rollout.ended_R, 0.0, self.missing_end_penalty)
        return np.where(self.trains(rollout), rollout.reward_R - lost_R, np.nan)

    def _counting(self, rollout: Rollout) -> list[NDArray[np.float32]]:
        return [weight * kept for weight, kept in zip(rollout.weights, self.trains(rollout), strict=True)]

    def _value_loss(self, value_BT: Tensor, batch: Batch) -> Tensor:
        return_BT = batch.signals[RETURN].to(value_BT.dtype)
        error_BT = self._error(value_BT, return_BT)
        if self.value_clip is None:
            return error_BT
        old_BT = batch.signals[OLD_VALUE].to(value_BT.dtype)
        near_BT = old_BT + (value_BT - old_BT).clamp(-self.value_clip, self.value_clip)
        return torch.maximum(error_BT, self._error(near_BT, return_BT))

    def _error(self, value_BT: Tensor, return_BT: Tensor) -> Tensor:
        if self.huber is None:
            return 0.5 * (value_BT - return_BT).square()
        return huber_loss(value_BT, return_BT, reduction="none", delta=self.huber)
