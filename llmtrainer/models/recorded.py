"""A stack's forward and backward as CUDA graphs: a thousand kernels at the cost of two launches."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from llmtrainer.core.graphs import Record
from llmtrainer.models import paths, varlen
from llmtrainer.models.attention import RotaryTable
from llmtrainer.models.visible import Visible

Run = Callable[[Tensor, Visible, RotaryTable], Tensor]
"""(tokens_BT, what each of them sees, rotary factors) -> the residual stream [B, T, D]."""

_GRAIN = 32
"""Documents of a batch are recorded in multiples of so many: empty ones are put behind them."""


class _Size(NamedTuple):
    """What a recording holds for."""

    B: int
    T: int
    needed: paths.Needed
    documents: int


class RecordedStack:
    """Forward and backward of a stack, each recorded once for every size of a batch.

    The first batch of a size is computed as usual, so that every kernel is there when the second is recorded.
    Parameters must stay where they are. Activations of all sizes share one memory: while the backward of one batch is
    still to come, another is computed as usual.
    """

    def __init__(self, run: Run, parts: Sequence[nn.Module], path: str, channels: int, record: Record) -> None:
        """parts: the modules that `run` computes with."""
        self._run, self._record = run, record
        self._parts = list(parts)
        self._parameters = _trained(self._parts)
        self._gradients: list[Tensor] = []
        """Where the recorded backward of every size leaves them."""
        self._path, self._channels = path, channels
        self._recordings: dict[_Size, _Recording] = {}
        self._met: set[_Size] = set()
        self._waiting: weakref.ref[_Waiting] | None = None

    def __call__(self, tokens_BT: Tensor, visible: Visible, rotary: RotaryTable) -> Tensor:
        if self._waiting is not None and self._waiting() is not None:
            return self._run(tokens_BT, visible, rotary)
        size, seen = self._seen(tokens_BT, visible)
        if size not in self._met:
            self._met.add(size)
            return self._run(tokens_BT, visible, rotary)
        inputs = [tokens_BT, *rotary, *seen]
        if size not in self._recordings:
            self._recordings[size] = self._recorded(size, visible, [x.clone() for x in inputs])
        recording = self._recordings[size]
        torch._foreach_copy_(recording.inputs, inputs)
        waiting = _Waiting()
        self._waiting = weakref.ref(waiting)
        out_BTD: Tensor = _Replayed.apply(recording, waiting, *self._parameters)
        return out_BTD

    def _seen(self, tokens_BT: Tensor, visible: Visible) -> tuple[_Size, list[Tensor]]:
        """The size of a batch, and what its attention reads."""
        B, T = tokens_BT.shape
        needed = paths.needed(self._path, visible, self._channels)
        if needed == "nothing":
            return _Size(B, T, needed, 0), []
        if needed == "mask":
            return _Size(B, T, needed, 0), [visible.mask_BTT]
        bounds_S, _ = varlen.documents(visible)
        more = -len(bounds_S) % _GRAIN
        return _Size(B, T, needed, len(bounds_S) + more), [F.pad(bounds_S, (0, more), value=B * T)]

    def _recorded(self, size: _Size, visible: Visible, inputs: list[Tensor]) -> _Recording:
        tokens_BT, cos, sin, *seen = inputs
        fixed = visible.reading_only(mask_BTT=seen[0] if size.needed == "mask" else None)
        if size.needed == "documents":
            fixed.made["varlen"] = seen[0], size.T
        leaves = _Leaves(self._parts)

        def run() -> Tensor:
            with leaves.in_place():
                return self._run(tokens_BT, fixed, (cos, sin))

        self._gradients = self._gradients or [torch.empty_like(x) for x in self._parameters]
        return _Recording(run, leaves.all, self._gradients, inputs, self._record)


def _trained(parts: Sequence[nn.Module]) -> list[nn.Parameter]:
    """Each once, in the order in which the parts name them."""
    found = {id(x): x for part in parts for x in part.parameters() if x.requires_grad}
    return list(found.values())


class _Leaves:
    """Other leaves of autograd over the same memory as the trained parameters of some modules. Whatever graph still
    holds the parameters themselves has the stream it began on, which is not the one that is recorded."""

    def __init__(self, parts: Sequence[nn.Module]) -> None:
        others = {id(x): nn.Parameter(x.detach()) for x in _trained(parts)}
        self.all = list(others.values())
        self._places = [
            (module, name, x, others[id(x)])
            for part in parts for module in part.modules() for name, x in module._parameters.items()
            if x is not None and id(x) in others
        ]  # fmt: skip

    @contextmanager
    def in_place(self) -> Iterator[None]:
        """As long as this lasts, the modules compute with them."""
        try:
            for module, name, _, other in self._places:
                module._parameters[name] = other
            yield
        finally:
            for module, name, x, _ in self._places:
                module._parameters[name] = x


class _Recording:
    """One size: memory that is read, and what is replayed."""

    def __init__(
        self, run: Callable[[], Tensor], parameters: Sequence[nn.Parameter], gradients: Sequence[Tensor],
        inputs: list[Tensor], record: Record,
    ) -> None:  # fmt: skip
        """gradients: where backward leaves those of the parameters."""
        self.inputs = inputs
        live: list[Tensor] = []

        def forward() -> Tensor:
            with torch.enable_grad():
                live[:] = [run()]
            return live[0].detach()

        def backward() -> list[Tensor | None]:
            found = torch.autograd.grad(live.pop(), parameters, self.gradient_BTD, allow_unused=True)
            left = [None if x is None else place for x, place in zip(found, gradients, strict=True)]
            torch._foreach_copy_([x for x in left if x is not None], [x for x in found if x is not None])
            return [*left]

        self.forward = record(forward)
        self.gradient_BTD = torch.zeros_like(live[0])
        self.backward = record(backward)


class _Waiting:
    """Lives as long as a backward may come."""


class _Replayed(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, recording: _Recording, waiting: _Waiting, *parameters: Tensor) -> Tensor:
        ctx.recording, ctx.waiting = recording, waiting
        return recording.forward().clone()

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient_BTD: Tensor) -> tuple[Tensor | None, ...]:
        recording, ctx.waiting = ctx.recording, None
        recording.gradient_BTD.copy_(gradient_BTD)
        found = recording.backward()
        # Copies: autograd keeps what it is given as the parameter's gradient, and the next replay would change it.
        there = [x for x in found if x is not None]
        copies = [torch.empty_like(x) for x in there]
        torch._foreach_copy_(copies, there)
        remaining = iter(copies)
        return None, None, *(None if x is None else next(remaining) for x in found)
