"""Runs on packed conversations: resumed bit for bit in the middle of an epoch, the same however a step is cut."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest

from llmtrainer.base.units import Duration
from llmtrainer.training.recipe import Recipe
from llmtrainer.training.run import train
from tests.tolerances import FLOAT64_RUN
from tests.training.conftest import conversations

Chats = Callable[..., Recipe]


def losses(recipe: Recipe) -> list[float]:
    lines = (Path(recipe.run) / "events.jsonl").read_text().splitlines()
    events = [json.loads(line) for line in lines]
    return [event["loss"] for event in events if event["kind"] == "step"]


def test_a_run_stopped_in_the_middle_of_an_epoch_goes_on_bit_for_bit(chats: Chats) -> None:
    # 30 rows, 8 a step: the fourth step ends the first epoch and begins the second.
    straight = chats(conversations(30), "straight", "duration=7 steps")
    train(straight)
    stopped = chats(conversations(30), "stopped", "duration=2 steps", "optim.schedule.length=7 steps")
    for steps in (2, 5, 7):
        train(stopped.model_copy(update={"duration": Duration.parse(f"{steps} steps")}))
    assert losses(stopped) == losses(straight) and len(losses(straight)) == 7
    for name in ("model.safetensors", "optimizer.safetensors"):
        files = [Path(recipe.run) / "checkpoints/step-00000007" / name for recipe in (straight, stopped)]
        assert files[0].read_bytes() == files[1].read_bytes()


@pytest.mark.parametrize("budget", [256, 700, 10_000])
def test_the_memory_knob_changes_no_loss(chats: Chats, budget: int) -> None:
    found = []
    for name, tokens in (("one", 512), ("other", budget)):
        recipe = chats(
            conversations(30), name, f"data.tokens_per_batch={tokens}", "precision=float64", "duration=3 steps"
        )
        train(recipe)
        found.append(losses(recipe))
    assert found[0] == pytest.approx(found[1], abs=FLOAT64_RUN, rel=0) and len(found[0]) == 3
