"""Low-rank adapters of a matrix that stays as it is: LoRA and DoRA, with backwards written by hand."""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from llmtrainer.core.pieces import is_piece
from llmtrainer.core.products import add_product, linear, product, weight_gradient
from llmtrainer.core.randomness import dropout
from llmtrainer.models.gated import differentiate_product, joined, plus, tiles


class Beside(NamedTuple):
    """What adapters know of a batch besides their input."""

    key: int | None
    """Derived from (seed, step), for dropout; None: nothing is dropped."""
    place: Tensor
    """Place of each row, or of each token's sequence, in its optimizer step: [B] or [B, T], see core/randomness.py."""
    position_BT: Tensor | None = None
    """With places [B, T]: the place of a token in its sequence."""
    gates_BTE: Tensor | None = None
    """Which of E adapters each token goes through, 0 or 1; None: all."""


class How(NamedTuple):
    """What an adapter does besides its two products."""

    scale: float
    """s: factor of what the adapter adds."""
    rate: float = 0.0
    """Dropout of what the adapter reads."""
    site: int = 0
    """Which of the model's dropouts this is."""
    beside: Beside | None = None

    def dropped(self, x_BTI: Tensor) -> Tensor:
        """The adapter's input. Its mask is worked out again in backward, so nothing of it is kept."""
        if not self.drops:
            return x_BTI
        assert self.beside is not None and self.beside.key is not None
        return dropout(
            x_BTI, self.rate, self.beside.key, self.beside.place, self.site, self.beside.position_BT
        )

    @property
    def drops(self) -> bool:
        return self.rate > 0.0 and self.beside is not None and self.beside.key is not None

    def gated(self, h_BTR: Tensor) -> Tensor:
        """The numbers between A and B, those of closed gates 0."""
        if self.beside is None or self.beside.gates_BTE is None:
            return h_BTR
        gates_BTE = self.beside.gates_BTE
        open_BTR = gates_BTE.repeat_interleave(h_BTR.shape[-1] // gates_BTE.shape[-1], dim=-1)
        return h_BTR * open_BTR.view(h_BTR.shape).to(h_BTR.dtype)


class Low(NamedTuple):
    """One adapter as its products need it."""

    down_RI: Tensor
    """A: from the layer's input into r numbers."""
    up_OR: Tensor
    """B: from those r numbers to the layer's output; 0 at the start."""
    how: How


class LowRank(nn.Module):
    """The adapter of one matrix W [O, I]: W becomes W + s B A, with A [r, I] and B [O, r] (arXiv:2106.09685).

    With a magnitude m [O] it is DoRA: m (W + s B A) / ||W + s B A|| row by row, the norm a constant for the
    gradient (arXiv:2402.09353, section 4.3). Its parameters are masters; their names are PEFT's.
    """

    def __init__(
        self, weight_OI: Tensor, rank: int, scale: float, *, rate: float = 0.0, site: int = 0,
        magnitude: bool = False, master: torch.dtype = torch.float32,
    ) -> None:
        super().__init__()
        (outputs, inputs), device = weight_OI.shape, weight_OI.device
        self.scale, self.rate, self.site = scale, rate, site
        self.lora_A = nn.Parameter(torch.zeros(rank, inputs, dtype=master, device=device))
        self.lora_B = nn.Parameter(torch.zeros(outputs, rank, dtype=master, device=device))
        ones = torch.ones(outputs, dtype=master, device=device)
        self.lora_magnitude_vector = nn.Parameter(ones) if magnitude else None
        self.register_buffer("base_norm_O", None, persistent=False)

    def initialise(self, seed: int, weight_OI: Tensor) -> None:
        """A is uniform up to 1 / sqrt(I), as PEFT draws it; B is 0 and m the norms of W: the model is its base."""
        random = torch.Generator().manual_seed(seed)
        bound = 1.0 / math.sqrt(self.lora_A.shape[1])
        with torch.no_grad():
            self.lora_A.copy_(torch.empty(self.lora_A.shape).uniform_(-bound, bound, generator=random))
            self.lora_B.zero_()
            if self.lora_magnitude_vector is not None:
                self.measure(weight_OI)
                self.lora_magnitude_vector.copy_(self.norm(weight_OI))

    @torch.no_grad()
    def measure(self, weight_OI: Tensor) -> None:
        """Take the norms of a base whose values are there by now. They never change again."""
        # Where weights are divided among processes, this was done while they were whole.
        if self.lora_magnitude_vector is not None and not is_piece(weight_OI):
            # On the host, wherever the weights are by now: a run that continues must find the same digits.
            norm_O = torch.linalg.vector_norm(weight_OI.cpu(), dim=1, dtype=self.lora_A.dtype)
            self.base_norm_O = norm_O.to(weight_OI.device)

    @torch.no_grad()
    def norm(self, weight_OI: Tensor) -> Tensor:
        """||W + s B A|| of every row [O], without W + s B A itself: the square is ||W||^2 + 2 s <B, W A'> +
        s^2 <B, B A A'>. Exactly ||W|| where B is 0."""
        A, B = self.lora_A, self.lora_B
        assert isinstance(self.base_norm_O, Tensor), "the base was never measured"
        cross_OR = product(weight_OI, A.to(weight_OI.dtype).t()).to(A.dtype)
        more_O = (B * (2.0 * self.scale * cross_OR + self.scale**2 * (B @ (A @ A.t())))).sum(1)
        norm_O = (self.base_norm_O.square() + more_O).clamp(min=0.0).sqrt()
        return torch.where(more_O == 0.0, self.base_norm_O, norm_O)

    def low(self, beside: Beside | None) -> Low:
        return Low(self.lora_A, self.lora_B, How(self.scale, self.rate, self.site, beside))

    def forward(self, x_BTI: Tensor, weight_OI: Tensor, bias_O: Tensor | None, beside: Beside | None = None) -> Tensor:
        """What the adapted layer gives, in the type of x. weight_OI and bias_O get no gradient."""
        low = self.low(beside)
        weight_OI, bias_O = weight_OI.to(x_BTI.dtype), None if bias_O is None else bias_O.to(x_BTI.dtype)
        if self.lora_magnitude_vector is None:
            return _Adapted.apply(x_BTI, weight_OI, bias_O, *low)  # type: ignore[no-any-return]
        share_O = self.lora_magnitude_vector / self.norm(weight_OI)
        return _Directed.apply(x_BTI, weight_OI, bias_O, share_O, *low)  # type: ignore[no-any-return]

    @torch.no_grad()
    def merged(self, weight_OI: Tensor) -> Tensor:
        """One matrix that gives the same, in the wider of the types."""
        wide = torch.promote_types(weight_OI.dtype, self.lora_A.dtype)
        weight = weight_OI.detach().to(wide) + self.scale * (self.lora_B.to(wide) @ self.lora_A.to(wide))
        if self.lora_magnitude_vector is None:
            return weight
        norm_O = torch.linalg.vector_norm(weight, dim=1)
        return weight * (self.lora_magnitude_vector / norm_O)[:, None]


def _with_low(x_BTI: Tensor, weight_OI: Tensor, bias_O: Tensor | None, low: Low | None) -> tuple[Tensor, Tensor]:
    """The layer's output, and the r numbers between A and B [.., r]; those of nobody are empty."""
    y_BTO = linear(x_BTI, weight_OI, bias_O)
    if low is None:
        return y_BTO, y_BTO.new_empty(0)
    h_BTR = low.how.gated(linear(low.how.dropped(x_BTI), low.down_RI.to(x_BTI.dtype)))
    up_RO = low.up_OR.to(x_BTI.dtype).t()
    y_NO = add_product(y_BTO.flatten(0, -2), h_BTR.flatten(0, -2), up_RO, low.how.scale)
    return y_NO.view(y_BTO.shape), h_BTR


class _Gradients(NamedTuple):
    x_BTI: Tensor | None
    down_RI: Tensor | None
    up_OR: Tensor | None


def _differentiate(
    grad_BTO: Tensor, x_BTI: Tensor, h_BTR: Tensor, weight_OI: Tensor, low: Low | None, needs_x: bool,
    turned: bool = False,
) -> _Gradients:
    """Of `_with_low`: nothing for the weight, which is frozen."""
    grad_NO = grad_BTO.flatten(0, -2)
    x_grad = product(grad_NO, weight_OI).view(x_BTI.shape) if needs_x else None
    if low is None:
        return _Gradients(x_grad, None, None)
    narrow, master, how = x_BTI.dtype, low.down_RI.dtype, low.how
    up_grad = how.scale * weight_gradient(grad_NO, h_BTR.flatten(0, -2), master, turned)
    h_grad_NR = how.gated(product(grad_NO, low.up_OR.to(narrow)).mul_(how.scale).view(h_BTR.shape)).flatten(0, -2)
    down_grad = weight_gradient(h_grad_NR, how.dropped(x_BTI).flatten(0, -2), master, turned)
    if x_grad is not None:
        down = low.down_RI.to(narrow)
        if not how.drops:
            x_grad = add_product(x_grad.flatten(0, -2), h_grad_NR, down).view(x_BTI.shape)
        else:
            x_grad = x_grad + how.dropped(product(h_grad_NR, down).view(x_BTI.shape))
    return _Gradients(x_grad, down_grad, up_grad)


class _Adapted(torch.autograd.Function):
    """x W' + b + s drop(x) A' B'. Kept for backward are x and drop(x) A', r numbers a token."""

    @staticmethod
    def forward(
        ctx: Any, x_BTI: Tensor, weight_OI: Tensor, bias_O: Tensor | None, down_RI: Tensor, up_OR: Tensor, how: How
    ) -> Tensor:
        y_BTO, h_BTR = _with_low(x_BTI, weight_OI, bias_O, Low(down_RI, up_OR, how))
        ctx.save_for_backward(x_BTI, h_BTR, weight_OI, down_RI, up_OR)
        ctx.how = how
        return y_BTO

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_BTO: Tensor) -> tuple[Tensor | None, ...]:
        x_BTI, h_BTR, weight_OI, down_RI, up_OR = ctx.saved_tensors
        low = Low(down_RI, up_OR, ctx.how)
        found = _differentiate(grad_BTO, x_BTI, h_BTR, weight_OI, low, ctx.needs_input_grad[0])
        return found.x_BTI, None, None, found.down_RI, found.up_OR, None


