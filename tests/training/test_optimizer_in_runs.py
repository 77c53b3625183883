"""Rates, rules and the loss scale where they work together: inside a run."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from llmtrainer.base.errors import UserError
from llmtrainer.base.events import read_events, steps
from llmtrainer.base.refusal import all_keys
from llmtrainer.base.units import Duration
from llmtrainer.optim.schedules.cosine import Cosine
from llmtrainer.training.recipe import KNOWN_ELSEWHERE, Recipe
from llmtrainer.training.run import open_trainer, train
from tests.tolerances import FLOAT32_LOSS, RATE_RELATIVE

Make = Callable[..., Recipe]


@pytest.mark.parametrize("budget", [32, 64, 160])
def test_the_rate_counts_optimizer_steps_and_not_micro_batches(recipe: Make, tmp_path: Path, budget: int) -> None:
    # Five rows a step, so 5, 3 or 1 micro-batches. Peak 1 at step 2; then half a cosine to a tenth at step 6.
    train(recipe(
        f"data.tokens_per_batch={budget}", "duration=6 steps", "optim.schedule.peak=1e-3",
        "optim.schedule.warmup=2 steps", "evaluate.every=never", "save.every=never",
    ))  # fmt: skip
    rates = [event["learning_rate"] for event in steps(tmp_path / "run" / "events.jsonl")]
    half_root = 0.5 * 2**0.5
    expected = [0.5, 1.0, 0.55 + 0.45 * half_root, 0.55, 0.55 - 0.45 * half_root, 0.1]
    assert rates == pytest.approx([1e-3 * multiplier for multiplier in expected], rel=RATE_RELATIVE)


@pytest.mark.parametrize(
    "words",
    [["optim.rule.kind=muon"], ["optim.rule.kind=lion"], ["optim.rule.kind=adafactor"], ["precision=float16"],
     ["optim.rule.kind=adamw_8bit", "optim.rule.smallest=1"],
     ["optim.schedule={kind: cosine_restarts, warmup: 1 steps, period: 2 steps, multiplier: 1.5}"]],
    ids=str,
)  # fmt: skip
def test_stopping_and_continuing_has_the_same_bits_with(recipe: Make, tmp_path: Path, words: list[str]) -> None:
    def states(run: str, stops: set[int]) -> dict[str, torch.Tensor]:
        for _ in range(len(stops) + 1):
            with open_trainer(recipe(*words, f"run={tmp_path / run}", "duration=6 steps")) as trainer:
                for info in trainer.steps():
                    if info.progress.step in stops:
                        trainer.parts.stop.request("test")
        assert trainer.progress.step == 6
        state = {name: tensor.clone() for name, tensor in trainer.parts.engine.state().items()}
        return state | dict(trainer.parts.policy.state_dict())

    whole, pieces = states("whole", set()), states("pieces", {2, 3})
    assert whole.keys() == pieces.keys()
    assert all(torch.equal(tensor, pieces[name]) for name, tensor in whole.items())


def test_an_overflow_in_a_run_skips_the_update_and_the_rate_goes_on(recipe: Make, tmp_path: Path) -> None:
    settings = ("precision=float16", "duration=4 steps", "evaluate.every=never", "save.every=never")
    with open_trainer(recipe(*settings)) as trainer:
        steps_of_run = trainer.steps()
        next(steps_of_run)
        before = {name: tensor.clone() for name, tensor in trainer.parts.policy.state_dict().items()}
        weight = next(trainer.parts.policy.parameters())
        handle = weight.register_hook(lambda gradient: gradient * float("inf"))
        info = next(steps_of_run)
        assert info.skipped
        assert all(torch.equal(tensor, before[name]) for name, tensor in trainer.parts.policy.state_dict().items())
        assert float(trainer.parts.engine.state()["engine.loss_scale"]) == 2.0**15
        handle.remove()
        # The schedule counts the skipped step: the third update has the rate of step 3.
        schedule = Cosine(peak=3e-3, warmup=Duration(0, "steps"))
        info = next(steps_of_run)
        assert not info.skipped
        assert info.learning_rate == schedule.rate(trainer.progress, Duration(4, "steps"))


def test_label_smoothing_and_z_loss_are_logged_beside_the_plain_loss(recipe: Make, tmp_path: Path) -> None:
    train(recipe(
        "objective.label_smoothing=0.1", "objective.z_loss=1e-2", "duration=2 steps", "evaluate.every=never",
        "save.every=never",
    ))  # fmt: skip
    events = read_events(tmp_path / "run" / "events.jsonl")
    (told,) = [event for event in events if event["kind"] == "evaluate"]
    last = steps(tmp_path / "run" / "events.jsonl")[-1]
    for prefix, event in [("", last), ("held_out/", told)]:
        parts = {"loss/lm": 0.9, "loss/smoothing": 0.1, "loss/z": 1e-2}
        expected = sum(coef * event[f"{prefix}{name}"] for name, coef in parts.items())
        assert event[f"{prefix}loss"] == pytest.approx(expected, rel=FLOAT32_LOSS)


@pytest.mark.parametrize(
    ("word", "told"),
    [("optim.gradient_accumulation_steps=8", "data.tokens_per_batch"), ("data.batch_size=8", "data.tokens_per_step"),
     ("learning_rate=1e-3", "optim.schedule.peak"), ("optim.max_grad_norm=1", "optim.clip")],
)  # fmt: skip
def test_a_key_that_other_trainers_have_is_answered_with_ours(recipe: Make, word: str, told: str) -> None:
    with pytest.raises(UserError, match="unknown key") as caught:
        recipe(word)
    assert caught.value.fix is not None and told in caught.value.fix


def test_every_key_that_an_answer_names_exists() -> None:
    keys = [key for kind in ("documents", "examples") for key in all_keys(Recipe, {"data": {"kind": kind}})]
    named = [key for text in KNOWN_ELSEWHERE.values() for key in re.findall(r"\b[a-z_]+(?:\.[a-z_]+)+|^duration", text)]
    assert len(named) >= len(KNOWN_ELSEWHERE) and set(named) <= set(keys)
