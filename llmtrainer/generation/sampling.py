"""From logits to the next token: pure functions on [B, V], with randomness that each draw owns."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from pydantic import Field
from torch import Tensor

from llmtrainer.base.config import Config
from llmtrainer.base.errors import UserError
from llmtrainer.core.randomness import derive


class Sampling(Config):
    """How the next token is chosen, and when a completion has to end."""

    temperature: float = Field(default=1.0, ge=0.0, allow_inf_nan=False)
    """Logits are divided by it: below 1 bolder, above 1 more varied, 0 always the most likely token."""

    top_k: int = Field(default=0, ge=0)
    """Draw from this many most likely tokens; those as likely as the last of them stay too. 0: from all."""

    top_p: float = Field(default=1.0, gt=0.0, le=1.0)
    """Draw from the fewest most likely tokens that together have at least this probability. 1: from all."""

    max_new_tokens: int = Field(default=128, ge=1)
    """Tokens a completion may have, its end token included. The model's context length bounds it too."""

    suppress: tuple[int, ...] = ()
    """Ids that are never chosen."""


def suppressed(logits_BV: Tensor, ids: Sequence[int], vocabulary: int | None = None) -> Tensor:
    """Logits in which some ids, and all at or above `vocabulary` (rows that only pad the head), are
    impossible."""
    V = logits_BV.shape[1]
    if not ids and (vocabulary is None or vocabulary >= V):
        return logits_BV
    logits_BV = logits_BV.clone()
    logits_BV[:, V if vocabulary is None else vocabulary :] = -torch.inf
    if ids:
        outside = [number for number in ids if not 0 <= number < V]
        if outside:
            raise UserError(f"suppress names id {outside[0]:,}", why=f"the model has ids 0 to {V - 1:,}")
        logits_BV[:, list(ids)] = -torch.inf
    return logits_BV


def distribution(logits_BV: Tensor, sampling: Sampling) -> Tensor:
    """What is drawn from: temperature, then top-k, then top-p of what top-k left; each row sums to 1.

    Temperature 0 is the limit: all probability on the most likely token, the lowest id of equal ones.
    """
    if sampling.temperature == 0.0:
        return torch.zeros_like(logits_BV).scatter_(1, greedy(logits_BV)[:, None], 1.0)
    # The largest logit is subtracted first: a tiny temperature would take the quotient past the largest
    # float.
    scaled_BV = (logits_BV - logits_BV.max(dim=1, keepdim=True).values) / sampling.temperature
    if 0 < sampling.top_k < logits_BV.shape[1]:
        least_B1 = scaled_BV.topk(sampling.top_k, dim=1).values[:, -1:]
        scaled_BV = scaled_BV.masked_fill(scaled_BV < least_B1, -torch.inf)
    probability_BV = scaled_BV.softmax(dim=1)
    if sampling.top_p < 1.0:
        ordered_BV, id_BV = probability_BV.sort(dim=1, descending=True, stable=True)
        before_BV = ordered_BV.double().cumsum(dim=1) - ordered_BV
        kept_BV = ordered_BV.masked_fill(before_BV >= sampling.top_p, 0.0)
        probability_BV = torch.zeros_like(probability_BV).scatter_(1, id_BV, kept_BV)
        probability_BV = probability_BV / probability_BV.sum(dim=1, keepdim=True)
    return probability_BV


def greedy(logits_BV: Tensor) -> Tensor:
    """The most likely id of each row [B], the lowest of equal ones."""
    # argmax may give any of equal ones, and another one on another device.
    V = logits_BV.shape[1]
    id_V = torch.arange(V, device=logits_BV.device)
    best_BV = logits_BV == logits_BV.max(dim=1, keepdim=True).values
    return id_V.where(best_BV, V).min(dim=1).values


def draw(probability_BV: Tensor, uniform_B: Tensor) -> Tensor:
    """The id [B] at which the running sum of a row first exceeds its uniform number, which is in [0, 1).

    By sum and search: torch.multinomial takes twenty times as long on a CPU, and its draws depend on the rows
    beside it.
    """
    running_BV = probability_BV.double().cumsum(dim=1)
    # Divided by its own end, the sum ends at exactly 1, above every uniform number: the search cannot run
    # over, and as it looks for what exceeds, it never stops at an id of probability 0.
    running_BV = running_BV / running_BV[:, -1:]
    return torch.searchsorted(running_BV, uniform_B.to(running_BV)[:, None], right=True)[:, 0]


def uniform(seed: int, row: int, position: int) -> float:
    """A number in [0, 1) that is a function of (seed, row, position): what a row says depends on no other
    row, nor on how rows share batches."""
    return (derive(seed, "draw", row, position) >> 9) * 2.0**-53


def choose(logits_BV: Tensor, sampling: Sampling, uniform_B: Tensor, vocabulary: int | None = None) -> Tensor:
    """The next token of each row: [B]."""
    logits_BV = suppressed(logits_BV, sampling.suppress, vocabulary)
    if not torch.isfinite(logits_BV.max(dim=1).values).all():
        raise UserError(
            "the model gives no number for the next token",
            why="its logits are NaN or infinite, or every id is suppressed",
            fix="use an earlier checkpoint; if it is the same there, look at the loss before it was saved",
        )
    if sampling.temperature == 0.0:
        return greedy(logits_BV)
    return draw(distribution(logits_BV, sampling), uniform_B)
