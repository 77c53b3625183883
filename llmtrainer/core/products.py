"""Products of matrices, in the type and the operand order that a processor multiplies fastest."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from llmtrainer.core.precision import multiplies

_ROWS = 512
"""Rows turned at a time: read across, so many cache lines still find room beside each other."""


_SLOW: dict[torch.dtype, bool] = {}
"""16-bit type -> whether this machine's processor multiplies float32 faster."""


@torch.compiler.assume_constant_result
def _slow(dtype: torch.dtype) -> bool:
    if dtype not in _SLOW:
        _SLOW[dtype] = not multiplies(torch.device("cpu"), dtype)
    return _SLOW[dtype]


def in_float32(device: torch.device, dtype: torch.dtype) -> bool:
    """Whether products of this type are computed in float32 and rounded once, at the end.

    So it is in 16 bits on processors without instructions for them: there torch multiplies number by number (measured:
    18 GFLOP/s, or 1 where neither matrix is transposed, beside float32's 140). Nothing else changes: a product of two
    numbers of 16 bits is exact in float32, and sums are float32 where hardware multiplies such numbers too.
    """
    return device.type == "cpu" and dtype in (torch.bfloat16, torch.float16) and _slow(dtype)


def widens(x: Tensor) -> bool:
    """Whether products with this tensor are computed in a wider type than its own."""
    return in_float32(x.device, x.dtype)


def widened(x: Tensor) -> Tensor:
    """The tensor in the type that products with it are computed in."""
    return x.float() if widens(x) else x


def linear(x: Tensor, weight_OI: Tensor, bias_O: Tensor | None = None) -> Tensor:
    """x W' + b in the type of x, which is that of the others."""
    if not widens(x):
        return F.linear(x, weight_OI, bias_O)
    return F.linear(x.float(), weight_OI.float(), None if bias_O is None else bias_O.float()).to(x.dtype)


def product(left: Tensor, right: Tensor) -> Tensor:
    """left right, in their type."""
    if not widens(left):
        return left @ right
    return (left.float() @ right.float()).to(left.dtype)


def add_product(total: Tensor, left: Tensor, right: Tensor, scale: float | None = None) -> Tensor:
    """total + scale left right, written into the total. scale None: 1."""
    how: dict[str, Any] = {} if scale is None else {"alpha": scale}
    if not widens(left):
        return total.addmm_(left, right, **how)
    return total.copy_(torch.addmm(total.float(), left.float(), right.float(), **how))


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
        return (widened(grad_NO).t() @ widened(x_NI)).to(master)
    if grad_NO.shape[1] < x_NI.shape[1]:
        return (turned_copy(grad_NO) @ x_NI).to(master)
    return (turned_copy(x_NI) @ grad_NO).t().to(master, memory_format=torch.contiguous_format)