class _Directed(torch.autograd.Function):
    """DoRA: x W' + b + (g - 1) drop(x) W' + g s drop(x) A' B' with the share g [O] = m / norm.

    Where nothing is dropped, that is g times the adapted product, plus b. What g multiplies is not kept: for the
    gradient of g it is computed again. Sums are rounded once, at the end: g is too near 1 for 16 bits.
    """

    @staticmethod
    def forward(
        ctx: Any, x_BTI: Tensor, weight_OI: Tensor, bias_O: Tensor | None, share_O: Tensor, down_RI: Tensor,
        up_OR: Tensor, how: How,
    ) -> Tensor:  # fmt: skip
        narrow, dropped_BTI = x_BTI.dtype, how.dropped(x_BTI)
        y_BTO = linear(x_BTI, weight_OI, bias_O)
        base_BTO = linear(dropped_BTI, weight_OI) if dropped_BTI is not x_BTI or bias_O is not None else y_BTO
        h_BTR = linear(dropped_BTI, down_RI.to(narrow))
        low_BTO = linear(h_BTR, up_OR.to(narrow))
        y_BTO = (y_BTO + (share_O - 1.0) * base_BTO + how.scale * share_O * low_BTO).to(narrow)
        ctx.save_for_backward(x_BTI, h_BTR, weight_OI, share_O, down_RI, up_OR)
        ctx.how = how
        return y_BTO

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_BTO: Tensor) -> tuple[Tensor | None, ...]:
        x_BTI, h_BTR, weight_OI, share_O, down_RI, up_OR = ctx.saved_tensors
        how: How = ctx.how
        dropped_BTI, low = how.dropped(x_BTI), Low(down_RI, up_OR, how._replace(rate=0.0))
        y_BTO, _ = _with_low(dropped_BTI, weight_OI, None, low)
        share_grad_O = (y_BTO * grad_BTO).flatten(0, -2).sum(0, dtype=share_O.dtype)
        del y_BTO
        scaled_BTO = (grad_BTO * share_O).to(grad_BTO.dtype)
        found = _differentiate(scaled_BTO, dropped_BTI, h_BTR, weight_OI, low, ctx.needs_input_grad[0])
        x_grad = found.x_BTI
        if x_grad is not None and dropped_BTI is not x_BTI:
            base_BTI = product(grad_BTO.flatten(0, -2), weight_OI).view(x_BTI.shape)
            x_grad = base_BTI + how.dropped(x_grad - base_BTI)
        return x_grad, None, None, share_grad_O, found.down_RI, found.up_OR, None


