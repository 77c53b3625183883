"""stop: ask a run to end with a checkpoint, and wait until it has."""

from __future__ import annotations

import time
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

from pydantic import Field

from llmtrainer.base.config import Config
from llmtrainer.base.errors import UserError
from llmtrainer.base.heartbeat import read_beats
from llmtrainer.base.result import Result
from llmtrainer.base.rundir import RunDir
from llmtrainer.base.supervision import is_running, is_watched
from llmtrainer.training.console import say

POLL_SECONDS = 0.2
SECONDS_BETWEEN_LINES = 1.0


class Stopping(Config):
    """Which run."""

    words: ClassVar[tuple[str, ...]] = ("run",)

    run: str
    """The run directory."""

    reason: str = ""
    """What the run's log says of it."""

    wait: bool = True
    """Wait until the run has ended, and its supervisor with it."""

    longest: float | None = Field(default=None, gt=0.0)
    """Seconds to wait at most; as long as it takes if not given."""


@dataclass(frozen=True)
class Stopped(Result):
    """Where the run stands."""

    run: str
    was_running: bool
    checkpoint: str | None
    """The newest one; None if there is none."""
    seconds: float
    """That it took to end."""


def stop(stopping: Stopping) -> Stopped:
    """Ask, and wait. A run that nobody trains is left as it is."""
    run = RunDir(Path(stopping.run))
    if not run.path.is_dir():
        raise UserError(f"there is no run directory `{run.path}`", fix="llmtrainer stop runs/NAME")
    began = time.monotonic()
    if not is_running(run) and not is_watched(run):
        say("nothing is running there")
        return Stopped(str(run.path), False, _newest(run), 0.0)
    run.control.mkdir(parents=True, exist_ok=True)
    (run.control / "stop").write_text(stopping.reason, encoding="utf-8")
    if stopping.wait:
        _wait(run, began, stopping.longest)
    return Stopped(str(run.path), True, _newest(run), time.monotonic() - began)


def _wait(run: RunDir, began: float, longest: float | None) -> None:
    told, due = "", began
    while is_running(run) or is_watched(run):
        beats = read_beats(run.control / "heartbeats")
        doing = "; ".join(sorted({f"step {beat.step}, {beat.phase}" for beat in beats.values()}))
        seconds = time.monotonic() - began
        if (doing or "its supervisor ends") != told and began + seconds >= due:
            told, due = doing or "its supervisor ends", began + seconds + SECONDS_BETWEEN_LINES
            say(f"stopping, {seconds:.0f} s: {told}")
        if longest is not None and seconds > longest:
            raise UserError(
                f"the run has not ended within {longest:g} seconds", where=str(run.path), why=doing or None,
                fix="the request stands, and the run ends after its step; kill -9 loses what came after the last "
                "checkpoint",
            )
        time.sleep(POLL_SECONDS)
    # It ended by itself before it saw the request: the next start must not stop at once.
    (run.control / "stop").unlink(missing_ok=True)


def _newest(run: RunDir) -> str | None:
    folders = run.whole_checkpoints()
    return folders[0].name if folders else None
