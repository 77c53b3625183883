"""How many optimizer steps a run will take, counted by hand formula before anything is loaded."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from llmtrainer.base.errors import UserError

Stage = Literal["pretrain", "sft", "dpo", "ppo", "grpo"]


@dataclass(frozen=True)
class Rollouts:
    """What a stage that writes its own answers does with each batch of prompts."""

    epochs: int
    """Passes over the answers of one batch of prompts."""
    batch: int
    """Answers of one micro-batch of these passes."""
    group_size: int = 1
    """Answers to each prompt."""


@dataclass(frozen=True)
class StepPlan:
    """Counts for one rank over the whole run."""

    batches: int
    """Micro-batches that are differentiated."""
    steps: int
    """Optimizer steps, never micro-batches."""
    warmup: int
    """Of these, steps in which the rate climbs."""

    @property
    def decay(self) -> int:
        """Steps after the warm-up."""
        return self.steps - self.warmup


def plan_steps(
    stage: Stage,
    *,
    epochs: int,
    rows: int,
    batch: int,
    world_size: int = 1,
    accumulation: int = 1,
    warmup_share: float = 0.1,
    rollouts: Rollouts | None = None,
) -> StepPlan:
    """Count the steps of `epochs` passes over `rows` rows (texts, dialogues, pairs or prompts).

    One pass serves rows // (batch * world_size) micro-batches to each rank; what is left of a pass is too
    small for every rank to have one. A rollout stage turns each of them into
    rollouts.epochs * batch * group_size / rollouts.batch micro-batches of answers. `accumulation`
    micro-batches make one step; a last step that they do not fill is not taken. A source that carries the
    rest of one pass over into the next, as ours on disk does, may come to more steps in several passes.

    Raises UserError if not even one step comes of it.
    """
    assert min(epochs, batch, world_size, accumulation) >= 1 and 0.0 <= warmup_share < 1.0
    assert (rollouts is not None) == (stage in ("ppo", "grpo")), f"{stage} with {rollouts}"
    batches = epochs * (rows // (batch * world_size))
    if rollouts is not None:
        batches = batches * rollouts.epochs * batch * rollouts.group_size // rollouts.batch
    steps = batches // accumulation
    if steps == 0:
        per_step = batch * world_size * accumulation
        raise UserError(
            f"{rows:,} rows in {epochs:,} epochs are not one optimizer step",
            why=f"a step takes {accumulation:,} micro-batches of {batch:,} rows on {world_size:,} ranks: "
            f"{per_step:,} rows",
            fix="fewer rows per step, or more data",
        )
    return StepPlan(batches, steps, round(steps * warmup_share))
