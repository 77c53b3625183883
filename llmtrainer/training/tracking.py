"""Trackers: what a run writes into events.jsonl is told to TensorBoard, W&B or SwanLab, which may fail as they like.

A tracker reads the events file on a thread of its own. The run never waits for it, the file is the truth, and a
tracker that raises or hangs is switched off with one warning.
"""

from __future__ import annotations

import importlib.util
import json
import os
import sys
import threading
import time
import uuid
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar, Protocol

from llmtrainer.base.config import Kind
from llmtrainer.base.errors import UserError
from llmtrainer.base.events import Event, follow
from llmtrainer.base.process import rank
from llmtrainer.base.rundir import RunDir

SECONDS_AT_THE_END = 10.0
"""So long a run waits at its end for all trackers together."""
_POLL_SECONDS = 0.2
_TOLD = ("step", "evaluate")
"""Events that hold figures."""


class Writing(Protocol):
    """An open tracker."""

    def write(self, step: int, values: Mapping[str, float]) -> None:
        """Figures of one step, by the names that events.jsonl has for them. Steps come in ascending order."""
        ...

    def close(self) -> None:
        """Send what is still waiting."""
        ...


class Tracker(Kind):
    """Where the figures of a run are shown besides its own run directory."""

    folder: ClassVar[str] = "llmtrainer.training.trackers"
    package: ClassVar[str | None] = None
    """What has to be installed for it."""
    rewinds: ClassVar[bool] = False
    """Whether steps can be told again after a run was continued from an earlier one. What cannot be taken back is
    told once: a step that is repeated has the same figures."""

    def open(self, run: RunDir, recipe: Mapping[str, Any], name: str, first: int) -> Writing:
        """Begin, or go on with, what is called `name` there; `first` is the first step that will be told."""
        raise NotImplementedError

    def require(self) -> None:
        """UserError if its package is not installed."""
        if self.package is not None and importlib.util.find_spec(self.package) is None:
            raise UserError(
                f"the tracker `{self.kind}` needs the package `{self.package}`, which is not installed",
                fix=f"pip install 'llmtrainer[{self.package}]'",
            )


class Trackers:
    """All trackers of a run. `close` ends them within `SECONDS_AT_THE_END`, whatever they do."""

    def __init__(
        self, trackers: Sequence[Tracker], run: RunDir, recipe: Mapping[str, Any], step: int,
        warn: Callable[[str], None],
    ) -> None:  # fmt: skip
        """`step` is the one the run begins or continues behind; call it before anything is written there."""
        kinds = [tracker.kind for tracker in trackers]
        names = [f"{kind}-{kinds[:place].count(kind) + 1}" for place, kind in enumerate(kinds)]
        told = zip(trackers, names, strict=True) if rank() == 0 else ()
        self._stdout = sys.stdout
        self._followers = [_Follower(tracker, name, run, recipe, step, warn) for tracker, name in told]
        for follower in self._followers:
            follower.start()

    def close(self) -> None:
        for follower in self._followers:
            follower.ending.set()
        deadline = time.monotonic() + SECONDS_AT_THE_END
        for follower in self._followers:
            follower.join(max(deadline - time.monotonic(), 0.0))
            if follower.is_alive():
                follower.give_up("it did not come to its end in time")
                sys.stdout = self._stdout    # it may hold it


class _Follower(threading.Thread):
    """One tracker and its thread. It dies with the process: what it has not told is told by the next."""

    def __init__(
        self, tracker: Tracker, name: str, run: RunDir, recipe: Mapping[str, Any], step: int,
        warn: Callable[[str], None],
    ) -> None:  # fmt: skip
        super().__init__(name=f"tracker {name}", daemon=True)
        self.ending = threading.Event()
        self._tracker, self._run, self._recipe, self._step, self._warn = tracker, run, recipe, step, warn
        self._state = _State(run.path / "trackers" / f"{name.replace('.', '-')}.json")
        self._size = run.events.stat().st_size if run.events.exists() else 0
        self._off = threading.Lock()    # taken by the one warning

    def run(self) -> None:
        try:
            self._follow()
        except BaseException as error:    # a library may even call sys.exit
            self.give_up(f"{type(error).__name__}: {(str(error).splitlines() or [''])[0]}")

    def give_up(self, why: str) -> None:
        """Warn, once."""
        if self._off.acquire(blocking=False):
            self._warn(
                f"the tracker `{self._tracker.kind}` is switched off ({why}); the run goes on, events.jsonl is whole, "
                "and the next run here tells what is missing"
            )

    def _follow(self) -> None:
        state = self._state
        first = min(state.told, self._step) + 1 if self._tracker.rewinds else state.told + 1
        writing = self._tracker.open(self._run, self._recipe, state.name, first)
        for step, values in self._figures():
            if step >= first:
                writing.write(step, values)
                state.told = step
        writing.close()
        state.save()

    def _figures(self) -> Iterator[tuple[int, dict[str, float]]]:
        """Figures in the order of steps: first those of earlier processes up to the step that this one continues
        behind, the last line for a step, then this process's own as they are written."""
        before = _lines(self._run.events, self._size)
        events = follow(self._run.events, until=self.ending.is_set, poll_seconds=_POLL_SECONDS)
        history: dict[tuple[int, str], Event] = {}
        for number, event in enumerate(events):
            if number == before:
                yield from self._settled(history)
            if event["kind"] not in _TOLD:
                continue
            if number < before:
                history[event["step"], event["kind"]] = event
            else:
                yield event["step"], _numbers(event)
                self._state.save_now_and_then()
        if before:    # nothing was written since
            yield from self._settled(history)

    def _settled(self, history: dict[tuple[int, str], Event]) -> Iterator[tuple[int, dict[str, float]]]:
        for step, kind in sorted(history, key=lambda key: (key[0], _TOLD.index(key[1]))):
            if step <= self._step:
                yield step, _numbers(history[step, kind])
        history.clear()


class _State:
    """How far a tracker was told, and what the run is called there: kept between processes."""

    def __init__(self, path: Path) -> None:
        self._path, self._saved_at = path, time.monotonic()
        try:
            kept = json.loads(path.read_text())
            self.told, self.name = int(kept["told"]), str(kept["name"])
        except (OSError, ValueError, KeyError, TypeError):
            self.told, self.name = 0, uuid.uuid4().hex[:12]

    def save_now_and_then(self) -> None:
        if time.monotonic() > self._saved_at + 5.0:
            self.save()

    def save(self) -> None:
        self._path.parent.mkdir(exist_ok=True)
        aside = self._path.with_suffix(".partial")
        aside.write_text(json.dumps({"told": self.told, "name": self.name}) + "\n")
        os.replace(aside, self._path)
        self._saved_at = time.monotonic()


def _numbers(event: Event) -> dict[str, float]:
    return {
        name: float(value)
        for name, value in event.items()
        if name not in ("step", "time") and isinstance(value, int | float) and not isinstance(value, bool)
    }


def _lines(path: Path, size: int) -> int:
    """Whole lines in the first `size` bytes."""
    count, left = 0, size
    if size:
        with path.open("rb") as file:
            while left > 0 and (block := file.read(min(left, 2**20))):
                count, left = count + block.count(b"\n"), left - len(block)
    return count
