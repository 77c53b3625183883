"""Products with weights that no longer change, laid out once as the processor's library multiplies them fastest."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

_ROWS = 16
"""Rows the layout is chosen for. Measured: layouts for 16 are as fast for 1 and for 64, one for 1 is not."""

_PROVED: dict[tuple[int, int, torch.dtype, int], bool] = {}
"""(outputs, inputs, type, threads) -> whether the packed product has the bits of F.linear here."""


class Product:
    """y = x W^T + b with a copy of the weights; several matrices over each other are one product.

    A 16-bit product on a CPU is bound by reading W, and F.linear brings W into the library's layout again at
    every call. Here that happens once, if torch has the operators and they give F.linear's bits; if not,
    F.linear does it.
    """

    def __init__(self, weights: Sequence[Tensor], biases: Sequence[Tensor | None], compute: torch.dtype) -> None:
        assert len({bias is None for bias in biases}) == 1
        # copy=True: where the masters are of this type already, `to` alone would give the masters.
        weight_OI = torch.cat([weight.detach().to(compute, copy=True) for weight in weights])
        given = [bias.detach().to(compute, copy=True) for bias in biases if bias is not None]
        self.bias = torch.cat(given) if given else None
        self.packed = _same_bits(weight_OI)
        self.weight = _pack(weight_OI) if self.packed else weight_OI

    def __call__(self, x_NI: Tensor) -> Tensor:
        if self.packed:
            return _multiply(x_NI, self.weight, self.bias)
        return F.linear(x_NI, self.weight, self.bias)


def missing() -> str | None:
    """Why 16-bit weights cannot be packed on this machine's CPU; None if they can."""
    if not torch.backends.mkldnn.is_available():
        return "torch was built without oneDNN"
    if not all(hasattr(torch.ops.mkldnn, name) for name in ("_reorder_linear_weight", "_linear_pointwise")):
        return "this torch has no operators for packed weights"
    if not _same_bits(torch.ones(32, 32, dtype=torch.bfloat16)):
        return "its packed products have other bits than its plain ones"
    return None


def _same_bits(weight_OI: Tensor) -> bool:
    """Whether packing this matrix changes no bit of its products; proved once for every shape and type."""
    # float32 is another library's, which lays out nothing anew.
    if weight_OI.device.type != "cpu" or weight_OI.dtype not in (torch.bfloat16, torch.float16):
        return False
    key = (*weight_OI.shape, weight_OI.dtype, torch.get_num_threads())
    if key not in _PROVED:
        _PROVED[key] = _prove(weight_OI)
    return _PROVED[key]


def _prove(weight_OI: Tensor) -> bool:
    if not torch.backends.mkldnn.is_available() or not hasattr(torch.ops.mkldnn, "_reorder_linear_weight"):
        return False
    inputs = weight_OI.shape[1]
    # Waves, not random numbers: the draws of whoever calls this must stay as they are.
    x_NI = torch.sin(torch.arange(4 * _ROWS * inputs, dtype=torch.float32)).view(-1, inputs).to(weight_OI.dtype)
    try:
        packed = _pack(weight_OI)
        return all(
            torch.equal(_multiply(x_NI[:rows], packed, None), F.linear(x_NI[:rows], weight_OI))
            for rows in (1, 3, _ROWS, 4 * _ROWS)
        )
    except (RuntimeError, NotImplementedError):     # this processor's library has no such product
        return False


def _pack(weight_OI: Tensor) -> Tensor:
    packed: Tensor = torch.ops.mkldnn._reorder_linear_weight(weight_OI, _ROWS)
    return packed


def _multiply(x_NI: Tensor, packed: Tensor, bias: Tensor | None) -> Tensor:
    y_NO: Tensor = torch.ops.mkldnn._linear_pointwise(x_NI, packed, bias, "none", [], None)
    return y_NO
