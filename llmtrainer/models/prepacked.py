"""Products with weights that no longer change, laid out once as the processor's library multiplies them fastest."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from llmtrainer.core.products import widened, widens

_ROWS = 16
"""Rows the layout is chosen for. Measured: layouts for 16 are as fast for 1 and for 64, one for 1 is not."""

_SMALL = 2**15
"""Numbers of a float32 matrix below which finding the operator takes longer than the product."""

_PROVED: dict[tuple[int, int, torch.dtype, int], bool] = {}
"""(outputs, inputs, type, threads) -> whether the packed product is what it must be here."""


class Product:
    """y = x W^T + b with a copy of the weights; several matrices over each other are one product.

    A product of few rows on a CPU is bound by reading W, and F.linear brings W into the library's layout again at
    every call. Here that happens once, if torch has the operators and they give F.linear's bits; if not, F.linear does
    it. In float32 F.linear is another library's, whose last digits depend on how many rows there are. There packed
    products have to be the same up to rounding, and to give a row the same bits whatever stands beside it. Where
    products of the compute type are computed in float32 (see core/products.py), x and y are float32 too.
    """

    def __init__(self, weights: Sequence[Tensor], biases: Sequence[Tensor | None], compute: torch.dtype) -> None:
        assert len({bias is None for bias in biases}) == 1
        # copy=True: where the masters are of this type already, `to` alone would give the masters.
        weight_OI = torch.cat([weight.detach().to(compute, copy=True) for weight in weights])
        given = [bias.detach().to(compute, copy=True) for bias in biases if bias is not None]
        self.bias = torch.cat(given) if given else None
        if widens(weight_OI):
            weight_OI, self.bias = weight_OI.float(), None if self.bias is None else self.bias.float()
        self.packed = _packs(weight_OI)
        self.weight = _pack(weight_OI) if self.packed else weight_OI

    def __call__(self, x_NI: Tensor) -> Tensor:
        if self.packed:
            return _multiply(x_NI, self.weight, self.bias)
        return F.linear(x_NI, self.weight, self.bias)


def missing() -> str | None:
    """Why weights cannot be packed on this machine's CPU; None if they can."""
    if not torch.backends.mkldnn.is_available():
        return "torch was built without oneDNN"
    if not all(hasattr(torch.ops.mkldnn, name) for name in ("_reorder_linear_weight", "_linear_pointwise")):
        return "this torch has no operators for packed weights"
    if not _packs(widened(torch.ones(256, 256, dtype=torch.bfloat16))):
        return "its packed products have other bits than they must have"
    return None


def _packs(weight_OI: Tensor) -> bool:
    """Whether this matrix is packed; proved once for every shape and type."""
    if weight_OI.device.type != "cpu" or weight_OI.dtype not in (torch.bfloat16, torch.float16, torch.float32):
        return False
    if weight_OI.dtype == torch.float32 and weight_OI.numel() < _SMALL:
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
        parts = {rows: _multiply(x_NI[:rows], packed, None) for rows in (1, 3, _ROWS, 4 * _ROWS)}
    except (RuntimeError, NotImplementedError):     # this processor's library has no such product
        return False
    if weight_OI.dtype != torch.float32:
        return all(torch.equal(part, F.linear(x_NI[:rows], weight_OI)) for rows, part in parts.items())
    whole = parts[4 * _ROWS]
    # |sum of n products| is rounded by at most about n times the sum of their sizes.
    bound = x_NI.abs() @ weight_OI.abs().t() * (inputs * torch.finfo(torch.float32).eps)
    close = bool(((whole - F.linear(x_NI, weight_OI)).abs() <= bound).all())
    return close and all(torch.equal(part, whole[:rows]) for rows, part in parts.items())


def _pack(weight_OI: Tensor) -> Tensor:
    packed: Tensor = torch.ops.mkldnn._reorder_linear_weight(weight_OI, _ROWS)
    return packed


def _multiply(x_NI: Tensor, packed: Tensor, bias: Tensor | None) -> Tensor:
    y_NO: Tensor = torch.ops.mkldnn._linear_pointwise(x_NI, packed, bias, "none", [], None)
    return y_NO