class AdaptedLayer(NamedTuple):
    """A frozen matrix, its frozen bias, and its adapter if it has one."""

    weight_OI: Tensor
    bias_O: Tensor | None
    adapter: LowRank | None


def adapted_gated_mlp(
    x_BTD: Tensor, layers: tuple[AdaptedLayer, AdaptedLayer, AdaptedLayer], beside: Beside | None = None,
    turned: bool = False,
) -> Tensor:
    """down(silu(gate(x)) * up(x)) in the type of x, of frozen matrices with adapters: (gate, up, down).

    Kept for backward are x, gate(x), up(x) and r numbers a token and adapter; the product [.., F] is computed
    again there, some tokens at a time, as in gated.gated_mlp. With DoRA among them, each layer keeps what it needs by
    itself.
    """
    if any(layer.adapter is not None and layer.adapter.lora_magnitude_vector is not None for layer in layers):
        gate_BTF, up_BTF = (_apply(layer, x_BTD, beside) for layer in layers[:2])
        return _apply(layers[2], F.silu(gate_BTF) * up_BTF, beside)
    flat: list[Any] = []
    for weight_OI, bias_O, adapter in layers:
        low = (None, None, None) if adapter is None else adapter.low(beside)
        flat += [weight_OI.to(x_BTD.dtype), None if bias_O is None else bias_O.to(x_BTD.dtype), *low]
    return _AdaptedMLP.apply(x_BTD, turned, *flat)  # type: ignore[no-any-return]


