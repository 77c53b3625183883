"""From logits to the next token: pure functions on [B, V], with randomness that each draw owns."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal, Self

import torch
import torch.nn.functional as F
from pydantic import Field, model_validator
from torch import Tensor

from llmtrainer.base.config import Config
from llmtrainer.base.errors import UserError
from llmtrainer.core.randomness import derive


class Sampling(Config):
    """How the next token is chosen, and when a completion has to end.

    In this order: repetition penalty, presence and frequency penalty, impossible ids, temperature, top-k, top-p,
    min-p. Each step sees what the one before it left.
    """

    temperature: float = Field(default=1.0, ge=0.0, allow_inf_nan=False)
    """Logits are divided by it: below 1 bolder, above 1 more varied, 0 always the most likely token."""

    top_k: int = Field(default=0, ge=0)
    """Draw from this many most likely tokens; those as likely as the last of them stay too. 0: from all."""

    top_p: float = Field(default=1.0, gt=0.0, le=1.0)
    """Draw from the fewest most likely tokens that together have at least this probability. 1: from all."""

    min_p: float = Field(default=0.0, ge=0.0, le=1.0)
    """Draw from tokens at least this many times as likely as the likeliest (arXiv:2407.01082). 0: from all."""

    repetition_penalty: float = Field(default=1.0, ge=1e-4, le=1e4)
    """Logits of tokens that occurred are divided by it where they are positive, multiplied where negative
    (arXiv:1909.05858 divides all). 1: no penalty; 1.2 is usual; below 1 it is a reward."""

    presence_penalty: float = Field(default=0.0, ge=-1e4, le=1e4)
    """Subtracted from the logits of tokens that occurred, however often."""

    frequency_penalty: float = Field(default=0.0, ge=-1e4, le=1e4)
    """Subtracted from a token's logit once for every time it occurred."""

    penalty_over: Literal["completion", "prompt", "both"] = "completion"
    """Where a token must have occurred for the three penalties: in what was written so far, in the prompt, or in
    either. transformers counts both, OpenAI's interface only what was written."""

    penalty_exempt: tuple[int, ...] = ()
    """Ids that no penalty changes, for example the newline's."""

    max_new_tokens: int = Field(default=128, ge=1)
    """Tokens a completion may have, its end token included. The model's context length bounds it too."""

    min_new_tokens: int = Field(default=0, ge=0)
    """The first so many tokens are neither the end nor a stop id, and no stop string is looked for in them. The
    model's context may still end a completion before."""

    suppress: tuple[int, ...] = ()
    """Ids that are never chosen."""

    stop_ids: tuple[int, ...] = ()
    """Ids that end a completion, as the tokenizer's own end does; they are no part of its text."""

    stop: tuple[str, ...] = ()
    """Strings that end a completion, wherever tokens cut them; its text is what stands before the first."""

    logprobs: int | None = Field(default=None, ge=0)
    """Tell the log-probability of every chosen token, and of so many most likely ones beside it. None: of none."""

    @model_validator(mode="after")
    def _possible(self) -> Self:
        if self.min_new_tokens > self.max_new_tokens:
            raise UserError(
                f"min_new_tokens={self.min_new_tokens} is more than max_new_tokens={self.max_new_tokens}",
                fix=f"max_new_tokens={self.min_new_tokens}",
            )
        if "" in self.stop:
            raise UserError(
                "a stop string is empty", why="every text would end before its first character",
                fix="leave it out, or write the characters that end a text",
            )
        return self

    @property
    def penalises(self) -> bool:
        """Whether anything depends on which tokens occurred."""
        return self.repetition_penalty != 1.0 or self.presence_penalty != 0.0 or self.frequency_penalty != 0.0

    @property
    def truncates(self) -> bool:
        """Whether some ids are left out because they are unlikely, which differs from token to token."""
        filters = self.top_k > 0 or self.top_p < 1.0 or self.min_p > 0.0
        return filters and self.temperature > 0.0


