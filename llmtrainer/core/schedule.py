"""The learning rate as a function of progress: nothing is counted here, so a restart can lose nothing."""

from __future__ import annotations

from typing import ClassVar, Literal

from pydantic import Field, field_validator

from llmtrainer.base.config import Kind
from llmtrainer.base.errors import UserError
from llmtrainer.base.units import UNKNOWN_PACE, Duration, Pace, Progress


class Schedule(Kind):
    """A straight line up to `peak`, then the shape that the kind is named after."""

    folder: ClassVar[str] = "llmtrainer.optim.schedules"
    default_kind: ClassVar[str] = "cosine"

    peak: float = Field(default=3e-4, gt=0.0, allow_inf_nan=False)
    """Learning rate at the end of the warm-up, the highest of the run."""

    warmup: Duration = Duration(100, "steps")
    """How long the rate climbs to `peak`: `1000 steps`, `2B tokens`, `0.1 epochs`. `0 steps`: not at all."""

    start_ratio: float = Field(default=0.0, ge=0.0, le=1.0)
    """Where the climb begins, divided by `peak`."""

    counted: Literal["after", "before"] = "after"
    """Which progress the rate of an update belongs to. after: the update itself counts, so the first of a warm-up
    of 4 steps has a quarter of the climb behind it. before: it does not, so the first update has exactly the
    rate the climb begins with, as in torch's and Hugging Face's schedulers."""

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

    def rate_of_update(self, before: Progress, after: Progress, length: Duration) -> float:
        """Learning rate of the update that leads from one progress to the other; see `counted`.

        Steps are optimizer steps, so micro-batches and ranks cannot move the rate.
        """
        return self.rate(after if self.counted == "after" else before, length)

    def rate(self, at: Progress, length: Duration) -> float:
        """Learning rate at a place of the run."""
        warm = self.warmup.share(at)
        climb = self.start_ratio + (1.0 - self.start_ratio) * min(warm, 1.0)
        # The shape is asked during the warm-up too: a field that it reads counts as read from the first step on.
        shape = self.after_warmup(at, length)
        multiplier = climb if warm < 1.0 else shape
        assert 0.0 <= multiplier <= 1.0, f"multiplier {multiplier} of {self!r} at {at}"
        return self.peak * multiplier

    def after_warmup(self, at: Progress, length: Duration) -> float:
        """Fraction of `peak`, 0..1, once the warm-up is over. Asked before that too, where the answer is not used."""
        return self.shape(length.share(at), self._warm_share(at, length))

    def shape(self, share: float, warm_share: float) -> float:
        """`after_warmup` of a shape that is stretched over the length: fraction of `peak` when `share` of the length
        has passed and the warm-up ends at `warm_share`; both may exceed 1."""
        raise NotImplementedError

    def require_fit(self, length: Duration, pace: Pace = UNKNOWN_PACE) -> None:
        """Refuse settings that do not fit the length, first of all a warm-up that outlasts the part of it that it may
        have: the run would never see its peak. `pace` compares what is written in different units."""
        part = self.room_for_warmup()
        room = pace.converted(Duration(length.value * part, length.unit), self.warmup.unit)
        if self.start_ratio > 0.0 and self.warmup.value == 0.0:
            raise UserError(
                f"a climb from {self.start_ratio} of the peak is asked for, and a warm-up of {self.warmup}",
                where="optim.schedule.start_ratio",
                why="the first update would already have the peak",
                fix="optim.schedule.warmup='100 steps', or leave optim.schedule.start_ratio out",
            )
        if room is not None and length.value > 0 and self.warmup.value >= max(room.value, 1e-9):
            of_length = f"the schedule's length of {length}"
            if room.unit != length.unit:
                of_length += f", about {Duration(room.value / part, room.unit).rounded_down()}"
            whole = pace.converted(room, "steps") or room
            tenth = Duration(whole.value / 10, whole.unit).rounded_down()
            raise UserError(
                f"the warm-up of {self.warmup} is not shorter than "
                + (of_length if part == 1.0 else f"the {room} that this shape leaves it of {of_length}"),
                where="optim.schedule.warmup",
                why="the rate would never reach its peak",
                fix=f"optim.schedule.warmup='{tenth}'",
            )

    def room_for_warmup(self) -> float:
        """Share of the length that the warm-up must end in."""
        return 1.0

    def _warm_share(self, at: Progress, length: Duration) -> float:
        """Share of `length` that had passed when the warm-up ended."""
        warm = self.warmup.share(at)
        if 0.0 in (self.warmup.value, length.value, warm):
            return 0.0
        if self.warmup.unit == length.unit:
            return self.warmup.value / length.value
        # In two different units (a warm-up in steps, a length in minutes) the end of the warm-up is known in
        # its own only. The ratio of both so far carries it over: exact at a steady pace, without state to
        # save, and without a jump at the end of the warm-up, where both ways agree.
        return length.share(at) / warm
