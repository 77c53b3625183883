"""RMSNorm with a backward of its own: little is kept, and the weight's gradient is summed where the cache is."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

_SUMMED_ROWS = 64
"""Rows whose part of a norm's weight gradient is summed at a time: they stay in a core's cache meanwhile."""


def rms_norm(x: Tensor, weight_D: Tensor, epsilon: float, out_type: torch.dtype) -> Tensor:
    """x / rms(x) * weight over the last axis in float32 or wider, rounded once, at the end (arXiv:1910.07467)."""
    return _RMSNorm.apply(x, weight_D, epsilon, out_type)  # type: ignore[no-any-return]


class _RMSNorm(torch.autograd.Function):
    """Keeps its input and one number a row for backward, where autograd would keep every intermediate in float32."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight_D: Tensor, epsilon: float, out_type: torch.dtype) -> Tensor:
        wide = x.to(torch.promote_types(x.dtype, torch.float32))
        inverse = torch.rsqrt(wide.square().mean(-1, keepdim=True) + epsilon)
        ctx.save_for_backward(x, weight_D, inverse)
        return (wide * inverse * weight_D).to(out_type)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, weight_D, inverse = ctx.saved_tensors
        wide = grad.to(inverse.dtype)
        normed = x.to(inverse.dtype) * inverse
        x_grad = weight_grad = None
        if ctx.needs_input_grad[0]:
            weighted = wide * weight_D
            x_grad = (inverse * (weighted - normed * (weighted * normed).mean(-1, keepdim=True))).to(x.dtype)
        if ctx.needs_input_grad[1]:
            products_ND = (wide * normed).flatten(0, -2)
            rows = products_ND.shape[0] - products_ND.shape[0] % _SUMMED_ROWS
            parts = products_ND[:rows].unflatten(0, (-1, _SUMMED_ROWS)).sum(1) if rows else products_ND[:0]
            weight_grad = parts.sum(0) + products_ND[rows:].sum(0)
        return x_grad, weight_grad, None, None
