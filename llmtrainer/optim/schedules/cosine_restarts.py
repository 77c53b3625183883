"""Warm-up, then half a cosine down, again and again."""

from __future__ import annotations

import math
from typing import Literal

from pydantic import Field, field_validator, model_validator

from llmtrainer.base.errors import UserError
from llmtrainer.base.units import UNKNOWN_PACE, Duration, Pace, Progress
from llmtrainer.core.schedule import Schedule


class CosineRestarts(Schedule):
    """Loshchilov and Hutter 2017, arXiv:1608.03983, section 3: half a cosine from `peak` to `final_ratio * peak` in
    every period. Knows no length: a run may stop at the end of any period."""

    period: Duration
    """How long the first way down takes, from the end of the warm-up: `1000 steps`, `2B tokens`, `1 epochs`."""

    multiplier: float = Field(default=1.0, ge=0.0, allow_inf_nan=False)
    """Every period is so many times as long as the one before (T_mult). 0: no restart, the last rate stays."""

    at_restart: Literal["lowest", "peak"] = "lowest"
    """Rate of the update at which one period ends and the next begins. lowest: the last of the old one, so that
    every period reaches its end. peak: the first of the new one, as torch's CosineAnnealingWarmRestarts does."""

    final_ratio: float = Field(default=0.1, ge=0.0, le=1.0)
    """Lowest learning rate divided by `peak`. A ratio, so a change of `peak` keeps the shape."""

    @field_validator("multiplier")
    @classmethod
    def _not_shorter(cls, multiplier: float) -> float:
        if 0.0 < multiplier < 1.0:
            raise UserError(
                f"a multiplier of {multiplier} makes every period shorter than the one before",
                why="there would be infinitely many of them in a finite time",
                fix="1 for equal periods, 2 to double them, 0 for one period alone",
            )
        return multiplier

    @model_validator(mode="after")
    def _one_unit(self) -> CosineRestarts:
        if self.period.value <= 0 or (self.warmup.value > 0 and self.period.unit != self.warmup.unit):
            unit = self.period.unit if self.warmup.value == 0 else self.warmup.unit
            raise UserError(
                f"a period of {self.period} after a warm-up of {self.warmup} has no place in the run",
                why="periods follow each other from the end of the warm-up, in its unit, and none is empty",
                fix=f"optim.schedule.period='1000 {unit}'",
            )
        return self

    def after_warmup(self, at: Progress, length: Duration) -> float:
        since = max(at.amount(self.period.unit) - self.warmup.value, 0.0)
        passed = self._passed(since)
        return self.final_ratio + (1.0 - self.final_ratio) * 0.5 * (1.0 + math.cos(math.pi * passed))

    def require_fit(self, length: Duration, pace: Pace = UNKNOWN_PACE) -> None:
        super().require_fit(length, pace)
        whole = pace.converted(length, self.period.unit)
        end = self.warmup.value + self.period.value
        if whole is not None and end > whole.value * (1 + 1e-9) and length.value > 0:
            told = "" if whole.unit == length.unit else f", about {whole.rounded_down()}"
            first = Duration(whole.value - self.warmup.value, whole.unit)
            raise UserError(
                f"the first period ends after {Duration(end, whole.unit)}, beyond the length of {length}{told}",
                where="optim.schedule.period",
                why=f"{self.warmup} of warm-up and a period of {self.period}: the rate would never come down",
                fix=f"optim.schedule.period='{first.rounded_down()}'",
            )

    def _passed(self, since: float) -> float:
        """Share of the present period that has passed, 0..1, so long after the end of the warm-up."""
        begins, period = 0.0, self.period.value
        keeps_end = self.at_restart == "lowest"
        if self.multiplier == 0.0:
            return min(since / period, 1.0)
        if self.multiplier == 1.0:  # years of periods are skipped at once
            begins = math.floor(since / period) * period
            begins -= period if keeps_end and since == begins > 0 else 0.0
        while since > begins + period or (since == begins + period and not keeps_end):
            begins, period = begins + period, period * self.multiplier
        return (since - begins) / period
