"""What the learning rate's schedule is stretched over, and whether its parts fit that."""

from __future__ import annotations

from collections.abc import Callable

from llmtrainer.base.units import UNKNOWN_PACE, Duration, Pace
from llmtrainer.training.dataset import Opened
from llmtrainer.training.recipe import Recipe, Rollouts
from llmtrainer.training.resume import Resumption


def schedule_length(
    recipe: Recipe, resumption: Resumption | None, rows: Opened, warn: Callable[[str], None]
) -> Duration:
    """The length as given, else as the run began, else the duration. UserError where the warm-up does not fit."""
    length = recipe.optim.schedule.length
    if length is None and resumption is not None:
        length = resumption.schedule_length
        if length != recipe.duration:
            warn(
                f"the learning rate keeps its schedule of {length}; optim.schedule.length='{recipe.duration}' "
                "stretches it"
            )
    length = length or recipe.duration
    # The steps of a run that goes on may have had another size before: it was asked when it began.
    pace = UNKNOWN_PACE if resumption is not None else pace_of(rows, recipe.rollout)
    recipe.optim.schedule.require_fit(length, pace)
    return length


def pace_of(rows: Opened, rollout: Rollouts) -> Pace:
    """What a step is of an epoch and in tokens, as far as it is known before the first."""
    if rows.train is not None:
        return rows.train.pace
    if rows.prompts is None or rollout.redraw:
        return UNKNOWN_PACE    # how many prompts are drawn again depends on what the policy will write
    answers = rows.prompts.prompts_per_step * rollout.group_size
    steps = rollout.epochs * answers / (rollout.answers_per_step or answers)
    return Pace(epochs=rows.prompts.epochs(1) / steps)
