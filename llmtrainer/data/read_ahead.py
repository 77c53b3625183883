"""The micro-batches of a step, those of the next one made ready meanwhile."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor

from llmtrainer.core.batch import Batch


class ReadAhead:
    """A function step -> micro-batches, whose next value is worked out on a thread while this one is used. Any step
    may be asked for at any time."""

    def __init__(self, make: Callable[[int], list[Batch]], prefetch: bool = True) -> None:
        self._make = make
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="rows") if prefetch else None
        self._next: tuple[int, Future[list[Batch]]] | None = None

    def __call__(self, step: int) -> list[Batch]:
        if self._thread is None:
            return self._make(step)
        expected, self._next = self._next, None
        found = expected[1].result() if expected is not None and expected[0] == step else self._make(step)
        self._next = step + 1, self._thread.submit(self._make, step + 1)
        return found

    def close(self) -> None:
        """End the thread."""
        if self._thread is not None:
            self._thread.shutdown(wait=True, cancel_futures=True)
