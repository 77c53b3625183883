"""The processes that train together: how they meet, add numbers, and let one of them go first."""

from __future__ import annotations

import datetime
import zlib
from collections.abc import Callable, Mapping

import torch
import torch.distributed as dist
from torch import Tensor

from llmtrainer.base import process
from llmtrainer.base.errors import UserError
from llmtrainer.core.protocols import Made

PATIENCE = datetime.timedelta(days=7)
"""How long processes wait while one of them prepares data: that can take hours, and is no failure."""


class World:
    """This process among those that train together. Numbers of the host go over gloo, gradients over `backend`."""

    def __init__(self, device: torch.device, timeout: datetime.timedelta) -> None:
        """Meet the others. Raises UserError where they do not all come within `timeout`."""
        self.rank, self.size, self.local_rank = process.rank(), process.world_size(), process.local_rank()
        self._owns = not dist.is_initialized()
        if self._owns:
            _meet(device, self.rank, self.size, timeout)
        self.collectives = 0
        """Sums and meetings of the host so far; those of gradients are the engine's."""
        self._patient: dist.ProcessGroup | None = dist.new_group(backend="gloo", timeout=PATIENCE)

    def sum(self, numbers: Mapping[str, float]) -> dict[str, float]:
        """Each number added up over all ranks, in float64. Every rank calls it with the same names.

        Raises RuntimeError where a rank has left the order of calls: gloo alone would hand it another sum's numbers.
        """
        names = sorted(numbers)
        sign = float(zlib.crc32(" ".join(names).encode()))
        added = torch.tensor([sign, *(float(numbers[name]) for name in names)], dtype=torch.float64)
        self.collectives += 1
        dist.all_reduce(added)
        signs, *found = added.tolist()
        if signs != sign * self.size:
            raise RuntimeError(f"rank {self.rank} adds up {', '.join(names)}, and another rank something else")
        by_name = dict(zip(names, found, strict=True))
        return {name: by_name[name] for name in numbers}

    def gather(self, values: Tensor) -> list[Tensor]:
        """Every rank's [n] of one type, by rank; n may differ."""
        sizes = [torch.zeros(1, dtype=torch.int64) for _ in range(self.size)]
        self.collectives += 2
        dist.all_gather(sizes, torch.tensor([len(values)]))
        longest = max(1, *(int(size) for size in sizes))
        padded = torch.zeros(longest, dtype=values.dtype)
        padded[: len(values)] = values
        found = [torch.empty_like(padded) for _ in sizes]
        dist.all_gather(found, padded)
        return [one[: int(size)] for one, size in zip(found, sizes, strict=True)]

    def sum_of(self, numbers: Tensor) -> Tensor:
        """A vector added up over all ranks, in its place."""
        self.collectives += 1
        dist.all_reduce(numbers)
        return numbers

    def in_turn(self, work: Callable[[], Made]) -> Made:
        """Do what makes files once: rank 0 does it first, then one process of every other machine, then all others,
        who find what was made. Where machines share a disk, so do theirs."""
        mine = 0 if self.rank == 0 else 1 if self.local_rank == 0 else 2
        made: list[Made] = []
        for turn in range(3):
            if turn == mine:
                made.append(work())
            self.meet()
        return made[0]

    def meet(self) -> None:
        """Wait until every rank is here, however long the others take."""
        self.collectives += 1
        dist.all_reduce(torch.zeros(()), group=self._patient)

    def first(self, values: Tensor) -> Tensor:
        """Rank 0's values, on every rank."""
        self.collectives += 1
        dist.broadcast(values, src=0)
        return values

    def leave(self) -> None:
        if not dist.is_initialized():
            return
        if self._owns:
            dist.destroy_process_group()
        elif self._patient is not None:
            dist.destroy_process_group(self._patient)
        self._patient = None    # its threads wait for messages as long as anybody refers to it


def _meet(device: torch.device, rank: int, size: int, timeout: datetime.timedelta) -> None:
    backend = "cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo"
    if size == 1:
        store = dist.HashStore()     # type: ignore[attr-defined]  # torch re-exports it without saying so
        dist.init_process_group(backend, store=store, rank=0, world_size=1, timeout=timeout)
        return
    try:
        dist.init_process_group(backend, rank=rank, world_size=size, timeout=timeout)
    except (ValueError, dist.DistError) as error:
        raise UserError(
            f"the {size:,} processes of this job did not all meet",
            where="environment: MASTER_ADDR, MASTER_PORT, RANK, WORLD_SIZE",
            why=str(error).splitlines()[0],
            fix="start all of them with one command: llmtrainer launch --nproc 2 train RECIPE.yaml engine.kind=ddp",
        ) from error
