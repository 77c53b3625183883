"""Warm-up, then the peak divided by the square root of how far the run has come."""

from __future__ import annotations

import math

from llmtrainer.base.errors import UserError
from llmtrainer.base.units import UNKNOWN_PACE, Duration, Pace, Progress
from llmtrainer.core.schedule import Schedule


class InverseSquareRoot(Schedule):
    """Vaswani 2017, arXiv:1706.03762, eq. 3: half the peak after four warm-ups, a third after nine. Knows no length,
    so a run may be extended without asking how long it was meant to be."""

    timescale: Duration | None = None
    """Left out, the warm-up. With another one T, the rate is half the peak 3 T after the end of the warm-up, a third
    8 T after it. In the warm-up's unit."""

    def after_warmup(self, at: Progress, length: Duration) -> float:
        timescale = self._timescale()
        since = at.amount(timescale.unit) - self.warmup.value
        return math.sqrt(timescale.value / max(timescale.value + since, timescale.value))

    def require_fit(self, length: Duration, pace: Pace = UNKNOWN_PACE) -> None:
        super().require_fit(length, pace)
        self._timescale()

    def _timescale(self) -> Duration:
        timescale = self.timescale or self.warmup
        if timescale.value <= 0 or (self.warmup.value > 0 and timescale.unit != self.warmup.unit):
            raise UserError(
                f"a timescale of {timescale} and a warm-up of {self.warmup} give no rate",
                where="optim.schedule.timescale",
                why="the rate falls with the square root of time, which needs a measure of time: one, and not zero",
                fix=f"optim.schedule.timescale='1000 {timescale.unit if self.warmup.value == 0 else self.warmup.unit}'",
            )
        return timescale
