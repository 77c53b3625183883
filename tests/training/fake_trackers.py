"""Trackers for tests, chosen by their dotted path."""

from __future__ import annotations

import threading
from collections.abc import Mapping
from typing import Any, ClassVar

from llmtrainer.base.rundir import RunDir
from llmtrainer.training.tracking import Tracker, Writing

told: list[tuple[str, int, dict[str, float]]] = []
"""(name of the run there, step, figures) of every call, in order."""
opened: list[tuple[str, int, int]] = []
"""(name, first step, keys of the recipe) of every begin."""
closed: list[str] = []
never = threading.Event()


class Recording(Tracker):
    """Keeps what it is told."""

    raise_at: int = 0
    """The call that raises, counted from 1."""
    hang: str = ""
    """open, write or close: where it never comes back."""

    def open(self, run: RunDir, recipe: Mapping[str, Any], name: str, first: int) -> Writing:
        opened.append((name, first, len(recipe)))
        if self.hang == "open":
            never.wait()
        return _Writing(self, name)


class Rewinding(Recording):
    """As one that can be told steps again."""

    rewinds: ClassVar[bool] = True


class Absent(Recording):
    """Needs a package that nobody has."""

    package: ClassVar[str | None] = "no_such_tracker"


class _Writing:
    def __init__(self, settings: Recording, name: str) -> None:
        self.settings, self.name, self.calls = settings, name, 0

    def write(self, step: int, values: Mapping[str, float]) -> None:
        self.calls += 1
        if self.settings.hang == "write":
            never.wait()
        if self.calls == self.settings.raise_at:
            raise SystemExit("the pipe\nis broken")
        told.append((self.name, step, dict(values)))

    def close(self) -> None:
        if self.settings.hang == "close":
            never.wait()
        closed.append(self.name)
