"""What a loss is: named sums, each with the unit it is averaged over."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor

from llmtrainer.base.config import Kind
from llmtrainer.core.batch import Batch, Outputs

Unit = Literal["tokens", "sequences", "pairs", "batches"]


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
    reads: ClassVar[tuple[str, ...]] = ()
    """Signals a batch must carry."""

    @property
    def wants(self) -> tuple[str, ...]:
        """What the policy must compute: names of Outputs' fields without their shape, such as `logp`."""
        return ("logp",)

    def terms(self, out: Outputs, batch: Batch) -> list[Term]:
        """The summands of this micro-batch's loss, and its metrics."""
        raise NotImplementedError


def count(batches: Iterable[Batch]) -> dict[str, float]:
    """How much of each unit the batches hold. Known before the first forward, so a sum can be divided by the
    count of the whole step. `tokens` counts targets by weight."""
    counts = {"tokens": 0.0, "sequences": 0.0, "pairs": 0.0, "batches": 0.0}
    for batch in batches:
        counts["tokens"] += float(batch.weights_BT.sum(dtype=torch.float64))
        counts["sequences"] += batch.sequences
        counts["pairs"] += batch.sequences / 2
        counts["batches"] += 1
    return counts


def loss_of(terms: Iterable[Term], counts: Mapping[str, float]) -> Tensor:
    """What to differentiate: the sum of coef * total / count. A unit that does not occur divides by 1: its sum
    is 0 by construction."""
    shares = [term.total * (term.coef / (counts[term.unit] or 1.0)) for term in terms if term.coef]
    return torch.stack(shares).sum() if shares else torch.zeros(())
