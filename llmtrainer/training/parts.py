"""What the loop drives, and what it tells about a step."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from torch import nn

from llmtrainer.base.events import EventLog
from llmtrainer.base.process import StopRequests
from llmtrainer.base.units import Duration, Every, Progress
from llmtrainer.core.batch import Batch
from llmtrainer.core.objective import Objective
from llmtrainer.core.protocols import Annotator, Engine, Source
from llmtrainer.core.schedule import Schedule
from llmtrainer.training.average import MovingAverage
from llmtrainer.training.saving import Saver
from llmtrainer.training.spread import Keep

Before = Callable[[int, list[Batch]], list[Batch]]
"""(step, micro-batches of this rank) -> the same with what is known of the whole step."""


@dataclass(frozen=True)
class StepInfo:
    """What one optimizer step was."""

    progress: Progress
    """Where the run stands after the step."""
    loss: float
    """Nats per unit: all Terms with their coefficients, of the step's batch before its update."""
    metrics: dict[str, float]
    """Each Term by its own name, averaged over its unit."""
    learning_rate: float
    grad_norm: float
    """Global norm before clipping."""
    tokens: int
    """Real input tokens of this step."""
    seconds: dict[str, float]
    """Where the time went: data, forward, backward, optimizer, and total."""
    skipped: bool = False
    """The weights stayed as they were, because the gradient was not finite or no answer could be learned from."""

    def event(self, flops_per_token: float, peak_flops: float | None) -> dict[str, Any]:
        """The step as the contract writes it into events.jsonl."""
        total = self.seconds["total"]
        rate = self.tokens / total
        parts = {f"seconds/{name}": spent for name, spent in self.seconds.items() if name != "total"}
        return {
            "step": self.progress.step,
            "tokens": self.progress.tokens,
            "epochs": self.progress.epochs,
            "loss": self.loss,
            "learning_rate": self.learning_rate,
            "grad_norm": self.grad_norm,
            "seconds": total,
            "tokens_per_second": rate,
            "mfu": rate * flops_per_token / peak_flops if peak_flops else None,
            **self.metrics,
            **parts,
            **({"skipped": True} if self.skipped else {}),
        }


@dataclass
class Parts:
    """Everything the loop drives, ready to run."""

    seed: int
    source: Source
    policy: nn.Module
    objective: Objective
    engine: Engine
    schedule: Schedule
    schedule_length: Duration
    duration: Duration
    clip: float | None
    on_nonfinite: str
    log: EventLog
    log_every: Every
    evaluate_every: Every
    save_every: Every
    evaluate: Callable[[Progress], dict[str, float]]
    """Runs every evaluation and returns its figures; empty if there are none."""
    saver: Saver
    first_step: Callable[[], None]
    """Asked once after the first step of this process: was every field of the recipe read?"""
    view: Callable[[Mapping[str, Any]], None]
    """Shows an event to whoever watches."""
    annotators: tuple[Annotator, ...] = ()
    """Each adds what it knows to a micro-batch just before its forward pass."""
    before: Before | None = None
    """Adds to the micro-batches of a step, before the first of them is read, what is known of all together."""
    starts_at: Mapping[str, float] = field(default_factory=dict)
    """What Terms must be at the first step of a run, because the policy still is its reference."""
    told: Callable[[], Mapping[str, float]] = dict
    """What the source says of the rows it gave last, beside the Terms of a step."""
    writes_answers: bool = False
    """Whether the rows are answers of the policy's own, of which a step may have none to learn from."""
    keep: Keep | None = None
    """Writes down what the objective says of each pair or sequence of a step; None: nobody asks."""
    beat: Callable[[str, int], None] = lambda phase, step: None
    """Told which phase of which step begins, for whoever watches the run."""
    average: MovingAverage | None = None
    flops_per_token: float = 0.0
    peak_flops: float | None = None
    stop: StopRequests = field(default_factory=StopRequests)


class Clock:
    """Splits a step's time into named laps, in seconds. Whoever watches the run is told which one begins."""

    def __init__(self, beat: Callable[[str, int], None], step: int) -> None:
        self.laps: dict[str, float] = {}
        self._beat, self._step = beat, step
        self._started = self._last = time.perf_counter()
        beat("data", step)

    def lap(self, name: str, then: str = "between") -> None:
        """What `name` took ends here, and `then` begins."""
        now = time.perf_counter()
        self.laps[name] = self.laps.get(name, 0.0) + now - self._last
        self._last = now
        self._beat(then, self._step)

    @property
    def total(self) -> float:
        return self._last - self._started
