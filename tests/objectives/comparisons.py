"""Comparisons as objectives meet them: one answer a row, and log-probabilities given as sums."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch

from llmtrainer.core.batch import GROUP, REFERENCE, Batch, Outputs
from llmtrainer.core.objective import Objective, count
from tests.worlds import row_batch

Sides = tuple[Outputs, Batch]


def answers(policy: Sequence[Sequence[float]], reference: Sequence[Sequence[float]] | None = None) -> Sides:
    """One row for each list of per-token log-probabilities, better and worse in turn, behind a prompt of two tokens."""
    lengths = [len(tokens) for tokens in policy]
    batch = row_batch([[0] * (2 + length) for length in lengths])
    weights = batch.weights_BT.clone()
    weights[:, 0] = 0.0
    batch = replace(batch, weights_BT=weights)
    signals = {} if reference is None else {REFERENCE: placed(reference, batch)}
    return Outputs(logp_BT=placed(policy, batch).requires_grad_()), replace(batch, signals=signals)


def placed(values: Sequence[Sequence[float]], batch: Batch) -> torch.Tensor:
    """Numbers of the answers' tokens in their places, float64, 0 elsewhere."""
    found = torch.zeros(batch.weights_BT.shape, dtype=torch.float64)
    for row, tokens in enumerate(values):
        found[row, 1 : 1 + len(tokens)] = torch.tensor(tokens, dtype=torch.float64)
    return found


def grouped(sides: Sides, sizes: Sequence[int]) -> Sides:
    """The same with as many answers to each prompt as named."""
    out, batch = sides
    group_S = torch.repeat_interleave(torch.arange(len(sizes)), torch.tensor(sizes))
    return out, replace(batch, signals={**batch.signals, GROUP: group_S})


def per_unit(objective: Objective, sides: Sides) -> dict[str, float]:
    """Every Term divided by the count of its unit, as a log shows it."""
    out, batch = sides
    counts = count([batch])
    return {term.name: float(term.total.detach()) / counts[term.unit] for term in objective.terms(out, batch)}
