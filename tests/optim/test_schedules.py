"""Learning rates against hand arithmetic."""

from __future__ import annotations

import math
from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import ValidationError

from llmtrainer.base.config import forget_reads, unread
from llmtrainer.base.errors import UserError
from llmtrainer.base.units import Duration, Progress
from llmtrainer.core.schedule import Schedule
from llmtrainer.optim.schedules.constant import Constant
from llmtrainer.optim.schedules.cosine import Cosine
from tests.tolerances import RATE_RELATIVE

THOUSAND_STEPS = Duration(1000, "steps")


def rate_at(schedule: Schedule, step: int, length: Duration = THOUSAND_STEPS) -> float:
    return schedule.rate(Progress(step=step), length)


@pytest.mark.parametrize(
    ("step", "expected"),
    [(1, 1e-5), (29, 2.9e-4), (30, 3.0e-4), (465, 1.65e-4), (900, 3e-5), (901, 3e-5), (5000, 3e-5)],
)
def test_cosine_follows_the_known_vector(step: int, expected: float) -> None:
    # Peak 3e-4, 30 of 1,000 steps of warm-up, a tenth of the peak from nine tenths on; 465 is the middle.
    schedule = Cosine(peak=3e-4, warmup=Duration(30, "steps"), final_ratio=0.1, decay_share=0.9)
    assert rate_at(schedule, step) == pytest.approx(expected, rel=RATE_RELATIVE)


def test_cosine_at_a_quarter_of_its_way_is_the_cosine_of_an_eighth_turn() -> None:
    schedule = Cosine(peak=1.0, warmup=Duration(200, "steps"), final_ratio=0.0)
    assert rate_at(schedule, 400) == pytest.approx((1 + math.sqrt(0.5)) / 2, rel=RATE_RELATIVE)


def test_constant_stays_at_the_peak_beyond_its_length() -> None:
    schedule = Constant(peak=2e-3, warmup=Duration(4, "steps"))
    assert [rate_at(schedule, step) for step in (1, 2, 3, 4, 5, 10_000)] == [
        5e-4,
        1e-3,
        1.5e-3,
        2e-3,
        2e-3,
        2e-3,
    ]


@pytest.mark.parametrize("kind", [Cosine, Constant])
def test_without_warmup_the_first_step_already_has_the_shape(kind: type[Schedule]) -> None:
    schedule = kind(peak=1.0, warmup=Duration(0, "steps"))
    assert rate_at(schedule, 1) == pytest.approx(1.0, abs=1e-5)


def test_a_schedule_counted_in_tokens_does_not_look_at_steps() -> None:
    schedule = Cosine(peak=1.0, warmup=Duration(100, "tokens"), final_ratio=0.0)
    length = Duration(1100, "tokens")
    assert schedule.rate(Progress(step=7, tokens=50), length) == 0.5
    assert schedule.rate(Progress(step=9_999, tokens=600), length) == pytest.approx(0.5, rel=RATE_RELATIVE)


def test_a_warmup_in_steps_and_a_length_in_minutes_agree_with_steps_alone_at_a_steady_pace() -> None:
    schedule = Cosine(peak=3e-4, warmup=Duration(30, "steps"), final_ratio=0.1)
    for step in (1, 29, 30, 31, 250, 999, 1000, 1200):
        by_clock = schedule.rate(Progress(step=step, minutes=step * 0.25), Duration(250, "minutes"))
        assert by_clock == pytest.approx(rate_at(schedule, step), rel=1e-9)


def test_a_run_that_slows_down_has_no_jump_at_the_end_of_its_warmup() -> None:
    schedule = Cosine(peak=1.0, warmup=Duration(100, "steps"))
    minutes = [0.001 * step**1.5 for step in range(1, 300)]
    rates = [
        schedule.rate(Progress(step=step, minutes=spent), Duration(10, "minutes"))
        for step, spent in enumerate(minutes, start=1)
    ]
    assert max(abs(after - before) for before, after in pairwise(rates)) < 0.02


