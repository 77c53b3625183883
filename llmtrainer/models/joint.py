"""Several linear layers of one input as one product: fewer, wider matrices, and one gradient of the input."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from llmtrainer.core.products import linear, product, weight_gradient


def joint_linear(
    x_BTD: Tensor, weights: tuple[Tensor, ...], biases: tuple[Tensor | None, ...], turned: bool = False
) -> tuple[Tensor, ...]:
    """x W' + b in the type of x for each of the layers, as [B, T, O] views of one result.

    weights: masters [O, D]; biases: all of them or none. `turned`: see core/products.py.
    """
    assert len({bias is None for bias in biases}) == 1, "a layer has a bias or all have"
    joint_NO = _Joint.apply(x_BTD.flatten(0, -2), turned, len(weights), *weights, *biases)
    return joint_NO.view(*x_BTD.shape[:-1], -1).split([weight.shape[0] for weight in weights], dim=-1)  # type: ignore[no-any-return]


class _Joint(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x_ND: Tensor, turned: bool, count: int, *parameters: Tensor | None) -> Tensor:
        weights, biases = parameters[:count], [bias for bias in parameters[count:] if bias is not None]
        joint_OD = torch.cat([weight.to(x_ND.dtype) for weight in weights if weight is not None])
        ctx.save_for_backward(x_ND, joint_OD)
        ctx.sizes = [weight.shape[0] for weight in weights if weight is not None]
        ctx.turned, ctx.master = turned, parameters[0].dtype if parameters[0] is not None else x_ND.dtype
        return linear(x_ND, joint_OD, torch.cat(biases).to(x_ND.dtype) if biases else None)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_NO: Tensor) -> tuple[Tensor | None, ...]:
        x_ND, joint_OD = ctx.saved_tensors
        needs, count, grad_NO = ctx.needs_input_grad, len(ctx.sizes), grad_NO.contiguous()
        x_grad_ND = product(grad_NO, joint_OD) if needs[0] else None
        weights, biases = ([None] * count for _ in range(2))
        if any(needs[3 : 3 + count]):
            weights = weight_gradient(grad_NO, x_ND, ctx.master, ctx.turned).split(ctx.sizes)
        if any(needs[3 + count :]):
            biases = grad_NO.to(ctx.master).sum(0).split(ctx.sizes)
        kept = (gradient if need else None for gradient, need in zip((*weights, *biases), needs[3:], strict=True))
        return (x_grad_ND, None, None, *kept)
