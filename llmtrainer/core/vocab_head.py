"""Hidden states to log-probabilities in chunks of positions: the logits [B, T, V] of a batch are never built."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from llmtrainer.core.batch import Batch, Outputs

WANTS = ("logp", "entropy", "log_partition")
"""What a policy can be asked for: fields of Outputs without their shape."""

_CHUNK_BYTES = 128 * 2**20
"""Size of one chunk of logits where nobody names a chunk. A batch that fits keeps its logits for backward."""
_TILE_ELEMENTS = 2**19
"""Element-wise work goes over tiles of about this many logits, which stay in a core's cache."""


def score(
    hidden_BTD: Tensor, weight_VD: Tensor, batch: Batch, wants: tuple[str, ...], chunk: int | None = None
) -> Outputs:
    """What the objective wants to know of every target whose weight is not 0; exactly 0 elsewhere.

    hidden_BTD: what the head reads, in the compute type. weight_VD: the head's float32 (or float64) rows.
    chunk: positions whose logits exist at one time; None chooses by memory.
    """
    chosen_N = weighted_positions(batch)
    hidden_ND = gather(hidden_BTD, chosen_N)
    return score_gathered(hidden_ND, weight_VD, batch, chosen_N, wants, chunk)


def weighted_positions(batch: Batch) -> Tensor | None:
    """Flat places [N] of the targets that count, or None where all of them do."""
    weights = batch.weights_BT.flatten()
    chosen_N = weights.nonzero().squeeze(1)
    return None if chosen_N.numel() == weights.numel() else chosen_N


def gather(x_BTD: Tensor, chosen_N: Tensor | None) -> Tensor:
    """The chosen positions of all rows: [N, D]."""
    flat = x_BTD.flatten(0, 1)
    return flat if chosen_N is None else flat.index_select(0, chosen_N)


def score_gathered(
    hidden_ND: Tensor,
    weight_VD: Tensor,
    batch: Batch,
    chosen_N: Tensor | None,
    wants: tuple[str, ...],
    chunk: int | None = None,
) -> Outputs:
    """As `score`, for hidden states already gathered at `chosen_N`."""
    assert set(wants) <= set(WANTS), f"a policy cannot compute {sorted(set(wants) - set(WANTS))}"
    targets = batch.targets_BT.flatten()
    targets_N = targets if chosen_N is None else targets.index_select(0, chosen_N)
    found = log_probabilities(hidden_ND, weight_VD, targets_N, wants, chunk)

    def spread(value_N: Tensor | None) -> Tensor | None:
        if value_N is None or chosen_N is None:
            return None if value_N is None else value_N.view(batch.targets_BT.shape)
        whole = value_N.new_zeros(targets.shape).index_copy(0, chosen_N, value_N)
        return whole.view(batch.targets_BT.shape)

    return Outputs(
        logp_BT=spread(found.get("logp")),
        entropy_BT=spread(found.get("entropy")),
        log_partition_BT=spread(found.get("log_partition")),
    )


