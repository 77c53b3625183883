"""Weight gradients as matrix products, in the operand order that a processor multiplies fastest."""

from __future__ import annotations

import torch
from torch import Tensor


def prefers_turned(device: torch.device, dtype: torch.dtype) -> bool:
    """Whether a product whose left operand is read across its rows is worth a transposed copy of that operand.

    So it is with the tile unit of Intel's processors (AMX): there such products in bfloat16 run at half the speed
    of others. A fact of the processor, so the choice is the same in every run on it.
    """
    return device.type == "cpu" and dtype == torch.bfloat16 and bool(torch.cpu.get_capabilities().get("amx_bf16"))


def weight_gradient(grad_NO: Tensor, x_NI: Tensor, master: torch.dtype, turned: bool) -> Tensor:
    """grad' x, [O, I] in the master's type.

    turned: the narrower operand is copied transposed first, and the product is read across its rows at the end,
    where it has to be copied into the master's type anyway.
    """
    if not turned:
        return (grad_NO.t() @ x_NI).to(master)
    if grad_NO.shape[1] <= x_NI.shape[1]:
        return (grad_NO.t().contiguous() @ x_NI).to(master)
    return (x_NI.t().contiguous() @ grad_NO).t().to(master, memory_format=torch.contiguous_format)
