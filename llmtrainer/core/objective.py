"""What a loss is: named sums, each with the unit it is averaged over."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import ClassVar, Literal

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from llmtrainer.base.config import Kind
from llmtrainer.core.batch import BESIDE, GROUP, Batch, Outputs
from llmtrainer.core.credit import FRESH, State
from llmtrainer.core.rollout import Rollout

Unit = Literal[
    "tokens", "sequences", "pairs", "batches", "beside/tokens", "beside/sequences", "beside/pairs", "beside/batches"
]
"""What can be counted before the first forward pass. `beside/` counts what the signal `beside_S` marks."""


@dataclass(frozen=True)
class Term:
    """One summand of the loss. With `coef=0` it is a metric: summed and logged, never differentiated."""

    name: str
    total: Tensor
    """A SUM over one micro-batch, scalar. Never a mean: a micro-batch cannot know how large its step is."""
    unit: Unit
    """What the sum is divided by, once, with the count of the whole step over all ranks."""
    coef: float = 1.0


class Objective(Kind):
    """Outputs and Batch become Terms. Its fields are its hyperparameters; it knows no device, rank or step."""

    folder: ClassVar[str] = "llmtrainer.objectives"
    default_kind: ClassVar[str] = "causal_lm"

    @property
    def reads(self) -> tuple[str, ...]:
        """Signals a batch must carry."""
        return ()

    @property
    def wants(self) -> tuple[str, ...]:
        """What the policy must compute: names of Outputs' fields without their shape, such as `logp`."""
        return ("logp",)

    @property
    def starts_at(self) -> Mapping[str, float]:
        """Terms that are known beforehand, per unit, while the policy still is its reference: what the first step of
        a run must show. Empty where nothing is known."""
        return {}

    @property
    def compares(self) -> bool:
        """Whether it learns from two answers to one prompt alone, and nothing from a single one."""
        return False

    @property
    def whole_steps(self) -> bool:
        """Whether sequences of a step depend on each other. Where it is cut, `totals` says what they must know."""
        return False

    def totals(self, out: Outputs, batch: Batch) -> Mapping[str, Tensor | float]:
        """Of an objective of whole steps: sums over a micro-batch, the same names for each, an empty one too. Added up
        over the step they go to `with_totals`."""
        raise NotImplementedError

    def with_totals(self, batch: Batch, totals: Mapping[str, float]) -> Batch:
        """The batch with signals that say what the whole step's totals mean for each of its sequences."""
        raise NotImplementedError

    def terms(self, out: Outputs, batch: Batch) -> list[Term]:
        """The summands of this micro-batch's loss, and its metrics."""
        raise NotImplementedError

    def trains(self, rollout: Rollout) -> NDArray[np.bool_]:
        """Which of the R answers are trained. The others shape no statistics and are left out of the step."""
        return rollout.valid_R

    def advance(self, state: State, rollout: Rollout) -> State:
        """What is known between rollouts, with this one as well: to be asked before `credit` of it."""
        return state

    def spread(self, out: Outputs, batch: Batch) -> Mapping[str, Tensor]:
        """Numbers of which a mean says too little, by name: one for each pair or sequence of the micro-batch. Their
        quantiles and their histogram are told at every evaluation."""
        return {}

    def credit(self, rollout: Rollout, state: State = FRESH) -> list[NDArray[np.float64]]:
        """How much better each token of each answer was than expected: R arrays, as long as the answers. Only for
        what learns from its own answers."""
        raise NotImplementedError

    def returns(self, rollout: Rollout, state: State = FRESH) -> list[NDArray[np.float64]] | None:
        """What a critic is to expect from each token on: R arrays as long as the answers; None where there is none."""
        return None


def count(batches: Iterable[Batch]) -> dict[str, float]:
    """How much of each unit the batches hold. Known before the first forward, so a sum can be divided by the
    count of the whole step. `tokens` counts targets by weight, `pairs` every two answers to one prompt."""
    counts = _nothing("")
    for batch in batches:
        if BESIDE not in batch.signals:
            _add(counts, "", batch)
            continue
        counts = {**_nothing("beside/"), **counts}
        beside_S = batch.signals[BESIDE][: batch.sequences] > 0
        _add(counts, "", batch.part(~beside_S))
        _add(counts, "beside/", batch.part(beside_S))
    return counts


def _nothing(prefix: str) -> dict[str, float]:
    return {prefix + unit: 0.0 for unit in ("tokens", "sequences", "pairs", "batches")}


def _add(counts: dict[str, float], prefix: str, batch: Batch) -> None:
    counts[prefix + "tokens"] += float(batch.weights_BT.sum(dtype=torch.float64))
    counts[prefix + "sequences"] += batch.sequences
    counts[prefix + "pairs"] += _pairs(batch)
    counts[prefix + "batches"] += 1


def _pairs(batch: Batch) -> float:
    """n (n - 1) / 2 of each comparison of n answers; where nothing compares, two sequences are a pair."""
    if GROUP not in batch.signals:
        return batch.sequences / 2
    n_G = torch.bincount(batch.signals[GROUP])
    return float((n_G * (n_G - 1)).sum()) / 2


def loss_of(terms: Iterable[Term], counts: Mapping[str, float]) -> Tensor:
    """What to differentiate: the sum of coef * total / count. A unit that does not occur divides by 1: its sum
    is 0 by construction."""
    shares = [term.total * (term.coef / (counts[term.unit] or 1.0)) for term in terms if term.coef]
    return torch.stack(shares).sum() if shares else torch.zeros(())
