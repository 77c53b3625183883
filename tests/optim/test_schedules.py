"""Learning rates against hand arithmetic."""

from __future__ import annotations

import math
from itertools import pairwise

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from pydantic import ValidationError

from llmtrainer.base.config import forget_reads, unread
from llmtrainer.base.errors import UserError
from llmtrainer.base.kinds import kinds_in
from llmtrainer.base.units import Duration, Pace, Progress
from llmtrainer.core.schedule import Schedule
from llmtrainer.optim.schedules.constant import Constant
from llmtrainer.optim.schedules.cosine import Cosine
from tests.tolerances import LOGGED_RATE_RELATIVE, RATE_RELATIVE

KINDS: dict[str, dict[str, object]] = {kind: {} for kind in kinds_in("llmtrainer.optim.schedules")} | {
    "cosine_restarts": {"period": "70 steps", "multiplier": 1.5},
}  # a new file is tested unasked, or says what it needs

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


def made(kind: str, **settings: object) -> Schedule:
    return Schedule.model_validate({"kind": kind, **KINDS[kind], **settings})


@pytest.mark.parametrize("kind", KINDS)
def test_without_warmup_the_first_step_already_has_the_shape(kind: str) -> None:
    timed = {"timescale": "100 steps"} if kind == "inverse_square_root" else {}
    schedule = made(kind, peak=1.0, warmup="0 steps", **timed)
    assert 0.99 < rate_at(schedule, 1) <= 1.0


@pytest.mark.parametrize("counted", ["after", "before"])
@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_climbs_to_its_peak_and_never_leaves_it_upwards(kind: str, counted: str) -> None:
    schedule = made(kind, peak=2.0, warmup="40 steps", start_ratio=0.5, counted=counted)
    schedule.require_fit(Duration(200, "steps"))
    places = [Progress(step=step) for step in range(401)]
    rates = [schedule.rate_of_update(*pair, Duration(200, "steps")) for pair in pairwise(places)]
    climb = [1.0 + step / 40 for step in range(41)]
    assert rates[:40] == pytest.approx(climb[1:] if counted == "after" else climb[:40], rel=RATE_RELATIVE)
    assert max(rates) == 2.0 and min(rates) >= 0.0
    assert max(abs(after - before) for before, after in pairwise(rates[:100])) < 0.1  # no jump at the seam


@pytest.mark.parametrize("kind", KINDS)
def test_a_rate_is_a_function_of_the_place_alone(kind: str) -> None:
    # Restored in the middle of a period: a schedule that has seen nothing before gives the same rates.
    length, whole = Duration(300, "steps"), made(kind, warmup="20 steps")
    rates = [rate_at(whole, step, length) for step in range(1, 401)]
    again = [rate_at(Schedule.model_validate(whole.plain()), step, length) for step in range(400, 0, -1)]
    assert rates == again[::-1]


@pytest.mark.parametrize("kind", KINDS)
def test_every_setting_of_every_kind_is_read_in_the_first_step(kind: str) -> None:
    needs = {"inverse_square_root": {"timescale": "9 steps"}}
    schedule = made(kind, **needs.get(kind, {}))
    given = {name: value for name, value in schedule.plain().items() if name not in ("kind", "length")}
    schedule = made(kind, **given)
    forget_reads(schedule)
    schedule.require_fit(THOUSAND_STEPS)
    schedule.rate_of_update(Progress(), Progress(step=1), THOUSAND_STEPS)
    assert [name for name in unread(schedule) if name != "length"] == []


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


@pytest.mark.parametrize(
    ("warmup", "length", "told", "fix"),
    [
        ("4000 tokens", "4 steps", "length of 4 steps, about 4000 tokens", "0 steps"),
        ("100 steps", "2.5 epochs", "length of 2.5 epochs, about 100 steps", "10 steps"),
        ("3 epochs", "100k tokens", "length of 100000 tokens, about 2.5 epochs", "10 steps"),
    ],
)
def test_a_warmup_in_another_unit_is_held_against_what_a_step_takes(
    warmup: str, length: str, told: str, fix: str
) -> None:
    pace = Pace(epochs=0.025, tokens=1000)
    with pytest.raises(UserError) as caught:
        Constant(warmup=Duration.parse(warmup)).require_fit(Duration.parse(length), pace)
    assert told in caught.value.what and caught.value.fix == f"optim.schedule.warmup='{fix}'"
    shorter = Duration.parse(warmup)
    shorter = Duration(shorter.value * 0.8, shorter.unit)
    Constant(warmup=shorter).require_fit(Duration.parse(length), pace)
    Constant(warmup=Duration.parse(warmup)).require_fit(Duration.parse(length))    # nobody knows
    Constant(warmup=Duration.parse(warmup)).require_fit(Duration.parse("1 min"), pace)


