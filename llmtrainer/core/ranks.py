"""Processes that work together, as the parts see them that only share out work: who they are, and what all know."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from typing import Protocol, TypeVar

from torch import Tensor, nn

Item = TypeVar("Item")


class Ranks(Protocol):
    """This process among others. Every engine is one."""

    rank: int
    world_size: int

    def sum(self, numbers: Mapping[str, float]) -> dict[str, float]:
        """Each number added up over all ranks: every rank asks with the same names, in the same order of calls."""
        ...

    def gather(self, values: Tensor) -> list[Tensor]:
        """Every rank's [n] of one type, by rank; n may differ. On the CPU, and every rank asks."""
        ...


class Shown(Protocol):
    """What an engine shows of itself."""

    def told(self) -> Mapping[str, float]:
        """Metrics of the last step that are equal on every rank, such as bytes sent."""
        ...

    def readable(self, policy: nn.Module) -> AbstractContextManager[None]:
        """Until the block ends, every tensor of the policy holds numbers: whole, or a DTensor. Every rank enters."""
        ...


class Alone:
    """One process."""

    rank = 0
    world_size = 1

    def sum(self, numbers: Mapping[str, float]) -> dict[str, float]:
        return dict(numbers)

    def gather(self, values: Tensor) -> list[Tensor]:
        return [values]


ALONE = Alone()


def of_first(ranks: Ranks, number: float) -> float:
    """Rank 0's number, on every rank."""
    return ranks.sum({"number": number if ranks.rank == 0 else 0.0})["number"]


def share_of(items: Sequence[Item], ranks: Ranks) -> Sequence[Item]:
    """This rank's part of some items: parts follow each other in the order of ranks, and differ by one item at most."""
    n, rank, size = len(items), ranks.rank, ranks.world_size
    return items[n * rank // size : n * (rank + 1) // size]


def in_turns(items: Iterable[Item], ranks: Ranks) -> Iterator[tuple[Item, bool]]:
    """This rank's items of those that all ranks list alike, dealt out in turn, and True. As many come on every rank,
    so that all take part in whatever each of them costs: where none is left for a rank, another's and False."""
    turns: list[Item] = []
    for item in items:
        turns.append(item)
        if len(turns) == ranks.world_size:
            yield turns[ranks.rank], True
            turns = []
    if turns:
        own = ranks.rank < len(turns)
        yield turns[ranks.rank if own else 0], own
