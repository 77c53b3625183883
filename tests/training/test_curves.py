"""The picture of a run: its panels, and that its lines are where the figures are."""

from __future__ import annotations

import math
import re
from pathlib import Path
from typing import Any

import matplotlib.image
import numpy as np
import pytest

from llmtrainer.training.curves import COLOURS, POINTS, Curve, _thinned, draw, shown, smoothed


def step(number: int, **values: Any) -> dict[str, Any]:
    return {
        "kind": "step", "step": number, "tokens": 100 * number, "loss": 9.0 - number / 100, "learning_rate": 1e-3,
        "grad_norm": 1.0, "seconds": 0.5, "tokens_per_second": 200.0, "mfu": None,
        "loss/lm": 9.0 - number / 100, "seconds/data": 0.1, **values,
    }


def evaluation(number: int, **figures: float) -> dict[str, Any]:
    return {"kind": "evaluate", "time": 1.0, "step": number, **figures}


ALWAYS = ["Loss", "Learning rate", "Gradient norm", "Speed"]


TWO = [step(1), step(2)]
ODD = {"loss": None, "grad_norm": None, "mfu": None}
ZERO = {"loss": 0.0, "grad_norm": 0.0, "learning_rate": 0.0, "tokens_per_second": 0.0, "seconds": 0.0}
CASES: dict[str, tuple[list[Curve], list[str]]] = {
    "one step": ([Curve("run", [step(1)])], []),
    "a loss": ([Curve("run", TWO, [evaluation(2, **{"held_out/loss": 2.0})])], ["Evaluation: loss"]),
    "bits before loss": (
        [Curve("run", TWO, [evaluation(2, **{"a/loss": 2.0, "a/tokens": 9, "b/bits_per_byte": 1.0})])],
        ["Evaluation: bits per byte"],
    ),
    "no loss": (
        [Curve("run", TWO, [evaluation(2, **{"a/tokens": 9, "a/accuracy": 0.5})])], ["Evaluation: accuracy"],
    ),
    "more terms": (
        [Curve("run", [step(1, **{"loss/z": 0.1, "preference/accuracy": 0.5}), step(2)])],
        ["Accuracy", "loss/lm", "loss/z"],
    ),
    "what answers earned": (
        [Curve("run", [step(1, **{"policy/ratio": 1.0, "reward/mean": 0.1, "reward/length": 0.2}), step(2)])],
        ["Reward", "policy/ratio", "reward/length"],
    ),
    "two runs": ([Curve("a", TWO[:1]), Curve("b", TWO, [evaluation(2, loss=2.0)])], ["Evaluation: loss"]),
    "no numbers": ([Curve("run", [step(1, **ODD), step(2), step(3, loss=None)], [], [1, 2])], []),
    "zeros": ([Curve("run", [step(1, **ZERO)])], []),
}


@pytest.mark.parametrize("case", CASES)
def test_there_is_a_panel_for_everything_measured(case: str, tmp_path: Path) -> None:
    curves, further = CASES[case]
    out = tmp_path / "deep" / "curves.png"
    assert draw(curves, out, "minutes" if case == "two runs" else "step") == [*ALWAYS, *further]
    assert out.read_bytes().startswith(b"\x89PNG\r\n\x1a\n")


def test_the_loss_that_falls_is_drawn_as_a_line_that_falls(tmp_path: Path) -> None:
    draw([Curve("run", [step(n) for n in range(1, 700)])], tmp_path / "x.png")
    picture = matplotlib.image.imread(tmp_path / "x.png")[..., :3]
    colour = np.array([int(COLOURS[0][place : place + 2], 16) / 255 for place in (1, 3, 5)])
    # The upper half, left of the legend: nothing else there has this colour but the line and its first value.
    upper = picture[: int(0.55 * len(picture)), : int(0.7 * picture.shape[1])]
    rows, columns = np.nonzero(np.abs(upper - colour).max(axis=2) < 0.02)
    heights = [float(np.median(rows[columns == column])) for column in sorted(set(columns))[60::40]]
    assert len(heights) > 10
    assert heights == sorted(heights)


def test_the_same_events_give_the_same_bytes(tmp_path: Path) -> None:
    for name in ("a.png", "b.png"):
        draw([Curve("run", [step(1), step(2)])], tmp_path / name)
    assert (tmp_path / "a.png").read_bytes() == (tmp_path / "b.png").read_bytes()


def test_a_smoothed_line_is_the_mean_over_the_neighbours_to_both_sides() -> None:
    values = np.random.default_rng(0).normal(size=400)
    found = smoothed(values)
    reach = 400 // 40
    for place in (0, 3, 10, 200, 395, 399):
        left = min(place, reach)
        assert found[place] == pytest.approx(np.mean(values[place - left : min(place + left + 1, 400)]))


def test_a_smoothed_line_does_not_lag_behind_one_that_falls() -> None:
    falling = np.linspace(9.0, 2.0, 1000)
    np.testing.assert_allclose(smoothed(falling)[:900], falling[:900], rtol=1e-12)


def test_values_that_are_no_numbers_neither_count_nor_spread() -> None:
    values = np.full(400, 3.0)
    values[[7, 100, 101]] = math.nan
    values[200:240] = math.nan
    found = smoothed(values)
    np.testing.assert_allclose(found[np.isfinite(found)], 3.0)
    assert np.isnan(found[215:225]).all()
    assert np.isfinite(found[[100, 101]]).all()


def test_a_long_line_keeps_its_highest_and_lowest_values_in_order() -> None:
    values = np.random.default_rng(1).normal(size=200_000)
    values[77_777], values[123_456], values[5] = 99.0, -99.0, math.nan
    places, kept = _thinned(np.arange(200_000.0), values)
    assert len(kept) <= 2 * POINTS
    assert (kept.max(), kept.min()) == (99.0, -99.0)
    assert (np.diff(places) > 0).all()
    np.testing.assert_array_equal(kept, values[places.astype(int)])


def test_a_short_line_is_drawn_as_it_is() -> None:
    values = np.array([1.0, math.nan, 3.0])
    assert _thinned(np.arange(3.0), values)[1] is values


def test_evaluations_stand_where_their_step_stands_on_every_axis() -> None:
    curve = Curve("run", [step(10), step(20), step(40)], [evaluation(20, **{"held_out/loss": 2.0})])
    for scale, place in (("step", 20.0), ("tokens", 2000.0), ("minutes", 1 / 60)):
        places, values = curve.figures("loss", scale)["held out"]    # type: ignore[arg-type]
        assert places.tolist() == pytest.approx([place])
        assert values.tolist() == [2.0]


def test_any_name_of_a_run_can_be_drawn(tmp_path: Path) -> None:
    names = ["runs/$x_1$ and $y", "runs/\u4f60\u597d", "100%", "a_b^c", "\u00e9t\u00e9"]
    draw([Curve(name, TWO[:1]) for name in names], tmp_path / "x.png")    # a warning would be an error
    assert [shown(name) for name in names[1:]] == ["runs/??", "100%", "a_b^c", "\u00e9t\u00e9"]
    assert not re.search(r"(?<!\\)\$", shown(names[0])), "between two of them a formula begins"
