"""Answers to one prompt that pull equally hard: a gradient rescaled on its way back."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from llmtrainer.core.batch import GROUP, Batch

WANT = "balanced"
"""Asked of a policy beside what it is to compute: that the gradients of the hidden states are balanced."""


def balanced(hidden_ND: Tensor, batch: Batch, chosen_N: Tensor | None) -> Tensor:
    """The same hidden states. On the way back the gradient of each answer's is scaled to the L2 norm that is smallest
    among the answers to its prompt, so that neither side of a comparison drowns the other. No other prompt has a say,
    so it does not matter how a step is cut.

    hidden_ND: what the head reads of the positions that count, as chosen from the batch.
    """
    owner = batch.sequence_BT.flatten()
    owner_N = (owner if chosen_N is None else owner.index_select(0, chosen_N)).long()
    S = batch.sequences
    group_S = batch.signals[GROUP][:S] if GROUP in batch.signals else torch.arange(S, device=owner_N.device) // 2
    found: Tensor = _Balanced.apply(hidden_ND, owner_N, group_S)
    return found


class _Balanced(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, hidden_ND: Tensor, owner_N: Tensor, group_S: Tensor) -> Tensor:
        ctx.save_for_backward(owner_N, group_S)
        return hidden_ND.view_as(hidden_ND)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient_ND: Tensor) -> tuple[Tensor | None, ...]:
        owner_N, group_S = ctx.saved_tensors
        wide = torch.promote_types(gradient_ND.dtype, torch.float32)
        square_N = gradient_ND.to(wide).square().sum(-1)
        norm_S = square_N.new_zeros(len(group_S) + 1).index_add(0, owner_N + 1, square_N).sqrt()[1:]
        least_S = norm_S.scatter_reduce(0, group_S, norm_S, "amin", include_self=False)[group_S]
        scale_S = torch.where(norm_S > 0, least_S / norm_S, 1.0)
        # Place 0 is what belongs to no answer; it keeps its gradient.
        scale_N = torch.cat([scale_S.new_ones(1), scale_S])[owner_N + 1]
        return gradient_ND * scale_N[:, None].to(gradient_ND.dtype), None, None
