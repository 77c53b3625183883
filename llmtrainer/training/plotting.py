"""plot, the function behind the command."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar, Literal

from pydantic import Field

from llmtrainer.base.config import Config
from llmtrainer.base.errors import UserError
from llmtrainer.base.events import read_events, steps
from llmtrainer.base.result import Result
from llmtrainer.base.rundir import RunDir


class Plot(Config):
    """The curves of one or several runs as a picture."""

    words: ClassVar[tuple[str, ...]] = ("runs",)

    runs: tuple[str, ...] = Field(min_length=1)
    """Run directories. Several are drawn over each other."""

    out: str | None = None
    """The PNG to write. By default plots/curves.png in the run directory, or plots/comparison.png in the first
    of several."""

    x: Literal["step", "tokens", "minutes"] = "step"
    """What the horizontal axis counts: steps, tokens, or minutes of training."""


@dataclass(frozen=True)
class Plotted(Result):
    """Where the picture is."""

    path: str
    panels: list[str]
    """Titles of its panels, the loss first."""

    def text(self) -> str:
        return f"{self.path}: {', '.join(self.panels)}"


def plot(settings: Plot) -> Plotted:
    """Draw loss, learning rate, gradient norm, speed and evaluations. UserError if a run has no step yet."""
    from llmtrainer.training.curves import Curve, draw  # matplotlib takes half a second that no other verb needs

    curves = []
    for name in settings.runs:
        path = RunDir(Path(name)).events
        stepped, events = steps(path), read_events(path)
        if not stepped:
            raise UserError(
                "this run has no step to draw", where=str(path), fix="wait for its first step, or train it"
            )
        last = {event["step"]: event for event in events if event["kind"] == "evaluate"}
        resumed = [event["step"] for event in events if event["kind"] == "resume"]
        curves.append(Curve(name, stepped, [last[step] for step in sorted(last)], resumed))
    default = RunDir(Path(settings.runs[0])).plots / ("curves.png" if len(curves) == 1 else "comparison.png")
    out = Path(settings.out) if settings.out else default
    return Plotted(str(out), draw(curves, out, settings.x))
