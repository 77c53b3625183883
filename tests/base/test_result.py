"""The same figures for scripts and for people."""

from __future__ import annotations

import json
import math
from dataclasses import dataclass
from pathlib import Path

import numpy

from llmtrainer.base.result import Result, plain
from llmtrainer.base.units import Duration
from tests.base.flavours.vanilla import Vanilla


@dataclass(frozen=True)
class Inner:
    """Held by Figures."""

    at: Path


@dataclass(frozen=True)
class Figures(Result):
    """One of each."""

    tokens: int = 1_234_567
    loss: float | None = None
    shares: tuple[float, ...] = (0.5, math.inf)
    inner: Inner = Inner(Path("a/b"))
    done: bool = True


def test_a_result_is_one_json_object_and_one_line_per_figure() -> None:
    figures = Figures()
    assert json.loads(json.dumps(figures.json(), allow_nan=False)) == {
        "tokens": 1234567, "loss": None, "shares": [0.5, None], "inner": {"at": "a/b"}, "done": True,
    }  # fmt: skip
    assert figures.text().splitlines() == [
        "tokens  1,234,567", "loss    n/a", "shares  0.5, n/a", "inner   at a/b", "done    yes",
    ]  # fmt: skip
    assert figures.exit_code == 0


def test_json_has_a_word_for_everything_a_verb_may_report() -> None:
    assert plain({1: numpy.float32(0.5), "n": numpy.int64(3)}) == {"1": 0.5, "n": 3}
    assert plain([Duration(2, "steps"), Vanilla(), {1}, -math.inf]) == [
        "2 steps", {"kind": "vanilla", "pods": 1}, [1], None,
    ]  # fmt: skip
