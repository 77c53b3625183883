"""From what answers earned to how much better they were than expected: pure functions of numpy arrays, float64.

R answers, each in a group that answers one prompt. A reward of NaN means that there is none: such an answer shapes no
mean and no deviation, and its own credit is 0. Sums run over sorted numbers, so that no order changes a bit.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Self

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float64]


def group_advantage(
    reward_R: Floats, group_R: NDArray[np.int64], scale: str = "population", eps: float = 1e-4
) -> Floats:
    """(r - mean of its group) / (deviation + eps), arXiv:2402.03300 section 4.1.2.

    scale: the deviation of the group by n (`population`) or n - 1 (`sample`), of all answers by n - 1 (`batch`), or
    `none` (arXiv:2503.20783). A group of one, and one that earned the same throughout, gets exactly 0.
    """
    advantage_R = np.zeros(len(reward_R))
    valid_R = ~np.isnan(reward_R)
    every = np.sort(reward_R[valid_R])
    batch_deviation = float(every.std(ddof=1)) if len(every) > 1 else 0.0
    for rows in _groups(group_R, valid_R):
        earned = np.sort(reward_R[rows])
        if earned[0] == earned[-1]:
            continue
        match scale:
            case "population":
                divisor = float(earned.std()) + eps
            case "sample":
                divisor = float(earned.std(ddof=1)) + eps
            case "batch":
                divisor = batch_deviation + eps
            case _:
                divisor = 1.0
        advantage_R[rows] = (reward_R[rows] - earned.mean()) / divisor
    return advantage_R


def leave_one_out(reward_R: Floats, group_R: NDArray[np.int64]) -> Floats:
    """r minus the mean of the others of its group (RLOO, arXiv:2402.14740); 0 where there are no others."""
    advantage_R = np.zeros(len(reward_R))
    for rows in _groups(group_R, ~np.isnan(reward_R)):
        n, earned = len(rows), np.sort(reward_R[rows])
        if earned[0] != earned[-1]:
            advantage_R[rows] = (reward_R[rows] - earned.mean()) * (n / (n - 1))
    return advantage_R


def even_groups(reward_R: Floats, group_R: NDArray[np.int64]) -> NDArray[np.bool_]:
    """Whether each answer's group earned the same throughout, so that it teaches nothing."""
    even_R = np.ones(len(reward_R), dtype=np.bool_)
    for rows in _groups(group_R, ~np.isnan(reward_R)):
        even_R[group_R == group_R[rows[0]]] = reward_R[rows].min() == reward_R[rows].max()
    return even_R


def returns(rewards: Floats, gamma: float = 1.0) -> Floats:
    """What is earned from each token on, later rewards counting gamma per token less."""
    found, ahead = np.zeros(len(rewards)), 0.0
    for place in range(len(rewards) - 1, -1, -1):
        ahead = rewards[place] + gamma * ahead
        found[place] = ahead
    return found


def to_go(reward: float, spent: Floats, weight: NDArray[np.float32], gamma: float = 1.0) -> Floats:
    """The return from each trained token of an answer that earns `reward` at its last one and spends at every one."""
    found, trained = np.zeros(len(spent)), np.flatnonzero(weight > 0)
    if len(trained):
        earned = -spent[trained]
        earned[-1] += reward
        found[trained] = returns(earned, gamma)
    return found


def gae(rewards: Floats, values: Floats, gamma: float, lam: float, *, ended: bool = True) -> tuple[Floats, Floats]:
    """Advantages and returns of one answer's tokens (arXiv:1506.02438, eq. 16).

    values: what the critic expected before each token. Nothing follows an answer that ended; behind one that was cut
    off stands the last value, which may be one more than there are tokens: what was expected after the last.
    """
    n = len(rewards)
    following = np.append(values[1:n], 0.0 if ended or not n else values[-1])
    surprise = rewards + gamma * following - values[:n]
    advantages = returns(surprise, gamma * lam)
    return advantages, advantages + values[:n]


def whiten(values: Sequence[Floats], weights: Sequence[NDArray[np.float32]], *, shift: bool = True) -> list[Floats]:
    """(x - mean) / deviation over all tokens of all answers that count, by n - 1; without shift the mean stays."""
    counting = [value[weight > 0] for value, weight in zip(values, weights, strict=True)]
    every = np.sort(np.concatenate(counting)) if counting else np.zeros(0)
    if len(every) < 2:
        return [np.zeros(len(value)) if shift else value for value in values]
    mean, deviation = float(every.mean()), float(np.sqrt(every.var(ddof=1) + 1e-8))
    back = 0.0 if shift else mean
    return [
        np.where(weight > 0, (value - mean) / deviation + back, 0.0)
        for value, weight in zip(values, weights, strict=True)
    ]


def overlong(length_R: NDArray[np.int64], longest: int, margin: int) -> Floats:
    """0 up to `margin` tokens below the longest answer there may be, then falling in a line to -1 (arXiv:2503.14476,
    eq. 13)."""
    over_R = length_R - (longest - margin)
    return -np.clip(over_R / margin, 0.0, 1.0) if margin else -(length_R > longest).astype(np.float64)


@dataclass(frozen=True)
class Moments:
    """Count, mean and summed squared distance of all rewards so far: state that somebody keeps between rollouts."""

    count: float = 0.0
    mean: float = 0.0
    squares: float = 0.0

    def with_more(self, values: Floats) -> Self:
        """The moments with these as well; NaN leave no trace (Chan et al. 1983, eq. 2.1)."""
        new = np.sort(values[~np.isnan(values)])
        if not len(new):
            return self
        count, away = self.count + len(new), float(new.mean()) - self.mean
        squares = self.squares + float(new.var() * len(new)) + away**2 * self.count * len(new) / count
        return type(self)(count, self.mean + away * len(new) / count, squares)

    @property
    def deviation(self) -> float:
        """By n - 1; 1 where fewer than two are known or all are the same."""
        return float(np.sqrt(self.squares / (self.count - 1))) if self.count > 1 and self.squares > 0 else 1.0

    def normalised(self, values: Floats, *, shift: bool = False, eps: float = 1e-8) -> Floats:
        """Divided by the deviation, after the mean was taken away if `shift`."""
        return (values - (self.mean if shift else 0.0)) / (self.deviation + eps)


@dataclass(frozen=True)
class State:
    """What is known between one rollout and the next: saved with a checkpoint, four numbers."""

    rewards: Moments = Moments()
    """Of every reward so far."""
    kl: float | None = None
    """The weight of the divergence by now; None: the objective's own."""


FRESH = State()


def adapted(coefficient: float, kl: float, target: float, answers: int, horizon: int) -> float:
    """The KL coefficient after a rollout: larger where the policy went farther from the reference than `target` nats an
    answer, smaller where less far; at most by a fifth of answers / horizon (arXiv:1909.08593, section 2.2), and by a
    fifth where a rollout has more answers than that: the paper's own rule would turn the sign at five times as many."""
    error = float(np.clip(kl / target - 1.0, -0.2, 0.2))
    return coefficient * (1.0 + error * min(answers / horizon, 1.0))


def _groups(group_R: NDArray[np.int64], valid_R: NDArray[np.bool_]) -> list[NDArray[np.int64]]:
    """The valid rows of each group, wherever they stand."""
    rows = np.flatnonzero(valid_R)
    order = rows[np.argsort(group_R[rows], kind="stable")]
    return [part for part in np.split(order, np.flatnonzero(np.diff(group_R[order])) + 1) if len(part)]