def penalised(logits_BV: Tensor, sampling: Sampling, count_BV: Tensor) -> Tensor:
    """Logits after the penalties; `count_BV` says how often each id occurred, 0 for exempt ones."""
    seen_BV = count_BV > 0
    if (factor := sampling.repetition_penalty) != 1.0:
        weaker_BV = torch.where(logits_BV > 0, logits_BV / factor, logits_BV * factor)
        logits_BV = torch.where(seen_BV, weaker_BV, logits_BV)
    if sampling.presence_penalty:
        logits_BV = logits_BV - sampling.presence_penalty * seen_BV.to(logits_BV.dtype)
    if sampling.frequency_penalty:
        logits_BV = logits_BV - sampling.frequency_penalty * count_BV.to(logits_BV.dtype)
    return logits_BV


def suppressed(logits_BV: Tensor, ids: Sequence[int], vocabulary: int | None = None) -> Tensor:
    """Logits in which some ids, and all at or above `vocabulary` (rows that only pad the head), are
    impossible."""
    V = logits_BV.shape[1]
    if not ids and (vocabulary is None or vocabulary >= V):
        return logits_BV
    require_ids(ids, V, "suppress")
    logits_BV = logits_BV.clone()
    logits_BV[:, V if vocabulary is None else vocabulary :] = -torch.inf
    logits_BV[:, list(ids)] = -torch.inf
    return logits_BV


def require_ids(ids: Sequence[int], V: int, name: str) -> None:
    """UserError if one of the ids that the user calls `name` is not among V."""
    outside = [number for number in ids if not 0 <= number < V]
    if outside:
        raise UserError(f"{name} names id {outside[0]:,}", why=f"the model has ids 0 to {V - 1:,}")


def distribution(logits_BV: Tensor, sampling: Sampling) -> Tensor:
    """What is drawn from: temperature, then top-k, then top-p of what top-k left, then min-p; each row sums to 1.

    Temperature 0 is the limit: all probability on the most likely token, the lowest id of equal ones. One that the
    logits' type would round to 0 is taken for it.
    """
    if sampling.temperature < torch.finfo(logits_BV.dtype).tiny:
        return torch.zeros_like(logits_BV).scatter_(1, greedy(logits_BV)[:, None], 1.0)
    if sampling.temperature != 1.0:
        # The largest logit is subtracted first: a tiny temperature would take the quotient past the largest
        # float.
        logits_BV = (logits_BV - logits_BV.amax(dim=1, keepdim=True)).div_(sampling.temperature)
    if 0 < sampling.top_k < logits_BV.shape[1]:
        least_B1 = logits_BV.topk(sampling.top_k, dim=1).values[:, -1:]
        logits_BV = logits_BV.masked_fill(logits_BV < least_B1, -torch.inf)
    probability_BV = logits_BV.softmax(dim=1)
    if sampling.top_p == 1.0 and sampling.min_p == 0.0:
        return probability_BV
    if sampling.top_p < 1.0:
        probability_BV = probability_BV.masked_fill(~_nucleus(probability_BV, sampling.top_p), 0.0)
    if sampling.min_p > 0.0:
        least_B1 = sampling.min_p * probability_BV.amax(dim=1, keepdim=True)
        probability_BV = probability_BV.masked_fill(probability_BV < least_B1, 0.0)
    return probability_BV / probability_BV.sum(dim=1, keepdim=True)


_NUCLEUS = 1024
"""Ids that are put in order first. A whole vocabulary takes six times as long and is hardly ever needed."""


def _nucleus(probability_BV: Tensor, top_p: float) -> Tensor:
    """bool [B, V]: the fewest most likely ids that together have at least `top_p`, the lower of equal ones first."""
    V = probability_BV.shape[1]
    for size in (min(_NUCLEUS, V), V):
        value_BN = probability_BV.topk(size, dim=1).values
        inside_BN = value_BN.double().cumsum(dim=1) - value_BN < top_p
        if not inside_BN[:, -1].any():
            break
    number_B1 = inside_BN.sum(dim=1, keepdim=True)
    least_B1 = value_BN.gather(1, number_B1 - 1)
    above_BV, equal_BV = probability_BV > least_B1, probability_BV == least_B1
    wanted_B1 = number_B1 - above_BV.sum(dim=1, keepdim=True)
    if not torch.equal(wanted_B1, equal_BV.sum(dim=1, keepdim=True)):     # logits from 16 bits are often equal
        equal_BV = equal_BV & (equal_BV.cumsum(dim=1) <= wanted_B1)
    return above_BV | equal_BV


