"""Hooks: what happens to a bucket of gradients on its way between processes."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import ClassVar, Self

import torch
from torch import Tensor, nn

from llmtrainer.base.config import Kind
from llmtrainer.parallel.link import Link


@dataclass(frozen=True)
class Bucket:
    """Gradients that travel together. They lie behind one another in `buffer`, so that one message carries all."""

    buffer: Tensor
    """All numbers, flat."""
    names: tuple[str, ...]
    """The parameters, or what a hook before this one made of them."""
    tensors: tuple[Tensor, ...]
    """Views of `buffer`, in the shapes of the parameters."""
    update: int = 0
    """Updates of the weights before this one."""
    scale: float = 1.0
    """Factor on these gradients: float16's loss scale."""

    def like(self, buffer: Tensor) -> Self:
        """The same tensors in another buffer of as many numbers."""
        begin = self.buffer.storage_offset()
        views = [
            torch.as_strided(buffer, item.shape, item.stride(), item.storage_offset() - begin) for item in self.tensors
        ]
        return replace(self, buffer=buffer, tensors=tuple(views))

    def holding(self, named: Mapping[str, Tensor]) -> Self:
        """A bucket of other tensors, of one dtype, for the same update: copies, in a buffer of their own."""
        buffer = torch.cat([item.reshape(-1) for item in named.values()])
        pieces = buffer.split([item.numel() for item in named.values()])
        views = tuple(piece.view(item.shape) for piece, item in zip(pieces, named.values(), strict=True))
        return replace(self, buffer=buffer, names=tuple(named), tensors=views)


Onward = Callable[[Bucket], None]
"""Sends a bucket through the hooks that follow and over the link. Afterwards it holds the sums over all ranks."""


class Exchange:
    """A hook at work in one process. By default it has no memory."""

    fallbacks: tuple[str, ...] = ()
    """Sentences for people: what was asked for and cannot be had here."""

    def __call__(self, bucket: Bucket, onward: Onward) -> None:
        """Make of every gradient its sum over all ranks, in place. What is sent goes through `onward`, called equally
        often on every rank, from this very thread: that alone keeps the ranks' messages in one order."""
        raise NotImplementedError

    def collect(self, named: Mapping[str, nn.Parameter]) -> None:
        """Called behind backward: what is not where an optimizer looks for it comes to `grad`."""

    def release(self, named: Mapping[str, nn.Parameter]) -> None:
        """Called when the gradients of a step were cleared."""

    def shared_state(self) -> dict[str, Tensor]:
        """What it remembers from one step to the next, equal on every rank."""
        return {}

    def own_state(self) -> dict[str, Tensor]:
        """What only this rank remembers. With another number of ranks, each gets an equal share of the sums."""
        return {}

    def load_state(self, shared: Mapping[str, Tensor], own: Mapping[str, Tensor]) -> None:
        """Continue from what `shared_state` and `own_state` gave."""


class Hook(Kind):
    """What gradients go through between processes: its fields say how. A hook of your own is a class in a module
    that Python can import, `engine.hook.kind=package.module.Class`."""

    folder: ClassVar[str] = "llmtrainer.parallel.hooks"
    default_kind: ClassVar[str] = "none"

    def exchange(self, bucket: Bucket, onward: Onward) -> None:
        """See Exchange. For a hook without memory this is all there is to write."""
        raise NotImplementedError

    def require(self, precision: str, early: bool) -> None:
        """UserError where it cannot work on gradients of this precision, or with updates during backward (`early`)."""

    def start(self, link: Link) -> Exchange:
        """The hook at work. One that remembers, or asks the link something, returns an object of its own."""
        return _Forgetful(self.exchange)


class _Forgetful(Exchange):
    def __init__(self, exchange: Callable[[Bucket, Onward], None]) -> None:
        self._exchange = exchange

    def __call__(self, bucket: Bucket, onward: Onward) -> None:
        self._exchange(bucket, onward)


class Several(Exchange):
    """Hooks in a row: what the first sends goes through the second, and what the last sends over the link."""

    def __init__(self, row: Sequence[Exchange]) -> None:
        self._row = tuple(row)
        self.fallbacks = tuple(text for item in row for text in item.fallbacks)

    def __call__(self, bucket: Bucket, onward: Onward) -> None:
        self._from(0, bucket, onward)

    def _from(self, place: int, bucket: Bucket, onward: Onward) -> None:
        if place == len(self._row):
            onward(bucket)
        else:
            self._row[place](bucket, lambda sent: self._from(place + 1, sent, onward))

    def collect(self, named: Mapping[str, nn.Parameter]) -> None:
        for item in self._row:
            item.collect(named)

    def release(self, named: Mapping[str, nn.Parameter]) -> None:
        for item in self._row:
            item.release(named)

    def shared_state(self) -> dict[str, Tensor]:
        return _numbered([item.shared_state() for item in self._row])

    def own_state(self) -> dict[str, Tensor]:
        return _numbered([item.own_state() for item in self._row])

    def load_state(self, shared: Mapping[str, Tensor], own: Mapping[str, Tensor]) -> None:
        for place, item in enumerate(self._row):
            item.load_state(*(part_of(state, f"{place}.") for state in (shared, own)))


def part_of(state: Mapping[str, Tensor], prefix: str) -> dict[str, Tensor]:
    """What is called `prefix` and more, without it."""
    return {name.removeprefix(prefix): value for name, value in state.items() if name.startswith(prefix)}


def _numbered(states: Sequence[Mapping[str, Tensor]]) -> dict[str, Tensor]:
    return {f"{place}.{name}": value for place, state in enumerate(states) for name, value in state.items()}
