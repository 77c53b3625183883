"""What a person sees while something runs: bars and one line of figures on stderr, never on stdout."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import cached_property
from types import TracebackType
from typing import Any, Self

from rich.console import Console
from rich.console import Group as Lines
from rich.live import Live
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

from llmtrainer.base.units import Duration, Progress
from llmtrainer.training.figures import amount, number, remaining, short, span

SECONDS_BETWEEN_LINES = 5.0
"""How often a line is due where there is no terminal: a log file should be readable, not full."""
REFRESHES_A_SECOND = 4.0
TITLE_WIDTH = 20
"""Bars that follow each other begin in one column."""
FIGURES_WIDTH = 54
"""What a bar leaves for percent, amount, speed and time left."""
SHORTEST_BAR, LONGEST_BAR = 6, 24
"""In characters: a narrow terminal takes from the bar before it takes from the figures."""
Advance = Callable[[float], None]
"""Called with how much was done since the last call."""


@dataclass
class _Voice:
    quiet: bool = False
    stdout: bool = False
    """Whether stdout may be written to before the result: where nobody said so, it belongs to the caller."""
    clock: Callable[[], float] = time.monotonic
    given: Console | None = None

    @cached_property
    def screen(self) -> Console:
        return self.given or Console(stderr=True, highlight=False)

    @property
    def live(self) -> bool:
        """Whether lines may be drawn again in place."""
        return self.screen.is_terminal and not self.screen.is_dumb_terminal and not self.quiet


_voice = _Voice()


@contextmanager
def voice(
    *,
    quiet: bool = False,
    json: bool = False,
    clock: Callable[[], float] = time.monotonic,
    screen: Console | None = None,
) -> Iterator[None]:
    """How to speak within the block. `quiet`: warnings only. `json`: stdout is kept for one JSON object."""
    # A module's variable and not a context variable: a checkpoint writer's thread speaks the same way.
    global _voice
    before = _voice
    _voice = _Voice(quiet, not quiet and not json, clock, screen)
    try:
        yield
    finally:
        _voice = before


def is_quiet() -> bool:
    """Whether progress was asked to be left out."""
    return _voice.quiet


def stdout_is_for_people() -> bool:
    """Whether text may be streamed to stdout as it comes: within a command, to a terminal, without `--json`."""
    return _voice.stdout and sys.stdout.isatty()


def say(text: str) -> None:
    """Tell one thing, unless quiet was asked for."""
    if not _voice.quiet:
        _line(text)


def warn(text: str) -> None:
    """Tell something that a person should know, also where quiet was asked for."""
    _line(f"warning: {text}")


def _line(text: str) -> None:
    # soft_wrap: a line of a log stays one line, however narrow the terminal that it was written for.
    _voice.screen.print(text, markup=False, highlight=False, emoji=False, soft_wrap=True)


@contextmanager
def bar(title: str, total: float | None, unit: str) -> Iterator[Advance]:
    """A progress bar while the block runs; call what it gives with how much was done since the last call.

    `total` in units, None if nobody knows. `unit` is a plural noun; `bytes` are shown as kB, MB or GB.
    Without a terminal: one line now and then, and one at the end.
    """
    if _voice.quiet:
        yield lambda amount: None
        return
    meter = _Meter(title, total, unit, _voice.clock, started=_voice.clock())
    if not _voice.live:
        pace = _Pace(_voice.clock)

        def advance(amount: float) -> None:
            meter.done += amount
            if pace.due():
                say(meter.line())

        yield advance
        say(meter.last_line())
        return

    def advance_live(amount: float) -> None:
        meter.done += amount

    with Live(get_renderable=meter.row, console=_voice.screen, refresh_per_second=REFRESHES_A_SECOND) as live:
        yield advance_live
        meter.finished = True
        live.refresh()


class _Pace:
    """Says when the next line is due: `SECONDS_BETWEEN_LINES` after the last."""

    def __init__(self, clock: Callable[[], float], at_once: bool = False) -> None:
        self.clock = clock
        self.next = clock() + (0.0 if at_once else SECONDS_BETWEEN_LINES)

    def due(self) -> bool:
        if self.clock() < self.next:
            return False
        self.next = self.clock() + SECONDS_BETWEEN_LINES
        return True


@dataclass
class _Meter:
    title: str
    total: float | None
    unit: str
    clock: Callable[[], float]
    started: float
    done: float = 0.0
    finished: bool = False

    @property
    def share(self) -> float | None:
        """0 to 1; None where the end is unknown."""
        if self.finished:
            return 1.0
        return None if not self.total else min(self.done / self.total, 1.0)

    def figures(self) -> str:
        seconds = self.clock() - self.started
        if self.finished:
            return self._summary(seconds)
        parts = [self._place()]
        if seconds > 0 and self.done:
            parts.append(f"{amount(self.done / seconds, self.unit)}/s")
        if self.share and (left := remaining(seconds, self.share)) is not None:
            parts.append(f"{left} left")
        return "  ".join(parts)

    def _place(self) -> str:
        """`1.2 MB of 3 MB`, `2 of 40 tokens`."""
        done = amount(self.done, self.unit)
        if self.total is None:
            return done
        return f"{done if self.unit == 'bytes' else f'{self.done:,.0f}'} of {amount(self.total, self.unit)}"

    def line(self) -> str:
        percent = "" if self.share is None else f"{self.share:4.0%}  "
        return f"{self.title}: {percent}{self.figures()}"

    def last_line(self) -> str:
        return f"{self.title}: {self._summary(self.clock() - self.started)}"

    def _summary(self, seconds: float) -> str:
        speed = f"  ({amount(self.done / seconds, self.unit)}/s)" if seconds > 0 and self.done else ""
        return f"{amount(self.done, self.unit)} in {span(seconds)}{speed}"

    def row(self) -> Table:
        return _bar_row(self.title, self.share, self.figures(), self.clock())


def _bar_row(title: str, share: float | None, figures: str, now: float) -> Table:
    # No colour: bold and dim are readable on every background.
    row = Table.grid(padding=(0, 2))
    for width in (TITLE_WIDTH, SHORTEST_BAR, len("100%"), None):
        row.add_column(no_wrap=True, min_width=width)
    width = max(SHORTEST_BAR, min(LONGEST_BAR, _voice.screen.width - TITLE_WIDTH - FIGURES_WIDTH))
    drawn = ProgressBar(
        total=1.0 if share is not None else None, completed=share or 0.0, width=width, pulse=share is None,
        animation_time=now, style="dim", complete_style="bold", finished_style="bold", pulse_style="bold",
    )
    percent = "" if share is None else f"{share:.0%}"
    row.add_row(Text(title.ljust(TITLE_WIDTH)), drawn, Text(percent), Text(figures))
    return row


class Unseen:
    """The view of a process that another one shows: it shows nothing."""

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Nothing is open."""

    def show(self, event: Mapping[str, Any]) -> None:
        """Nobody looks."""