def test_the_part_of_a_shape_and_a_period_are_compared_in_other_units_too() -> None:
    pace, length = Pace(epochs=0.025, tokens=1000), Duration(100, "steps")
    decayed = {"kind": "cosine", "warmup": "50k tokens", "decay_share": 0.5}
    with pytest.raises(UserError, match="50000 tokens that this shape leaves it") as caught:
        Schedule.model_validate(decayed).require_fit(length, pace)
    assert "100 steps, about 100000 tokens" in caught.value.what
    Schedule.model_validate({**decayed, "warmup": "49k tokens"}).require_fit(length, pace)
    restarted = {"kind": "cosine_restarts", "warmup": "0.5 epochs", "period": "2.1 epochs"}
    with pytest.raises(UserError, match="beyond the length of 100 steps") as caught:
        Schedule.model_validate(restarted).require_fit(length, pace)
    assert "after 2.6 epochs" in caught.value.what and caught.value.what.endswith("about 2.5 epochs")
    assert caught.value.fix == "optim.schedule.period='2 epochs'"
    Schedule.model_validate({**restarted, "period": "2 epochs"}).require_fit(length, pace)


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


# The learning rates of a published run of 1.7 billion parameters: 13,162 steps an epoch, 2.2 epochs, 3 % of them
# warm-up, a tenth of the peak from nine tenths on. Rounding an epoch or the end of the decay moves the last digits.
LOGGED = [(1, 3.456221e-07), (868, 3.0e-04), (869, 3.0e-04), (2_001, 2.986548e-04), (10_001, 2.215095e-04),
          (11_122, 2.038751e-04)]  # fmt: skip


@pytest.mark.parametrize("length", [Duration(28_956.4, "steps"), Duration(2.2, "epochs")], ids=str)
def test_cosine_gives_the_learning_rates_of_a_published_log(length: Duration) -> None:
    schedule = Cosine(peak=3e-4, warmup=Duration(868, "steps"), final_ratio=0.1, decay_share=0.9)
    for step, expected in LOGGED:
        rate = schedule.rate(Progress(step=step, epochs=step / 13_162), length)
        assert rate == pytest.approx(expected, rel=LOGGED_RATE_RELATIVE), step


FIRST_PERIOD = [1e-4, 2e-4, 3e-4, 4e-4, 5e-4, 4.672e-4, 3.775e-4, 2.55e-4, 1.325e-4, 4.282e-5]
RESTARTS = {
    (0.0, "lowest"): [1e-5, 1e-5, 1e-5],
    (0.0, "peak"): [1e-5, 1e-5, 1e-5],
    (1.0, "lowest"): [1e-5, 4.672e-4, 3.775e-4],
    (1.0, "peak"): [5e-4, 4.672e-4, 3.775e-4],
    (2.0, "lowest"): [1e-5, 4.917e-4, 4.672e-4, 4.282e-4, 3.775e-4, 3.184e-4, 2.55e-4, 1.916e-4, 1.325e-4, 8.176e-5],
    (2.0, "peak"): [5e-4, 4.917e-4, 4.672e-4, 4.282e-4, 3.775e-4, 3.184e-4, 2.55e-4, 1.916e-4, 1.325e-4, 8.176e-5],
}


@pytest.mark.parametrize(("multiplier", "at_restart"), RESTARTS, ids=str)
def test_restarts_follow_the_known_vectors_of_both_releases(multiplier: float, at_restart: str) -> None:
    schedule = made(
        "cosine_restarts", peak=5e-4, start_ratio=0.2, final_ratio=0.02, warmup="4 steps", period="6 steps",
        multiplier=multiplier, at_restart=at_restart, counted="before",
    )  # fmt: skip
    expected = [*FIRST_PERIOD, *RESTARTS[multiplier, at_restart]]
    places = [Progress(step=step) for step in range(len(expected) + 1)]
    rates = [schedule.rate_of_update(*pair, THOUSAND_STEPS) for pair in pairwise(places)]
    assert rates == pytest.approx(expected, rel=2e-4)  # the vectors are printed with four digits


@pytest.mark.parametrize("multiplier", [1, 2, 3])
def test_restarts_at_the_peak_are_torchs(multiplier: int) -> None:
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=0.7)
    oracle = torch.optim.lr_scheduler.CosineAnnealingWarmRestarts(optimizer, T_0=5, T_mult=multiplier, eta_min=0.07)
    schedule = made("cosine_restarts", peak=0.7, warmup="0 steps", period="5 steps", multiplier=float(multiplier),
                    at_restart="peak", counted="before")  # fmt: skip
    for step in range(60):
        assert rate_at(schedule, step) == pytest.approx(oracle.get_last_lr()[0], rel=1e-9), step
        optimizer.step()
        oracle.step()


def test_a_million_periods_are_passed_at_once() -> None:
    schedule = made("cosine_restarts", peak=1.0, warmup="0 steps", period="2 steps", multiplier=1.0, final_ratio=0.0)
    assert [rate_at(schedule, 2_000_000 + step) for step in (0, 1, 2)] == pytest.approx([0.0, 0.5, 0.0])