@given(
    peak=st.floats(1e-6, 10.0),
    warmup=st.integers(0, 300),
    length=st.integers(1, 300),
    final_ratio=st.floats(0.0, 1.0),
    decay_share=st.floats(0.01, 1.0),
    step=st.integers(1, 1000),
)
def test_the_rate_is_never_negative_and_never_above_the_peak(
    peak: float, warmup: int, length: int, final_ratio: float, decay_share: float, step: int
) -> None:
    schedule = Cosine(peak=peak, warmup=Duration(warmup, "steps"), final_ratio=final_ratio, decay_share=decay_share)
    rate = rate_at(schedule, step, Duration(length, "steps"))
    assert 0.0 <= rate <= peak
    if step >= warmup:
        assert rate >= peak * final_ratio * (1 - 1e-12)


@given(warmup=st.integers(0, 50), step=st.integers(1, 400))
def test_after_the_warmup_a_cosine_never_rises(warmup: int, step: int) -> None:
    schedule = Cosine(warmup=Duration(warmup, "steps"))
    first = max(step, warmup)
    length = Duration(300, "steps")
    assert rate_at(schedule, first + 1, length) <= rate_at(schedule, first, length)


def test_a_warmup_up_to_the_end_of_the_decay_falls_from_the_peak_to_the_last_rate() -> None:
    schedule = Cosine(peak=1.0, warmup=Duration(50, "steps"), final_ratio=0.2, decay_share=0.5)
    length = Duration(100, "steps")
    assert [rate_at(schedule, step, length) for step in (20, 49, 50, 51)] == [0.4, 0.98, 0.2, 0.2]


def test_beyond_a_length_of_nothing_the_last_rate_stays() -> None:
    assert rate_at(Cosine(peak=1.0, final_ratio=0.2, warmup=Duration(2, "steps")), 3, Duration(0, "steps")) == 0.2


def test_a_warmup_by_the_clock_is_refused() -> None:
    with pytest.raises((UserError, ValidationError), match="measured by the clock"):
        Cosine(warmup=Duration(3, "minutes"))


@pytest.mark.parametrize("field", ["peak", "final_ratio", "decay_share"])
def test_a_negative_fraction_is_refused(field: str) -> None:
    with pytest.raises(ValidationError, match=field):
        Cosine.model_validate({field: -0.5})


def test_a_warmup_that_outlasts_the_length_is_refused_with_one_that_fits() -> None:
    with pytest.raises(UserError, match="not shorter") as caught:
        Constant(warmup=Duration(1000, "steps")).require_fit(Duration(50, "steps"))
    assert caught.value.fix == "optim.schedule.warmup='5 steps'"
    with pytest.raises(UserError, match="not shorter"):
        Constant(warmup=Duration(50, "steps")).require_fit(Duration(50, "steps"))
    Constant(warmup=Duration(49, "steps")).require_fit(Duration(50, "steps"))
    Constant(warmup=Duration(49, "steps")).require_fit(Duration(1, "minutes"))


@pytest.mark.parametrize("warmup", ["0 steps", "50 steps", "50 tokens"])
def test_every_field_that_shapes_the_rate_is_read_in_the_first_step(warmup: str) -> None:
    # A run refuses fields that were set and not read after its first step, which may well be one of the warm-up.
    given = {"peak": 1.0, "warmup": warmup, "final_ratio": 0.0, "decay_share": 0.5}
    schedule = Cosine.model_validate(given)
    forget_reads(schedule)
    rate_at(schedule, 1)
    assert unread(schedule) == []


def test_the_kind_of_a_schedule_is_its_file() -> None:
    assert type(Schedule.model_validate({"kind": "constant", "peak": 1.0})) is Constant
    assert type(Schedule.model_validate({})) is Cosine