def greedy(logits_BV: Tensor) -> Tensor:
    """The most likely id of each row [B], the lowest of equal ones."""
    # argmax may give any of equal ones, and another one on another device.
    V = logits_BV.shape[1]
    id_V = torch.arange(V, device=logits_BV.device, dtype=torch.int32)
    best_BV = logits_BV == logits_BV.amax(dim=1, keepdim=True)
    return id_V.where(best_BV, V).amin(dim=1).long()


_BLOCK = 64
"""Ids whose probabilities are first added up together. Vocabularies are padded to multiples of 64."""


def draw(probability_BV: Tensor, uniform_B: Tensor) -> Tensor:
    """The id [B] at which the running sum of a row first exceeds its uniform number, which is in [0, 1).

    By sum and search: torch.multinomial takes fifteen times as long on a CPU, and its draws depend on the rows
    beside it. First the block of ids is found, then the id in it, so that only few numbers need 64 bits.
    """
    B, V = probability_BV.shape
    padded_BV = F.pad(probability_BV, (0, -V % _BLOCK)) if V % _BLOCK else probability_BV
    blocks_BNW = padded_BV.view(B, -1, _BLOCK)
    uniform_B1 = uniform_B.to(probability_BV.device, torch.float64)[:, None]
    sum_BN = blocks_BNW.sum(dim=-1).double()
    running_BN = sum_BN.cumsum(dim=1)
    # Divided by its own end, a sum ends at exactly 1, above every uniform number: the search cannot run over,
    # and as it looks for what exceeds, it never stops at a block or an id of probability 0.
    end_B1 = running_BN[:, -1:]
    block_B1 = torch.searchsorted(running_BN / end_B1, uniform_B1, right=True)
    mass_B1 = sum_BN.gather(1, block_B1)
    before_B1 = running_BN.gather(1, block_B1) - mass_B1
    share_B1 = ((uniform_B1 * end_B1 - before_B1) / mass_B1).clamp(0.0, 1.0 - 2.0**-53)
    inside_BW = blocks_BNW.gather(1, block_B1[:, :, None].expand(-1, -1, _BLOCK))[:, 0].double().cumsum(dim=1)
    place_B1 = torch.searchsorted(inside_BW / inside_BW[:, -1:], share_B1, right=True)
    return (block_B1 * _BLOCK + place_B1)[:, 0]


def uniform(seed: int, row: int, position: int) -> float:
    """A number in [0, 1) that is a function of (seed, row, position): what a row says depends on no other
    row, nor on how rows share batches."""
    return (derive(seed, "draw", row, position) >> 9) * 2.0**-53


def choose(
    logits_BV: Tensor, sampling: Sampling, uniform_B: Tensor, vocabulary: int | None = None
) -> tuple[Tensor, Tensor]:
    """The next token of each row [B], and the log-probability [B] with which it was drawn, in float32 or wider.

    `logits_BV` are those after the penalties.
    """
    logits_BV = possible(logits_BV, sampling, vocabulary)
    if sampling.temperature == 0.0:
        token_B = greedy(logits_BV)
        return token_B, torch.zeros_like(token_B, dtype=logits_BV.dtype)
    probability_BV = distribution(logits_BV, sampling)
    token_B = draw(probability_BV, uniform_B)
    return token_B, probability_BV.gather(1, token_B[:, None])[:, 0].log()


def possible(logits_BV: Tensor, sampling: Sampling, vocabulary: int | None = None) -> Tensor:
    """Logits without the ids that may not be chosen. UserError where nothing is left or the model has no number."""
    logits_BV = suppressed(logits_BV, sampling.suppress, vocabulary)
    if not torch.isfinite(logits_BV.amax(dim=1)).all():
        raise UserError(
            "the model gives no number for the next token",
            why="its logits are NaN or infinite, or every id is suppressed",
            fix="use an earlier checkpoint; if it is the same there, look at the loss before it was saved",
        )
    return logits_BV
