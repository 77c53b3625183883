"""CUDA graphs: work that is recorded once and then launched as a whole."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Protocol, TypeVar

import torch

Made = TypeVar("Made")


class Record(Protocol):
    """Work on fixed memory -> what does the same work again, into the same result."""

    def __call__(self, work: Callable[[], Made]) -> Callable[[], Made]: ...


class Graphs:
    """A recorder whose graphs share their memory: a result is copied, or used up, before the next one is replayed."""

    def __init__(self) -> None:
        self._pool: Any = None

    def __call__(self, work: Callable[[], Made]) -> Callable[[], Made]:
        graph = torch.cuda.CUDAGraph()
        # Other threads go on meanwhile: they read data ahead, and write checkpoints.
        with torch.cuda.graph(graph, pool=self._pool, capture_error_mode="thread_local"):
            out = work()
        self._pool = graph.pool()

        def again() -> Made:
            graph.replay()
            return out

        return again
