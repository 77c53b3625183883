"""PowerSGD: gradient matrices sent as two thin factors, and what was not sent added to the next gradient."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn

from llmtrainer.core.memory import aligned
from llmtrainer.core.randomness import derive
from llmtrainer.parallel.hook import Bucket, Exchange, Onward, part_of


@dataclass(frozen=True)
class Choice:
    """Which tensors are compressed, and to what rank."""

    rank: int
    least: float
    """How many times fewer numbers must be sent for it to be worth it."""
    largest_side: int

    def rank_of(self, shape: Sequence[int]) -> int:
        """Rank that a tensor is sent with; 0: as it is. Above two axes, all but the first are one side."""
        if len(shape) < 2:
            return 0
        rows, columns = shape[0], _product(shape[1:])
        rank = min(rows, columns, self.rank)
        worth = (rows + columns) * rank * self.least < rows * columns
        return rank if worth and max(rows, columns) <= self.largest_side else 0


class LowRank(Exchange):
    """Vogels, Karimireddy and Jaggi 2019 (arXiv:1905.13727), algorithms 1 and 2, for gradients that are summed.

    For each matrix M_r of rank r's share of the gradient plus its error, with W ranks:
        P = orthogonalised sum over ranks of M_r Q;  Q = sum over ranks of M_r' P;  sum of M_r ~ S = P Q';
        error_r = M_r - S / W, so that the errors of all ranks together are what was not sent.
    """

    def __init__(
        self, choice: Choice, world_size: int, *, start_step: int, q: Literal["warm", "fixed", "fresh"], feedback: bool,
        in_gradient: bool, seed: int,
    ) -> None:
        self._choice, self._world_size, self._start_step = choice, world_size, start_step
        self._q_from, self._feedback, self._in_gradient, self._seed = q, feedback, in_gradient, seed
        self._error: dict[str, Tensor] = {}
        self._q: dict[str, Tensor] = {}
        self._factors: dict[str, tuple[Tensor, Tensor]] = {}
        """Of this step's matrices whose place in the bucket holds their error."""

    def __call__(self, bucket: Bucket, onward: Onward) -> None:
        named = dict(zip(bucket.names, bucket.tensors, strict=True))
        ranks = {name: self._choice.rank_of(item.shape) for name, item in named.items()}
        if bucket.update < self._start_step or not any(ranks.values()):
            onward(bucket)
            return
        small = {name: item for name, item in named.items() if not ranks[name]}
        matrices = {name: item for name, item in named.items() if ranks[name]}
        wholes = {name: self._with_error(name, item, bucket.scale) for name, item in matrices.items()}
        qs = {name: self._first_q(name, item, ranks[name], bucket.update) for name, item in wholes.items()}
        # One message for the thin products and whatever is too small to compress, one for the other factors.
        first = bucket.holding({**small, **{name: item @ qs[name] for name, item in wholes.items()}})
        onward(first)
        summed = dict(zip(first.names, first.tensors, strict=True))
        for name, item in small.items():
            item.copy_(summed[name])
        ps = {name: orthogonal(aligned(summed[name])) for name in matrices}
        second = bucket.holding({name: item.T @ ps[name] for name, item in wholes.items()})
        onward(second)
        # The same on every rank: both buffers hold sums. An overflow in one gradient must not stay in the memory.
        whole = first.buffer.isfinite().all() & second.buffer.isfinite().all()
        for name, q in zip(second.names, second.tensors, strict=True):
            self._settle(name, matrices[name], wholes[name], ps[name], aligned(q), whole, bucket.scale)

    def _with_error(self, name: str, gradient: Tensor, scale: float) -> Tensor:
        """The matrix that is to be sent."""
        if name in self._error and not self._in_gradient:
            gradient.add_(self._error[name].view_as(gradient), alpha=scale)
        # Where in a bucket a gradient lies may change when a run is continued, and must not change its digits.
        return aligned(gradient.reshape(gradient.shape[0], -1))

    def _first_q(self, name: str, whole: Tensor, rank: int, update: int) -> Tensor:
        if name in self._q:
            return orthogonal(self._q[name])
        # By name and not by bucket: how gradients are put into buckets may change when a run is continued.
        purpose = (name, update) if self._q_from == "fresh" else (name,)
        draw = torch.Generator().manual_seed(derive(self._seed, "powersgd", *purpose))
        noise = torch.randn(whole.shape[1], rank, generator=draw, dtype=torch.float64)
        return orthogonal(noise.to(whole))

    def _settle(
        self, name: str, gradient: Tensor, whole: Tensor, p: Tensor, q: Tensor, finite: Tensor, scale: float
    ) -> None:
        if self._q_from == "warm":
            self._q[name] = torch.where(finite, q, self._q.get(name, torch.ones_like(q)))
        found = (p @ q.T).view_as(gradient)
        if not self._feedback:
            gradient.copy_(found)
            return
        missing = whole.view_as(gradient) - found / self._world_size
        if self._in_gradient:
            self._factors[name] = (p, q.clone())
            gradient.copy_(torch.where(finite, missing, torch.zeros_like(missing)))
            return
        kept = self._error.setdefault(name, torch.zeros_like(missing))
        kept.copy_(torch.where(finite, missing / scale, kept))
        gradient.copy_(found)

    def collect(self, named: Mapping[str, nn.Parameter]) -> None:
        for name, (p, q) in self._factors.items():
            parameter = named[name]
            assert parameter.grad is not None
            self._error[name] = parameter.grad      # its place in the bucket
            parameter.grad = (p @ q.T).view_as(parameter)
        self._factors.clear()

    def release(self, named: Mapping[str, nn.Parameter]) -> None:
        if self._in_gradient:
            for name, held in self._error.items():
                named[name].grad = held     # the next backward adds to it

    def shared_state(self) -> dict[str, Tensor]:
        return {f"q.{name}": item for name, item in self._q.items()}

    def own_state(self) -> dict[str, Tensor]:
        return {f"error.{name}": item for name, item in self._error.items()}

    def load_state(self, shared: Mapping[str, Tensor], own: Mapping[str, Tensor]) -> None:
        self._q = {name: item.clone() for name, item in part_of(shared, "q.").items()}
        self._error = {name: item.clone() for name, item in part_of(own, "error.").items()}


def orthogonal(columns: Tensor) -> Tensor:
    """Orthonormal columns that span the same space, worked out in float32 or wider. Columns of zeros, as the gradient
    of an unused matrix leaves them, become some orthonormal ones: a later gradient can begin from them."""
    wide = columns if columns.dtype == torch.float64 else columns.float()
    return torch.linalg.qr(wide).Q.to(columns.dtype)


def _product(sizes: Sequence[int]) -> int:
    found = 1
    for size in sizes:
        found *= size
    return found