def _apply(layer: AdaptedLayer, x: Tensor, beside: Beside | None) -> Tensor:
    weight_OI, bias_O, adapter = layer
    if adapter is not None:
        found: Tensor = adapter(x, weight_OI, bias_O, beside)
        return found
    return linear(x, weight_OI.to(x.dtype), None if bias_O is None else bias_O.to(x.dtype))


class _AdaptedMLP(torch.autograd.Function):
    """Five arguments for each of gate, up and down: weight, bias, A, B, How; the last three None without adapter."""

    @staticmethod
    def forward(ctx: Any, x_BTD: Tensor, turned: bool, *flat: Any) -> Tensor:
        gate, up, down = layers = tuple(_unpacked(flat[place : place + 5]) for place in (0, 5, 10))
        gate_BTF, gate_h = _with_low(x_BTD, *gate)
        up_BTF, up_h = _with_low(x_BTD, *up)
        places, (gate_NF, up_NF) = _in_tiles([low for *_, low in layers], (gate_BTF, up_BTF))
        parts = [_with_low(F.silu(gate_NF[one]) * up_NF[one], *down) for one in places]
        y, down_h = (joined(list(each)) for each in zip(*parts, strict=True))
        ctx.save_for_backward(
            x_BTD, gate_BTF, up_BTF, gate_h, up_h, down_h, *(x for x in flat if isinstance(x, Tensor))
        )
        ctx.turned, ctx.flat = turned, tuple(None if isinstance(x, Tensor) else (x,) for x in flat)
        return y.view(x_BTD.shape)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_BTD: Tensor) -> tuple[Tensor | None, ...]:
        x_BTD, *kept = ctx.saved_tensors
        wholes, saved = kept[:5], iter(kept[5:])
        flat = [next(saved) if other is None else other[0] for other in ctx.flat]
        gate, up, down = layers = tuple(_unpacked(flat[place : place + 5]) for place in (0, 5, 10))
        turned, needs_x = ctx.turned, ctx.needs_input_grad[0]
        places, tiled = _in_tiles([low for *_, low in layers], (*wholes, x_BTD, grad_BTD))
        x_parts: list[Tensor] = []
        sums: list[Tensor | None] = [None] * 6
        for one in places:
            gate_nF, up_nF, gate_h, up_h, down_h, x, grad = (whole[one] for whole in tiled)
            of_down = _differentiate(grad, F.silu(gate_nF) * up_nF, down_h, down[0], down[2], True, turned)
            assert of_down.x_BTI is not None
            _, gate_grad, up_grad = differentiate_product(gate_nF, up_nF, of_down.x_BTI)
            of_gate = _differentiate(gate_grad, x, gate_h, gate[0], gate[2], needs_x, turned)
            of_up = _differentiate(up_grad, x, up_h, up[0], up[2], needs_x, turned)
            if of_gate.x_BTI is not None and of_up.x_BTI is not None:
                x_parts.append(of_gate.x_BTI + of_up.x_BTI)
            found = (more for of in (of_gate, of_up, of_down) for more in (of.down_RI, of.up_OR))
            sums = [plus(before, more) for before, more in zip(sums, found, strict=True)]
        x_grad = joined(x_parts).view(x_BTD.shape) if x_parts else None
        others = ((None, None, *sums[2 * layer : 2 * layer + 2], None) for layer in range(3))
        return (x_grad, None, *itertools.chain.from_iterable(others))


def _in_tiles(lows: Sequence[Low | None], wholes: Sequence[Tensor]) -> tuple[list[slice], list[Tensor]]:
    """Tensors [B, T, ..] of one batch with their tokens first, and the places of each tile in them. What an adapter
    drops or leaves out depends on where a token stands: then all is one tile, as it is."""
    if any(low is not None and low.how.beside is not None for low in lows):
        return [slice(None)], list(wholes)
    rows = [whole.flatten(0, -2) if whole.ndim > 1 else whole for whole in wholes]
    return tiles(len(rows[0])), rows


def _unpacked(five: Sequence[Any]) -> tuple[Tensor, Tensor | None, Low | None]:
    weight_OI, bias_O, down_RI, up_OR, how = five
    return weight_OI, bias_O, None if down_RI is None else Low(down_RI, up_OR, how)
