"""The learning rate as a function of progress: nothing is counted here, so a restart can lose nothing."""

from __future__ import annotations

import math
from typing import ClassVar

from pydantic import Field, field_validator

from llmtrainer.base.config import Kind
from llmtrainer.base.errors import UserError
from llmtrainer.base.units import Duration, Progress


class Schedule(Kind):
    """A straight line up to `peak`, then the shape that the kind is named after."""

    folder: ClassVar[str] = "llmtrainer.optim.schedules"
    default_kind: ClassVar[str] = "cosine"

    peak: float = Field(default=3e-4, gt=0.0, allow_inf_nan=False)
    """Learning rate at the end of the warm-up, the highest of the run."""

    warmup: Duration = Duration(100, "steps")
    """How long the rate climbs from 0 to `peak`: `1000 steps`, `2B tokens`, `0.1 epochs`. `0 steps`: not at
    all."""

    length: Duration | None = None
    """What the shape is stretched over. Left out, it is the run's `duration`, and stays what it was when a
    finished run is extended."""

    @field_validator("warmup")
    @classmethod
    def _not_minutes(cls, warmup: Duration) -> Duration:
        if warmup.unit == "minutes":
            raise UserError(
                f"a warm-up of `{warmup}` is measured by the clock",
                why="how many updates it holds would depend on how fast the machine is today",
                fix="write steps, tokens or epochs, for example `100 steps`",
            )
        return warmup

    def rate(self, after: Progress, length: Duration) -> float:
        """Learning rate of the update that ends at `after`: the first update of a run has `after.step == 1`.

        Steps are optimizer steps, so micro-batches and ranks cannot move the rate.
        """
        warm = self.warmup.share(after)
        # The shape is asked during the warm-up too: a field that it reads counts as read from the first step on.
        shape = self.shape(length.share(after), self._warm_share(after, length))
        multiplier = warm if warm < 1.0 else shape
        assert 0.0 <= multiplier <= 1.0, f"multiplier {multiplier} of {self!r} at {after}"
        return self.peak * multiplier

    def shape(self, share: float, warm_share: float) -> float:
        """Fraction of `peak`, 0..1, when `share` of the length has passed and the warm-up ends at `warm_share`;
        both may exceed 1. Asked during the warm-up too, where only the answer's range matters."""
        raise NotImplementedError

    def require_fit(self, length: Duration) -> None:
        """Refuse a warm-up that outlasts the length it is part of: the run would never see its peak."""
        if self.warmup.unit == length.unit and self.warmup.value >= length.value > 0:
            raise UserError(
                f"the warm-up of {self.warmup} is not shorter than the schedule's length of {length}",
                where="optim.schedule.warmup",
                why="the rate would never reach its peak",
                fix=f"optim.schedule.warmup='{Duration(math.floor(length.value / 10), length.unit)}'",
            )

    def _warm_share(self, after: Progress, length: Duration) -> float:
        """Share of `length` that had passed when the warm-up ended."""
        warm = self.warmup.share(after)
        if 0.0 in (self.warmup.value, length.value, warm):
            return 0.0
        if self.warmup.unit == length.unit:
            return self.warmup.value / length.value
        # In two different units (a warm-up in steps, a length in minutes) the end of the warm-up is known in
        # its own only. The ratio of both so far carries it over: exact at a steady pace, without state to
        # save, and without a jump at the end of the warm-up, where both ways agree.
        return length.share(after) / warm
