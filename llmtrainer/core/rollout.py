"""Answers that a policy gave, what they earned, and who gave them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from llmtrainer.core.example import Message
from llmtrainer.core.maths import divergence


@dataclass(frozen=True)
class Prompt:
    """What a policy is asked to answer."""

    messages: tuple[Message, ...]
    """The turns to answer; empty where the prompt was tokens."""
    tokens: tuple[int, ...]
    """What the model reads before it answers: 1 at least."""
    facts: Mapping[str, Any] = field(default_factory=dict)
    """What else the record holds, such as the reference answer."""
    plain: bool = False
    """Text as it stands, without a template."""


@dataclass(frozen=True)
class Answer:
    """One answer as a reward sees it."""

    prompt: tuple[Message, ...]
    """The turns that it answers; empty where the prompt was tokens."""
    text: str
    """What was written, without control tokens."""
    tokens: tuple[int, ...]
    """The ids that were sampled and are trained, the end token included where it was reached."""
    finish: str
    """`end`, `stop`, or `length`: whether it came to its end."""
    facts: Mapping[str, Any] = field(default_factory=dict)
    """What else the prompt's record holds, such as the reference answer."""


@dataclass(frozen=True)
class Verdict:
    """What one answer earned; where that could not be worked out, or is nothing, why."""

    value: float | None
    """None: it could not be worked out. The answer leaves the statistics of its group."""
    reason: str | None = None
    """In a few words that many answers share, such as `no number` or `time`: they are counted."""
    parts: Mapping[str, float | None] = field(default_factory=dict)
    """What each reward of a sum gave it, without weights, by name."""


@dataclass(frozen=True)
class Rollout:
    """R answers to some prompts, in groups that answer the same one."""

    prompts: tuple[NDArray[np.int64], ...]
    """Ids of the prompt of each answer, R of them."""
    answers: tuple[NDArray[np.int64], ...]
    """Ids that follow the prompt: what was sampled, and between turns what the environment said."""
    weights: tuple[NDArray[np.float32], ...]
    """1 for each sampled token and 0 for each that the environment said."""
    old_logp: tuple[NDArray[np.float64], ...]
    """What the policy that wrote it gave each token; 0 where the weight is 0."""
    group_R: NDArray[np.int64]
    """The number of the prompt that each answer belongs to, ascending from 0."""
    reward_R: NDArray[np.float64]
    """What each answer earned; NaN where no reward could be worked out."""
    ended_R: NDArray[np.bool_]
    """Whether each answer came to its end by itself."""
    version: str
    """Hash of the weights that wrote them."""
    trainer_logp: tuple[NDArray[np.float64], ...] | None = None
    """What the trainer itself gives each token at that time; None: the same as the policy that wrote it."""
    reference_logp: tuple[NDArray[np.float64], ...] | None = None
    """What the reference gives each token."""
    values: tuple[NDArray[np.float64], ...] | None = None
    """What the critic expected before each token."""

    @property
    def valid_R(self) -> NDArray[np.bool_]:
        """Answers that count: those without a reward leave the statistics of their group and are not trained."""
        return ~np.isnan(self.reward_R)

    def divergence(self, estimator: str) -> list[NDArray[np.float64]]:
        """How far the trainer's policy of that time is from the reference at each token, in nats: an estimate by
        `k1`, `k2` or `k3` of core.maths.divergence; 0 where the weight is 0."""
        assert self.reference_logp is not None
        policy = self.old_logp if self.trainer_logp is None else self.trainer_logp
        found = []
        for mine, reference, weight in zip(policy, self.reference_logp, self.weights, strict=True):
            each = divergence(estimator, torch.from_numpy(mine), torch.from_numpy(reference)).numpy()
            found.append(np.where(weight > 0, each, 0.0))
        return found
