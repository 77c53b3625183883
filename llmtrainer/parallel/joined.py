"""What all engines of several processes have in common: how they meet, and how they count and update together."""

from __future__ import annotations

import datetime
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
from pydantic import Field
from torch import Tensor

from llmtrainer.core.protocols import Made
from llmtrainer.parallel.early import EarlySteps
from llmtrainer.parallel.engines.single import Single, SingleEngine
from llmtrainer.parallel.world import World


class Joined(Single):
    """Settings of a process among several."""

    timeout_minutes: float = Field(default=30.0, gt=0.0)
    """How long a process waits for the others in one step before the job ends with an error."""

    def _met(self, device: torch.device) -> World:
        """The processes of this job, once all of them are there."""
        return World(device, datetime.timedelta(minutes=self.timeout_minutes))


class JoinedEngine(SingleEngine):
    """A SingleEngine of one process among several: numbers of the host are of all of them."""

    def __init__(
        self, device: torch.device, precision: str, *, world: World, early: bool = False,
        **settings: Any,    # those of SingleEngine
    ) -> None:
        super().__init__(device, precision, **settings)
        self.world, self.rank, self.world_size = world, world.rank, world.size
        self.updates_in_backward = early
        self._early: EarlySteps | None = None
        """Makes the updates, where they are made during backward; `prepare` builds it."""
        self._took_part: set[str] = set()
        """Parameters that have got a gradient in this step on this rank, where somebody notes it."""

    def begin(self, learning_rate: float) -> None:
        if self._early is not None:
            self._early.begin(learning_rate)

    def clip(self, max_norm: float | None) -> Tensor:
        if self._early is None:
            return super().clip(max_norm)
        assert max_norm is None, "refused with the recipe"
        self._norm = self._root(self._early.squares)
        return self._norm

    def sum(self, numbers: Mapping[str, float]) -> dict[str, float]:
        return self.world.sum(numbers)

    def gather(self, values: Tensor) -> list[Tensor]:
        return self.world.gather(values)

    def in_turn(self, work: Callable[[], Made]) -> Made:
        return self.world.in_turn(work)

    def close(self) -> None:
        super().close()
        self.world.leave()

    def _update(self) -> None:
        if self._early is None:
            super()._update()

    def _noting(self, name: str) -> Callable[[Tensor], None]:
        """A hook of a parameter that backward has come to. It knows nothing of the engine: the tensor would keep it."""
        part = self._took_part
        return lambda parameter: part.add(name)

    def _unused(self, names: Iterable[str]) -> set[str]:
        """Those that took no part in this step on any rank."""
        used = self.world.sum({name: float(name in self._took_part) for name in names})
        return {name for name, count in used.items() if not count}

    def _root(self, squares: float) -> Tensor:
        """The norm of the gradients whose squares add up to this on every rank."""
        return torch.tensor(squares, dtype=torch.float64, device=self.device).sqrt()