class TrainingView:
    """Shows a run's events as they happen, each as it stands in events.jsonl.

    On a terminal: a bar with the time left, below it the figures of the last step and the shape of the loss
    so far. Elsewhere: one line for the first step, then one now and then, and one for the last.
    """

    def __init__(self, duration: Duration, start: Progress | None = None) -> None:
        self._duration = duration
        self._minutes = start.minutes if start else 0.0
        self._share = duration.share(start) if start else 0.0
        self._voice = _voice
        self._pace = _Pace(_voice.clock, at_once=True)
        self._first: tuple[float, float] | None = None
        self._step: Mapping[str, Any] | None = None
        self._told = True
        self._history = _History()
        self._open = ExitStack()
        self._live: Live | None = None

    def __enter__(self) -> Self:
        if self._voice.live:
            screen = self._voice.screen
            live = Live(get_renderable=self._picture, console=screen, refresh_per_second=REFRESHES_A_SECOND)
            self._live = self._open.enter_context(live)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._tell_step()
        self._open.close()

    def show(self, event: Mapping[str, Any]) -> None:
        """Take one event. Kinds that say nothing to a person are passed over."""
        match event.get("kind"):
            case "step":
                self._take(event)
            case "resume":
                self._minutes = float(event.get("minutes") or 0.0)
                say(f"continues after step {event['step']:,}")
            case "stop":
                self._tell_step()
                say(f"stopped after step {event['step']:,}: the same command continues")
            case "evaluate":
                self._tell_step()
                say(f"step {event['step']:,}: {_evaluation(event)}")
            case "save":
                say(f"step {event['step']:,}: checkpoint saved")
            case "warning":
                warn(str(event.get("text", "")))

    def _take(self, event: Mapping[str, Any]) -> None:
        self._minutes += float(event.get("seconds") or 0.0) / 60
        tokens, epochs = int(event.get("tokens") or 0), float(event.get("epochs") or 0.0)
        progress = Progress(int(event["step"]), tokens, epochs, self._minutes)
        self._share = min(self._duration.share(progress), 1.0)
        # The first step warms caches and compiles: what is left is judged by the pace after it.
        self._first = self._first or (self._voice.clock(), self._share)
        self._step, self._told = event, False
        if (loss := event.get("loss")) is not None:
            self._history.add(float(loss))
        if self._pace.due():
            self._tell_step()

    def _tell_step(self) -> None:
        """One line for the last step, where there is no picture of it and none was told yet."""
        if not self._told and not self._live:
            say(self._line())
            self._told = True

    def _left(self) -> str | None:
        if self._first is None:
            return None
        started, share = self._first
        if self._share >= 1.0 or self._share <= share:
            return None
        return remaining(self._voice.clock() - started, (self._share - share) / (1.0 - share))

    def _position(self) -> str:
        assert self._step is not None
        step = f"step {self._step['step']:,}"
        match self._duration.unit:
            case "steps":
                return f"{step} of {self._duration.value:,.0f}"
            case "tokens":
                return f"{step}, {short(self._step['tokens'])} of {short(self._duration.value)} tokens"
            case "epochs":
                return f"{step}, epoch {self._step.get('epochs') or 0.0:.2f} of {self._duration.value:g}"
            case _:
                return f"{step}, {self._minutes:.1f} of {self._duration.value:g} minutes"

    def _figures(self) -> list[str]:
        assert self._step is not None
        shown = (
            ("loss", "loss {:.4f}"), ("reward/mean", "reward {:.2f}"), ("preference/accuracy", "accuracy {:.2f}"),
            ("learning_rate", "lr {:.2e}"), ("grad_norm", "grad norm {:.3g}"),
            ("tokens_per_second", "{:,.0f} tokens/s"), ("mfu", "MFU {:.1%}"),
        )
        return [text.format(self._step[name]) for name, text in shown if self._step.get(name) is not None]

    def _line(self) -> str:
        left = self._left()
        place = f"{self._position()} ({self._share:.1%})"
        return "  ".join([place, *self._figures(), *([f"{left} left"] if left else [])])

    def _picture(self) -> Lines | Text:
        if self._step is None:
            return Text("")
        left = self._left()
        top = _bar_row(self._position(), self._share, f"{left} left" if left else "", self._voice.clock())
        figures = "  ".join([*self._figures(), self._history.drawn(self._voice.screen)])
        return Lines(top, Text(figures, no_wrap=True, overflow="crop"))


