"""The parts of a decoder that look at one position at a time."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from llmtrainer.core.products import linear
from llmtrainer.models.gated import Biases, Weights, gated_mlp
from llmtrainer.models.lora import AdaptedLayer, Beside, LowRank, adapted_gated_mlp
from llmtrainer.models.norm import rms_norm


def intermediate_size(hidden_size: int, multiple: int = 256) -> int:
    """Width of a gated MLP with the weights of a plain one of 4 D: 8/3 D, rounded up (arXiv:2302.13971)."""
    return multiple * math.ceil(8 * hidden_size / (3 * multiple))


class Linear(nn.Module):
    """y = x W^T + b in the type of x. The weights stay masters, float32 or wider, and are cast on the way."""

    def __init__(self, inputs: int, outputs: int, *, bias: bool, master: torch.dtype) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(outputs, inputs, dtype=master))
        self.bias = nn.Parameter(torch.empty(outputs, dtype=master)) if bias else None

        self.adapter: LowRank | None = None

    def forward(self, x: Tensor, beside: Beside | None = None) -> Tensor:
        if self.adapter is not None:
            adapted: Tensor = self.adapter(x, self.weight, self.bias, beside)
            return adapted
        return linear(x, self.weight.to(x.dtype), None if self.bias is None else self.bias.to(x.dtype))

    def merged(self) -> Tensor:
        """The one matrix that does what weight and adapter do."""
        return self.weight.detach() if self.adapter is None else self.adapter.merged(self.weight)


class Embedding(nn.Module):
    """Rows [V, D] looked up by id."""

    def __init__(self, vocabulary: int, hidden_size: int, *, master: torch.dtype) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(vocabulary, hidden_size, dtype=master))

    def forward(self, tokens_BT: Tensor) -> Tensor:
        return F.embedding(tokens_BT, self.weight)


class RMSNorm(nn.Module):
    """x / rms(x) * weight over the last axis, computed in float32 or wider (arXiv:1910.07467)."""

    def __init__(self, size: int, epsilon: float, *, master: torch.dtype) -> None:
        super().__init__()
        self.epsilon = epsilon
        self.kernels = TORCH
        self.weight = nn.Parameter(torch.empty(size, dtype=master))

    def forward(self, x: Tensor, out_type: torch.dtype | None = None) -> Tensor:
        return self.kernels.norm(x, self.weight, self.epsilon, out_type or x.dtype)


class GatedMLP(nn.Module):
    """down(silu(gate(x)) * up(x)) (arXiv:2002.05202)."""

    def __init__(self, hidden_size: int, size: int, *, bias: bool, master: torch.dtype) -> None:
        super().__init__()
        self.gate_proj = Linear(hidden_size, size, bias=bias, master=master)
        self.up_proj = Linear(hidden_size, size, bias=bias, master=master)
        self.down_proj = Linear(size, hidden_size, bias=bias, master=master)
        self.kernels = TORCH

    def forward(self, x_BTD: Tensor, turned: bool = False, beside: Beside | None = None) -> Tensor:
        """`turned`: weight gradients as products of transposed copies, see core/products.py. `beside`: for dropout
        of adapters."""
        gate, up, down = self.gate_proj, self.up_proj, self.down_proj
        if any(layer.adapter is not None for layer in (gate, up, down)):
            first, second, last = (AdaptedLayer(layer.weight, layer.bias, layer.adapter) for layer in (gate, up, down))
            return adapted_gated_mlp(x_BTD, (first, second, last), beside, turned)
        return self.kernels.gated(
            x_BTD, (gate.weight, up.weight, down.weight), (gate.bias, up.bias, down.bias), turned
        )


def rotate(x_BTHC: Tensor, rotary: tuple[Tensor, Tensor]) -> Tensor:
    """Turn channel i against channel i + R/2 by the position's angle; channels from R on stay."""
    cos, sin = rotary
    half = cos.shape[-1]
    first, second, rest = x_BTHC.split([half, half, x_BTHC.shape[-1] - 2 * half], dim=-1)
    turned = (first * cos - second * sin, second * cos + first * sin)
    return torch.cat([*(part.to(x_BTHC.dtype) for part in turned), rest], dim=-1)


def rotate_both(
    q_BTHC: Tensor, k_BTKC: Tensor, rotary: tuple[Tensor, Tensor]
) -> tuple[Tensor, Tensor]:
    """Queries and keys, each rotated."""
    return rotate(q_BTHC, rotary), rotate(k_BTKC, rotary)


class Kernels(NamedTuple):
    """The operators that somebody may have fused. Every set is the same functions (see models/kernels.py)."""

    norm: Callable[[Tensor, Tensor, float, torch.dtype], Tensor]
    """(x, weight, epsilon, type of the result)."""
    rotate: Callable[[Tensor, Tensor, tuple[Tensor, Tensor]], tuple[Tensor, Tensor]]
    gated: Callable[[Tensor, Weights, Biases, bool], Tensor]


TORCH = Kernels(rms_norm, rotate_both, gated_mlp)
