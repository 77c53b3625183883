"""What sequences of a step must know of each other, where the step is cut: over micro-batches and over ranks."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence

import torch

from llmtrainer.core.batch import Batch
from llmtrainer.core.objective import Objective
from llmtrainer.core.protocols import Annotator, Engine, annotated


@torch.no_grad()
def knowing_each_other(
    engine: Engine, objective: Objective, batches: Sequence[Batch], annotators: Sequence[Annotator]
) -> list[Batch]:
    """The micro-batches of a step on the engine's device, annotated, each with what its objective works out over all
    sequences of the step. Costs one forward pass without a gradient; where one micro-batch is the whole step, nothing:
    there the objective sees all of them by itself."""
    known = [annotated(batch.to(engine.device), annotators) for batch in batches]
    if engine.sum({"batches": float(len(known))})["batches"] <= 1:
        return known
    totals: Counter[str] = Counter()
    for batch in known:
        totals.update(_numbers(objective.totals(engine.forward(batch, objective.wants), batch)))
    summed = engine.sum(totals)
    return [objective.with_totals(batch, summed) for batch in known]


def _numbers(totals: Mapping[str, torch.Tensor | float]) -> dict[str, float]:
    return {name: float(value) for name, value in totals.items()}
