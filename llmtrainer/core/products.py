"""Weight gradients as matrix products, in the operand order that a processor multiplies fastest."""

from __future__ import annotations

import torch
from torch import Tensor

_ROWS = 512
"""Rows turned at a time: read across, so many cache lines still find room beside each other."""


def prefers_turned(device: torch.device, dtype: torch.dtype) -> bool:
    """Whether a product whose left operand is read across its rows is worth a transposed copy of that operand.

    So it is with the tile unit of Intel's processors (AMX): there such products in bfloat16 run at half the speed
    of others. A fact of the processor, so the choice is the same in every run on it.
    """
    return device.type == "cpu" and dtype == torch.bfloat16 and bool(torch.cpu.get_capabilities().get("amx_bf16"))


@torch.library.custom_op("llmtrainer::turned", mutates_args=())
def turned_copy(x_ND: Tensor) -> Tensor:
    """The transposed matrix, contiguous: [D, N]. Block by block, four times as fast as torch's own copy of a matrix
    with a power of two in its shape, and as a compiler's; an operator of its own, so that a compiler keeps it."""
    turned_DN = x_ND.new_empty(x_ND.shape[1], x_ND.shape[0])
    for start in range(0, x_ND.shape[0], _ROWS):
        turned_DN[:, start : start + _ROWS].copy_(x_ND[start : start + _ROWS].t())
    return turned_DN


@turned_copy.register_fake
def _shape_of_turned(x_ND: Tensor) -> Tensor:
    return x_ND.new_empty(x_ND.shape[1], x_ND.shape[0])


def weight_gradient(grad_NO: Tensor, x_NI: Tensor, master: torch.dtype, turned: bool) -> Tensor:
    """grad' x, [O, I] in the master's type.

    turned: the narrower operand is copied transposed first, and the product is read across its rows at the end,
    where it has to be copied into the master's type anyway.
    """
    if not turned:
        return (grad_NO.t() @ x_NI).to(master)
    if grad_NO.shape[1] < x_NI.shape[1]:
        return (turned_copy(grad_NO) @ x_NI).to(master)
    return (turned_copy(x_NI) @ grad_NO).t().to(master, memory_format=torch.contiguous_format)
