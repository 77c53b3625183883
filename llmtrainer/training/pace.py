"""A run that is to end within a time: the speed is measured first, then the number of steps is fixed."""

from __future__ import annotations

import itertools
import statistics
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

from llmtrainer.base.config import load
from llmtrainer.base.errors import RunStopped
from llmtrainer.base.rundir import RunDir
from llmtrainer.base.units import Progress
from llmtrainer.training.console import bar, say, voice
from llmtrainer.training.figures import span
from llmtrainer.training.recipe import Recipe
from llmtrainer.training.run import open_trainer

WARM_STEPS, TIMED_STEPS = 3, 9
"""Steps before and during the measurement of speed: the first ones load kernels and fill caches."""
SPARE = 0.88
"""Share of the time that is planned for: the rest is for saving, evaluating and a machine that slows down."""

AGAIN = 0.4
"""Share of the first step's time that it takes once more in the run: compiled kernels come from torch's cache."""

TIME_IS_UP = "the time is up"
"""Why a run stops its own training: the machine became slower than it was when it was measured."""


@dataclass(frozen=True)
class Trained:
    """What a run within a time came to."""

    progress: Progress
    seconds: float


def begun_steps(run: str) -> int | None:
    """How many steps a run was begun with; None where it was not."""
    begun = RunDir(Path(run)).recipe
    return int(load(Recipe, str(begun)).duration.value) if begun.is_file() else None


def steps_within(recipe: Recipe, seconds: float) -> int:
    """How many steps of a recipe, whose duration is longer than the trial, fit a time on this machine. Some are run
    in a folder that is thrown away."""
    trials = WARM_STEPS + TIMED_STEPS
    with bar("measuring the speed", trials, "steps") as advance, tempfile.TemporaryDirectory() as place:
        laps = []
        trial = recipe.model_copy(update={"run": place})
        # The bar stands for this run: its own view would promise all the steps of the recipe.
        with voice(quiet=True), open_trainer(trial) as trainer:
            for info in itertools.islice(trainer.steps(), trials):
                laps.append(info.seconds["total"])
                advance(1)
    # The lower quartile: a moment in which something else ran must not decide how long the model learns.
    lap = statistics.quantiles(laps[WARM_STEPS:], n=4)[0]
    steps = max(int((SPARE * seconds - AGAIN * laps[0]) / lap), 1)
    say(f"one step takes {lap * 1000:,.0f} ms here, so {steps:,} steps fit {span(seconds)}")
    return steps


def train_within(recipe: Recipe, seconds: float | None, *, evaluate_first: bool = False) -> Trained:
    """Run a recipe to its duration, or until the time is up; then the same recipe goes on from there.

    `evaluate_first`: a new run is also evaluated before its first step. Raises RunStopped where someone else
    stopped it.
    """
    started = time.perf_counter()
    with open_trainer(recipe) as trainer:
        stop = trainer.parts.stop
        if evaluate_first and trainer.progress.step == 0:
            trainer.evaluate()
        for _ in trainer.steps():
            if seconds is not None and time.perf_counter() - started > seconds:
                stop.request(TIME_IS_UP)
        progress, reason = trainer.progress, stop.requested
    if not trainer.finished:
        if reason != TIME_IS_UP:
            raise RunStopped(f"stopped at step {progress.step:,} ({reason}); the same command goes on from there")
        say(f"the time is up at step {progress.step:,} of {recipe.duration}: this machine slowed down meanwhile")
    return Trained(progress, time.perf_counter() - started)
