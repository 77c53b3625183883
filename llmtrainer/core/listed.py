"""Log-probabilities of K given ids at every position, and of all others together, without the logits of a batch."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from llmtrainer.core.batch import TEACHER_IDS, TEACHER_LOGP, TEACHER_TEMPERATURE, Batch
from llmtrainer.core.few_shapes import padding
from llmtrainer.core.products import widened

WANTS = ("listed_logp", "rest_logp")
"""What of Outputs is worked out here."""


def asked(batch: Batch, chosen_N: Tensor | None) -> tuple[Tensor, float]:
    """The ids [N, K] that a teacher listed for the chosen positions, and its temperature."""
    ids_NK = batch.signals[TEACHER_IDS].flatten(0, 1)
    temperature = float(batch.signals[TEACHER_TEMPERATURE]) if TEACHER_TEMPERATURE in batch.signals else 1.0
    return ids_NK if chosen_N is None else ids_NK.index_select(0, chosen_N), temperature


@torch.no_grad()
def told_by(
    hidden_BTD: Tensor, weight_VD: Tensor, batch: Batch, k: int, temperature: float = 1.0, rows: int = 1024
) -> dict[str, Tensor]:
    """What a teacher says of a batch, as signals: its k likeliest ids at each target that counts, their
    log-probabilities at that temperature, and the temperature. At other targets it says nothing: ids from 0, of 0.

    hidden_BTD, weight_VD: what the teacher's head reads, and its rows. The logits of `rows` positions exist at one
    time.
    """
    wide = torch.promote_types(hidden_BTD.dtype, torch.float32)
    hidden_ND = widened(hidden_BTD.flatten(0, 1))
    weight = widened(weight_VD.to(hidden_BTD.dtype))
    ids_NK = torch.arange(k, device=weight.device).repeat(len(hidden_ND), 1)
    logp_NK = torch.zeros(ids_NK.shape, dtype=wide, device=weight.device)
    counting_N = batch.weights_BT.flatten().nonzero()[:, 0]
    if more := padding(len(counting_N), hidden_ND.device, hidden_ND.dtype):
        # The last one again: what is said of it is the same.
        counting_N = torch.cat([counting_N, counting_N[-1:].expand(more)])
    for places in counting_N.split(rows):
        every = (hidden_ND[places] @ weight.t()).to(wide) / temperature
        best = every.topk(k, dim=-1)
        ids_NK[places] = best.indices
        logp_NK[places] = best.values - every.logsumexp(-1, keepdim=True)
    shape = (*batch.tokens_BT.shape, k)
    told = {TEACHER_IDS: ids_NK.view(shape), TEACHER_LOGP: logp_NK.view(shape)}
    return {**told, TEACHER_TEMPERATURE: torch.tensor(temperature, device=weight.device)}


def log_probabilities(
    hidden_ND: Tensor, weight_VD: Tensor, ids_NK: Tensor, temperature: float, rows: int
) -> dict[str, Tensor]:
    """`listed_logp` [N, K] and `rest_logp` [N] of softmax(hidden weight^T / temperature), float32 or wider.

    The logits of `rows` positions exist at one time; backward computes them again.
    """
    N, narrow, hidden_ND = len(hidden_ND), hidden_ND.dtype, widened(hidden_ND)
    if more := padding(N, hidden_ND.device, hidden_ND.dtype):
        hidden_ND, ids_NK = F.pad(hidden_ND, (0, 0, 0, more)), F.pad(ids_NK, (0, 0, 0, more))
    found = _Listed.apply(hidden_ND, weight_VD, ids_NK, temperature, rows, narrow)
    return {name: value[:N] for name, value in zip(WANTS, found, strict=True)}


def of_logits(logits_NV: Tensor, ids_NK: Tensor, temperature: float) -> dict[str, Tensor]:
    """The same from logits, float32 or wider, of a model that makes them in a way of its own."""
    every_NV = (logits_NV / temperature).log_softmax(-1)
    others_NV = every_NV.scatter(1, ids_NK, float("-inf"))
    return dict(zip(WANTS, (every_NV.gather(1, ids_NK), _log_sum(others_NV)), strict=True))


def _log_sum(logp_NV: Tensor) -> Tensor:
    """Logarithm of the sum of probabilities; -inf, and no NaN on the way back, where there are none."""
    none_N = logp_NV.amax(-1) == float("-inf")
    return logp_NV.masked_fill(none_N[:, None], 0.0).logsumexp(-1).masked_fill(none_N, float("-inf"))


class _Listed(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, hidden_ND: Tensor, weight_VD: Tensor, ids_NK: Tensor, temperature: float, rows: int,
        narrow: torch.dtype,
    ) -> tuple[Tensor, Tensor]:  # fmt: skip
        N, wide = len(hidden_ND), torch.promote_types(hidden_ND.dtype, torch.float32)
        weight = weight_VD.to(narrow).to(hidden_ND.dtype)    # see vocab_head
        listed_NK = hidden_ND.new_empty(ids_NK.shape, dtype=wide)
        partition_N, rest_N = hidden_ND.new_empty(N, dtype=wide), hidden_ND.new_empty(N, dtype=wide)
        for start in range(0, N, rows):
            part = slice(start, start + rows)
            logits = (hidden_ND[part] @ weight.t()).to(wide) / temperature
            partition_N[part] = logits.logsumexp(-1)
            listed_NK[part] = logits.gather(1, ids_NK[part]) - partition_N[part, None]
            # The others by themselves: 1 minus what is listed would keep no digit of a small rest.
            rest_N[part] = logits.scatter_(1, ids_NK[part], float("-inf")).logsumexp(-1) - partition_N[part]
        ctx.save_for_backward(hidden_ND, weight_VD, weight, ids_NK, partition_N, rest_N)
        ctx.temperature, ctx.rows = temperature, rows
        return listed_NK, rest_N

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, listed_grad_NK: Tensor, rest_grad_N: Tensor) -> tuple[Tensor | None, ...]:
        # With p = softmax(z), and q = p of the others scaled to 1: d listed / dz = onehot - p, d rest / dz = q - p.
        hidden_ND, weight_VD, weight, ids_NK, partition_N, rest_N = ctx.saved_tensors
        hidden_grad = torch.empty_like(hidden_ND) if ctx.needs_input_grad[0] else None
        weight_grad = torch.zeros_like(weight_VD) if ctx.needs_input_grad[1] else None
        some_N = rest_N > float("-inf")
        for start in range(0, len(hidden_ND), ctx.rows):
            part = slice(start, start + ctx.rows)
            p = (hidden_ND[part] @ weight.t()).to(partition_N.dtype) / ctx.temperature - partition_N[part, None]
            p = p.exp_()
            rest_grad = torch.where(some_N[part], rest_grad_N[part], 0.0)
            scale = rest_grad * torch.exp(-rest_N[part].masked_fill(~some_N[part], 0.0))
            total = listed_grad_NK[part].sum(-1) + rest_grad
            at_listed = listed_grad_NK[part] - p.gather(1, ids_NK[part]) * total[:, None]
            gradient = p.mul_((scale - total)[:, None]).scatter_(1, ids_NK[part], at_listed)
            gradient = (gradient / ctx.temperature).to(hidden_ND.dtype)
            if hidden_grad is not None:
                hidden_grad[part] = gradient @ weight
            if weight_grad is not None:
                weight_grad += gradient.t() @ hidden_ND[part]
        return hidden_grad, weight_grad, None, None, None, None