def log_probabilities(
    hidden_ND: Tensor,
    weight_VD: Tensor,
    targets_N: Tensor,
    wants: tuple[str, ...] = ("logp",),
    chunk: int | None = None,
) -> dict[str, Tensor]:
    """Per position [N], float32 or wider, whatever of WANTS is asked for.

    The product runs in hidden's type, every reduction over the vocabulary in float32 (float64 for float64).
    With more than one chunk, backward computes the logits again instead of keeping them.
    """
    if chunk is None:
        chunk = max(1024, _CHUNK_BYTES // max(1, weight_VD.shape[0] * hidden_ND.element_size()))
    assert chunk > 0
    values = _Head.apply(hidden_ND, weight_VD, targets_N, chunk, "entropy" in wants)
    return {name: value for name, value in zip(WANTS, values, strict=True) if name in wants}


class _Head(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, hidden_ND: Tensor, weight_VD: Tensor, targets_N: Tensor, chunk: int, entropy: bool
    ) -> tuple[Tensor, Tensor | None, Tensor]:
        N = hidden_ND.shape[0]
        wide = torch.promote_types(hidden_ND.dtype, torch.float32)
        weight = weight_VD.to(hidden_ND.dtype)
        logp_N = hidden_ND.new_empty(N, dtype=wide)
        log_partition_N = hidden_ND.new_empty(N, dtype=wide)
        entropy_N = hidden_ND.new_empty(N, dtype=wide) if entropy else None
        logits = None
        for start in range(0, N, chunk):
            logits = hidden_ND[start : start + chunk] @ weight.t()
            for first, last in _tiles(logits):
                rows = slice(start + first, start + last)
                tile = logits[first:last].to(wide)
                log_partition_N[rows] = torch.logsumexp(tile, dim=-1)
                partition_n1 = log_partition_N[rows, None]
                logp_N[rows] = (tile.gather(1, targets_N[rows, None]) - partition_n1).squeeze(1)
                if entropy_N is not None:
                    # From log-probabilities, not from logits: their common offset would cost digits.
                    every_logp = tile - partition_n1
                    entropy_N[rows] = -(every_logp.exp() * every_logp).sum(-1)
        ctx.save_for_backward(hidden_ND, weight_VD, targets_N, log_partition_N, entropy_N)
        ctx.chunk = chunk
        ctx.kept = logits if chunk >= N and any(ctx.needs_input_grad) else None
        return logp_N, entropy_N, log_partition_N

    @staticmethod
    @once_differentiable
    def backward(
        ctx: Any, logp_grad_N: Tensor, entropy_grad_N: Tensor | None, partition_grad_N: Tensor
    ) -> tuple[Tensor | None, Tensor | None, None, None, None]:
        hidden_ND, weight_VD, targets_N, log_partition_N, entropy_N = ctx.saved_tensors
        weight = weight_VD.to(hidden_ND.dtype)
        hidden_grad = torch.empty_like(hidden_ND) if ctx.needs_input_grad[0] else None
        weight_grad = None
        for start in range(0, hidden_ND.shape[0], ctx.chunk):
            rows = slice(start, start + ctx.chunk)
            # Kept logits are overwritten by their own gradient, so a second backward computes them again.
            logits, ctx.kept = ctx.kept, None
            if logits is None:
                logits = hidden_ND[rows] @ weight.t()
            _logits_to_gradient(
                logits, targets_N[rows], log_partition_N[rows], logp_grad_N[rows], partition_grad_N[rows],
                None if entropy_N is None else entropy_N[rows],
                None if entropy_grad_N is None else entropy_grad_N[rows],
            )
            if hidden_grad is not None:
                torch.mm(logits, weight, out=hidden_grad[rows])
            if ctx.needs_input_grad[1]:
                share = logits.t() @ hidden_ND[rows]
                # Shares of chunks add up in the master's type: bfloat16 sums would depend on the chunk.
                weight_grad = share.to(weight_VD.dtype) if weight_grad is None else weight_grad.add_(share)
        if weight_grad is None and ctx.needs_input_grad[1]:
            weight_grad = torch.zeros_like(weight_VD)
        return hidden_grad, weight_grad, None, None, None


def _logits_to_gradient(
    logits: Tensor,
    targets_n: Tensor,
    log_partition_n: Tensor,
    logp_grad_n: Tensor,
    partition_grad_n: Tensor,
    entropy_n: Tensor | None,
    entropy_grad_n: Tensor | None,
) -> None:
    """Overwrite logits z by the gradient of what was computed from them.

    With p = softmax(z) and entropy H: d logp / dz = onehot - p, d log_partition / dz = p,
    d H / dz = -p (log p + H).
    """
    wide = log_partition_n.dtype
    for first, last in _tiles(logits):
        part = slice(first, last)
        every_logp = logits[part].to(wide) - log_partition_n[part, None]
        scale = (partition_grad_n[part] - logp_grad_n[part])[:, None]
        if entropy_grad_n is not None:
            assert entropy_n is not None
            scale = scale - entropy_grad_n[part, None] * (every_logp + entropy_n[part, None])
        gradient = every_logp.exp_().mul_(scale)
        gradient.scatter_add_(1, targets_n[part, None], logp_grad_n[part, None])
        logits[part] = gradient


def _tiles(logits: Tensor) -> list[tuple[int, int]]:
    count, width = logits.shape
    step = max(1, _TILE_ELEMENTS // width) if logits.device.type == "cpu" else max(1, count)
    return [(first, min(first + step, count)) for first in range(0, count, step)]