def test_linear_and_its_warmup_are_hugging_faces() -> None:
    transformers = pytest.importorskip("transformers")
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=0.7)
    oracle = transformers.get_linear_schedule_with_warmup(optimizer, num_warmup_steps=5, num_training_steps=40)
    schedule = made("linear", peak=0.7, warmup="5 steps", counted="before")
    for step in range(45):
        assert rate_at(schedule, step, Duration(40, "steps")) == pytest.approx(oracle.get_last_lr()[0], rel=1e-12)
        optimizer.step()
        oracle.step()


def test_linear_reaches_its_last_rate_at_its_share_of_the_length() -> None:
    schedule = made("linear", peak=1.0, warmup="10 steps", final_ratio=0.2, decay_share=0.5)
    rates = [rate_at(schedule, step, Duration(100, "steps")) for step in (10, 20, 30, 50, 51, 200)]
    assert rates == pytest.approx([1.0, 0.8, 0.6, 0.2, 0.2, 0.2], rel=RATE_RELATIVE)


@pytest.mark.parametrize("timescale", [None, 10])
def test_inverse_square_root_and_its_warmup_are_hugging_faces(timescale: int | None) -> None:
    transformers = pytest.importorskip("transformers")
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=0.7)
    oracle = transformers.get_inverse_sqrt_schedule(optimizer, num_warmup_steps=5, timescale=timescale)
    given = {} if timescale is None else {"timescale": f"{timescale} steps"}
    schedule = made("inverse_square_root", peak=0.7, warmup="5 steps", counted="before", **given)
    for step in range(60):
        assert rate_at(schedule, step) == pytest.approx(oracle.get_last_lr()[0], rel=1e-12)
        optimizer.step()
        oracle.step()


def test_inverse_square_root_halves_after_four_warmups_whatever_the_length() -> None:
    schedule = made("inverse_square_root", peak=6.0, warmup="100 tokens")
    for length in (Duration(7, "minutes"), Duration(50_000, "tokens")):
        rates = [schedule.rate(Progress(tokens=tokens), length) for tokens in (50, 100, 400, 900)]
        assert rates == [3.0, 6.0, 3.0, 2.0]


@pytest.mark.parametrize(
    ("cooldown", "way"),
    [("linear", [1.0, 0.75, 0.5, 0.0]), ("sqrt", [1.0, 0.5, 1 - math.sqrt(0.5), 0.0]),
     ("cosine", [1.0, 0.5 + math.sqrt(0.125), 0.5, 0.0])],
)  # fmt: skip
def test_warmup_stable_decay_stays_and_then_falls_in_the_given_shape(cooldown: str, way: list[float]) -> None:
    schedule = made("warmup_stable_decay", peak=1.0, warmup="10 steps", cooldown_share=0.2, cooldown=cooldown)
    rates = [rate_at(schedule, step, Duration(200, "steps")) for step in (5, 10, 100, 160, 170, 180, 200)]
    assert rates == pytest.approx([0.5, 1.0, 1.0, *way], rel=RATE_RELATIVE, abs=1e-15)
    assert rate_at(schedule, 900, Duration(200, "steps")) == pytest.approx(0.0, abs=1e-15)


REFUSED = {
    "a climb without a warm-up": ({"kind": "linear", "start_ratio": 0.1, "warmup": "0 steps"}, "0.1 of the peak"),
    "a warm-up beyond the decay": ({"kind": "cosine", "warmup": "50 steps", "decay_share": 0.5}, "the 50 steps that"),
    "a warm-up into the cooldown": (
        {"kind": "warmup_stable_decay", "warmup": "80 steps", "cooldown_share": 0.25}, "the 75 steps that",
    ),
    "no room at all": ({"kind": "warmup_stable_decay", "warmup": "1 steps", "cooldown_share": 1.0}, "the 0 steps"),
    "a period beyond the end": (
        {"kind": "cosine_restarts", "warmup": "10 steps", "period": "91 steps"}, "after 101 steps, beyond",
    ),
    "no measure of time": ({"kind": "inverse_square_root", "warmup": "0 steps"}, "a timescale of 0 steps"),
    "two measures of time": (
        {"kind": "inverse_square_root", "warmup": "9 steps", "timescale": "9 tokens"}, "a timescale of 9 tokens",
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", REFUSED)
def test_what_does_not_fit_the_length_is_refused_with_its_numbers(case: str) -> None:
    settings, said = REFUSED[case]
    with pytest.raises(UserError) as caught:
        Schedule.model_validate(settings).require_fit(Duration(100, "steps"))
    assert said in caught.value.what and caught.value.fix is not None


@pytest.mark.parametrize(
    ("settings", "said"),
    [({"period": "9 steps", "multiplier": 0.5}, "multiplier of 0.5"), ({"period": "9 tokens"}, "a period of 9 tokens"),
     ({"period": "0 steps"}, "a period of 0 steps")],
)  # fmt: skip
def test_periods_that_cannot_follow_each_other_are_refused(settings: dict[str, object], said: str) -> None:
    with pytest.raises((UserError, ValidationError), match=said):
        made("cosine_restarts", **settings)