class _History:
    """The loss so far as a row of less than 2 * WIDTH bars: that many are merged in pairs."""

    WIDTH = 16

    def __init__(self) -> None:
        self._means: list[float] = []
        self._open: list[float] = []
        self._steps_per_bar = 1

    def add(self, loss: float) -> None:
        self._open.append(loss)
        if len(self._open) == self._steps_per_bar:
            self._means.append(sum(self._open) / len(self._open))
            self._open = []
        if len(self._means) == 2 * self.WIDTH:
            self._means = [(a + b) / 2 for a, b in zip(self._means[::2], self._means[1::2], strict=True)]
            self._steps_per_bar *= 2

    def drawn(self, screen: Console) -> str:
        finite = [value for value in self._means if abs(value) < float("inf")]
        if len(finite) < 2 or not screen.encoding.startswith("utf"):
            return ""
        low, high = min(finite), max(finite)
        # U+2581 to U+2588: from the lowest of the eight block elements to the full block.
        return "".join(chr(0x2581 + round(7 * (value - low) / ((high - low) or 1.0))) for value in finite)


def _evaluation(event: Mapping[str, Any]) -> str:
    """`held out: loss 2.3450, perplexity 10.4; arithmetic: ...` from `held_out/loss` and the like."""
    parts: dict[str, list[str]] = {}
    for name, value in event.items():
        if name not in ("kind", "time", "step") and isinstance(value, int | float):
            suite, _, figure = name.rpartition("/")
            parts.setdefault(suite, []).append(f"{figure.replace('_', ' ')} {number(value)}")
    named = ((suite.replace("_", " "), ", ".join(shown)) for suite, shown in parts.items())
    return "; ".join(f"{suite}: {shown}" if suite else shown for suite, shown in named)
