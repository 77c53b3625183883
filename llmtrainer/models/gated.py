"""The gated MLP with a backward of its own: one sigmoid, and half the activations kept."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from llmtrainer.core.products import add_product, linear, product, weight_gradient

Weights = tuple[Tensor, Tensor, Tensor]
"""Masters of gate [F, D], up [F, D] and down [D, F]."""
Biases = tuple[Tensor | None, Tensor | None, Tensor | None]


def gated_mlp(x_BTD: Tensor, weights: Weights, biases: Biases, turned: bool = False) -> Tensor:
    """down(silu(gate(x)) * up(x)) in the type of x.

    Kept for backward are x, gate(x) and up(x); their product [.., F], which autograd would keep twice, is computed
    again there, for TILE tokens at a time. `turned`: see core/products.py.
    """
    return _GatedMLP.apply(x_BTD.flatten(0, -2), *weights, *biases, turned).view(*x_BTD.shape[:-1], -1)


TILE = 2048
"""Tokens whose products and gradients of width F exist at one time, beside what waits for backward. Smaller tiles make
products slower."""


def tiles(tokens: int) -> list[slice]:
    """Places of so many tokens at a time. A compiler sees all as one: their number would be part of what it makes, and
    it keeps what lies between two products out of memory by itself."""
    if torch.compiler.is_compiling():
        return [slice(None)]
    return [slice(start, start + TILE) for start in range(0, max(tokens, 1), TILE)]


def plus(before: Tensor | None, more: Tensor | None) -> Tensor | None:
    """The sum over tiles so far, in the memory of the first."""
    return more if before is None or more is None else before.add_(more)


class _GatedMLP(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x_ND: Tensor, gate_FD: Tensor, up_FD: Tensor, down_DF: Tensor, gate_F: Tensor | None,
        up_F: Tensor | None, down_D: Tensor | None, turned: bool,
    ) -> Tensor:
        narrow = x_ND.dtype
        gate_w, up_w, down_w = gate_FD.to(narrow), up_FD.to(narrow), down_DF.to(narrow)
        gate_NF = linear(x_ND, gate_w, _cast(gate_F, narrow))
        up_NF = linear(x_ND, up_w, _cast(up_F, narrow))
        ctx.save_for_backward(x_ND, gate_NF, up_NF, gate_w, up_w, down_w)
        ctx.turned, ctx.master = turned, gate_FD.dtype
        bias_D = _cast(down_D, narrow)
        parts = [linear(F.silu(gate_NF[one]) * up_NF[one], down_w, bias_D) for one in tiles(len(x_ND))]
        return joined(parts)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_ND: Tensor) -> tuple[Tensor | None, ...]:
        x_ND, gate_NF, up_NF, gate_w, up_w, down_w = ctx.saved_tensors
        turned, master, needs = ctx.turned, ctx.master, ctx.needs_input_grad
        grad_ND = grad_ND.contiguous()
        x_parts: list[Tensor] = []
        sums: list[Tensor | None] = [None] * 6
        for one in tiles(len(x_ND)):
            x, grad = x_ND[one], grad_ND[one]
            gated, gate_grad, up_grad = differentiate_product(gate_NF[one], up_NF[one], product(grad, down_w))
            if needs[0]:
                x_parts.append(add_product(product(gate_grad, gate_w), up_grad, up_w))
            pairs = ((gate_grad, x), (up_grad, x), (grad, gated))
            weights = (
                weight_gradient(to, of, master, turned) if need else None
                for need, (to, of) in zip(needs[1:4], pairs, strict=True)
            )
            biases = (to.to(master).sum(0) if need else None for need, (to, _) in zip(needs[4:7], pairs, strict=True))
            sums = [plus(before, more) for before, more in zip(sums, (*weights, *biases), strict=True)]
        return (joined(x_parts) if needs[0] else None, *sums, None)


def joined(parts: list[Tensor]) -> Tensor:
    return parts[0] if len(parts) == 1 else torch.cat(parts)


def differentiate_product(gate_NF: Tensor, up_NF: Tensor, grad_NF: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """silu(gate) * up, and the gradients of gate and up, given that of the product.

    d silu(z) / dz = s (1 + z (1 - s)) with s = sigmoid(z).
    """
    if not torch.compiler.is_compiling():
        silu_NF = F.silu(gate_NF)
        return silu_NF * up_NF, torch.ops.aten.silu_backward(grad_NF * up_NF, gate_NF), grad_NF * silu_NF
    # Written out, a compiler needs one exponential where the library's two functions would cost it two.
    narrow, wide = gate_NF.dtype, torch.promote_types(gate_NF.dtype, torch.float32)
    gate, up, grad = gate_NF.to(wide), up_NF.to(wide), grad_NF.to(wide)
    share = torch.sigmoid(gate)
    silu = gate * share
    gate_grad = grad * up * share * (1.0 + gate * (1.0 - share))
    return (silu * up).to(narrow), gate_grad.to(narrow), (grad * silu).to(narrow)


def _cast(bias: Tensor | None, dtype: torch.dtype) -> Tensor | None:
    return None if bias is None else bias.to(dtype)
