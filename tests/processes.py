"""Several processes that train together, for tests: started once, kept, and given one piece of work after another."""

from __future__ import annotations

import os
import socket
from collections.abc import Callable, Iterator
from concurrent.futures import FIRST_EXCEPTION, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from multiprocessing import get_context
from multiprocessing.context import ForkServerContext
from typing import Any, TypeVar

import pytest

Found = TypeVar("Found")
SECONDS = 120.0
"""After which processes that wait for each other are given up."""

SECONDS_BEHIND = 3.0
"""How long after a failure others are waited for, which may have failed with it or before it."""


class Processes:
    """`count` processes on this machine with one thread each."""

    def __init__(self) -> None:
        self._pools: dict[int, ProcessPoolExecutor] = {}

    def run(self, count: int, work: Callable[..., Found], *arguments: Any) -> list[Found]:
        """What `work(*arguments)` returns in each process, by rank; `work` is a function of a module. The environment
        is torchrun's. Raises what the first process to fail raised."""
        pool = self._pools.setdefault(count, ProcessPoolExecutor(count, forks()))
        port = free_port()
        # Each process takes one: it waits for the others before it can be done with its own.
        futures = [pool.submit(_joined, rank, count, port, work, arguments) for rank in range(count)]
        done, waiting = wait(futures, SECONDS, FIRST_EXCEPTION)
        if any(future.exception() is not None for future in done):
            # A process that died says more than the one that missed it first.
            done |= wait(waiting, SECONDS_BEHIND).done
        failures = [future for future in done if future.exception() is not None]
        failed = next((one for one in failures if isinstance(one.exception(), BrokenProcessPool)), None)
        failed = failed or next(iter(failures), None)
        if failed is not None or waiting:
            self._end(count)
        assert failed is not None or not waiting, f"{len(waiting)} of {count} processes still wait after {SECONDS} s"
        return [future.result() for future in ([failed] if failed is not None else futures)]

    def close(self) -> None:
        for count in list(self._pools):
            self._end(count)

    def _end(self, count: int) -> None:
        pool = self._pools.pop(count)
        for process in list((pool._processes or {}).values()):
            process.kill()
        pool.shutdown(wait=True, cancel_futures=True)


@pytest.fixture(scope="module")
def processes() -> Iterator[Processes]:
    """Of one module: engines leave threads behind, and hundreds of those slow down everything that follows."""
    started = Processes()
    yield started
    started.close()


def forks() -> ForkServerContext:
    """Starts processes that need not load torch first."""
    context = get_context("forkserver")
    context.set_forkserver_preload(["tests.imported"])
    return context


def free_port() -> int:
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        port: int = found.getsockname()[1]
    return port


def _joined(rank: int, count: int, port: int, work: Callable[..., Found], arguments: tuple[Any, ...]) -> Found:
    import torch
    import torch.distributed as dist

    torch.set_num_threads(1)
    os.environ.update(
        RANK=str(rank), WORLD_SIZE=str(count), LOCAL_RANK=str(rank), MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port)
    )
    try:
        return work(*arguments)
    finally:
        if dist.is_initialized():
            dist.destroy_process_group()
