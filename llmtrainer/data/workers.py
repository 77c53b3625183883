"""Work that several processes do side by side, given back in the order it was asked for."""

from __future__ import annotations

import multiprocessing
import os
import signal
import threading
from collections import deque
from collections.abc import Callable, Generator, Iterator
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from multiprocessing import connection
from typing import Any, TypeVar

from llmtrainer.base.errors import UserError

Work = TypeVar("Work")
Done = TypeVar("Done")

_IN_FLIGHT = 3
"""Pieces of work on their way per process: one in work, one waiting, one coming back."""


def worked_here(pieces: Iterator[Work], make: Callable[[], Callable[[Work], Done]]) -> Generator[tuple[Work, Done]]:
    """Each piece and what becomes of it, in this process."""
    work = make()
    for piece in pieces:
        yield piece, work(piece)


def worked_by(
    workers: int, pieces: Iterator[Work], make: Callable[[], Callable[[Work], Done]]
) -> Generator[tuple[Work, Done]]:
    """As `worked_here`, by several processes. `make` is a function that they can import, and runs once in each.

    Raises what the work raises, and UserError if a process died.
    """
    pool = ProcessPoolExecutor(
        workers, multiprocessing.get_context("spawn"), initializer=_begin, initargs=(make,)
    )  # fmt: skip
    waiting: deque[tuple[Work, Future[Done]]] = deque()
    try:
        for piece in pieces:
            waiting.append((piece, pool.submit(_do, piece)))
            if len(waiting) >= _IN_FLIGHT * workers:    # memory is bounded by what is on its way
                first, future = waiting.popleft()
                yield first, future.result()
        while waiting:
            first, future = waiting.popleft()
            yield first, future.result()
    except BrokenProcessPool as error:
        raise UserError(
            "a process that tokenises has died",
            why="it was killed, by a person or for want of memory, or it could not start (a script must call "
            'this below `if __name__ == "__main__":`)',
            fix="run the same command again: it goes on where it was; with fewer processes: workers=1",
        ) from error
    finally:
        pool.shutdown(wait=True, cancel_futures=True)


_work: Callable[[Any], Any] | None = None
"""Of a worker process; never set in any other."""


def _begin(make: Callable[[], Callable[[Any], Any]]) -> None:
    """Make a fresh process a worker."""
    global _work
    signal.signal(signal.SIGINT, signal.SIG_IGN)    # Ctrl-C reaches the whole group; the parent ends its workers
    threading.Thread(target=_end_with_parent, daemon=True).start()
    _work = make()


def _end_with_parent() -> None:
    # A pool's worker waits for work on a pipe whose other end it holds itself: when the parent is killed, nothing
    # would ever wake it.
    parent = multiprocessing.parent_process()
    assert parent is not None
    connection.wait([parent.sentinel])
    os._exit(1)


def _do(piece: Any) -> Any:
    assert _work is not None
    return _work(piece)
