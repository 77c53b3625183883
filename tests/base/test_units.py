"""Quantities with units: read from text, written back, asked of a run's progress."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from llmtrainer.base.errors import UserError
from llmtrainer.base.units import Bytes, Duration, Every, Progress


@pytest.mark.parametrize(
    ("text", "value", "unit"),
    [
        ("2000 steps", 2000, "steps"),
        ("1 step", 1, "steps"),
        ("20B tokens", 20e9, "tokens"),
        ("1_000_000 tokens", 1e6, "tokens"),
        ("1.5 epochs", 1.5, "epochs"),
        ("90 min", 90, "minutes"),
        ("2 h", 120, "minutes"),
        ("200 s", 200 / 60, "minutes"),
    ],
)
def test_a_duration_is_a_number_with_a_unit(text: str, value: float, unit: str) -> None:
    assert Duration.parse(text) == Duration(value, unit)  # type: ignore[arg-type]


@pytest.mark.parametrize("text", ["2000", "steps", "2000 parsecs", "-3 steps", "", "two steps", "9" * 400 + " steps"])
def test_a_bare_number_or_an_unknown_unit_is_refused_with_an_example(text: str) -> None:
    with pytest.raises(UserError, match="no duration") as caught:
        Duration.parse(text)
    assert "2000 steps" in str(caught.value)


@given(st.floats(min_value=0.001, max_value=1e12), st.sampled_from(["steps", "tokens", "epochs", "minutes"]))
def test_a_duration_survives_its_own_text(value: float, unit: str) -> None:
    duration = Duration(value, unit)  # type: ignore[arg-type]
    assert Duration.parse(str(duration)) == duration


def test_every_is_due_when_a_multiple_is_passed_and_remembers_nothing() -> None:
    every = Every.parse("100 tokens")
    passed = [(before, after) for before, after in ((0, 99), (99, 100), (100, 199), (199, 350), (350, 351))]
    due = [every.due(Progress(tokens=before), Progress(tokens=after)) for before, after in passed]
    assert due == [False, True, False, True, False]
    assert not Every.parse("never").due(Progress(step=0), Progress(step=10**9))


def test_every_nothing_is_refused() -> None:
    with pytest.raises(UserError, match="due all the time"):
        Every.parse("0 steps")


def test_a_duration_knows_its_share_in_its_own_unit() -> None:
    progress = Progress(step=50, tokens=1000, epochs=0.25, minutes=3)
    assert Duration.parse("100 steps").share(progress) == 0.5
    assert Duration.parse("500 tokens").reached(progress)
    assert not Duration.parse("0.5 epochs").reached(progress)


@pytest.mark.parametrize(("text", "count"), [("512 MiB", 2**29), ("1.5 GB", 1_500_000_000), ("7 B", 7)])
def test_bytes_know_binary_from_decimal_units(text: str, count: int) -> None:
    assert Bytes.parse(text).count == count
    assert Bytes.parse(str(Bytes.parse(text))).count == count
