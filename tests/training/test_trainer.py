"""The loop: what it computes, what it tells, and what it refuses to train on."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from llmtrainer.base.errors import UserError
from llmtrainer.base.events import read_events, steps
from llmtrainer.core.batch import Batch
from llmtrainer.core.objective import count
from llmtrainer.training.evaluation import measure
from llmtrainer.training.ledger import fingerprint
from llmtrainer.training.recipe import Recipe
from llmtrainer.training.run import open_trainer, train
from llmtrainer.training.trainer import Trainer
from tests.tolerances import FLOAT64_RUN

Make = Callable[..., Recipe]


def events(tmp_path: Path, kind: str) -> list[dict[str, Any]]:
    return [event for event in read_events(tmp_path / "run" / "events.jsonl") if event["kind"] == kind]


def test_losses_and_gradient_norms_do_not_depend_on_the_memory_knob(recipe: Make, tmp_path: Path) -> None:
    """The issue's own run: tokens_per_batch 1024 and 4096 at the same tokens_per_step, float64, dropout on."""
    curves = {}
    for budget in (1024, 4096):
        run = tmp_path / str(budget)
        train(recipe(
            "precision=float64", "data.sequences_per_step=null", "data.tokens_per_step=4096",
            f"data.tokens_per_batch={budget}", f"run={run}", "duration=6 steps",
        ))  # fmt: skip
        curves[budget] = [(event["loss"], event["grad_norm"]) for event in steps(run / "events.jsonl")]
    for one, other in zip(curves[1024], curves[4096], strict=True):
        assert one == pytest.approx(other, rel=0, abs=FLOAT64_RUN)
    assert len({loss for loss, _ in curves[1024]}) == 6


def test_a_repeated_pattern_is_learned_and_the_losses_are_the_same_twice(recipe: Make, tmp_path: Path) -> None:
    from llmtrainer.training.prepare import Preparation, prepare

    text = tmp_path / "pattern.txt"
    text.write_text("abcdefghij" * 3000)
    tokenizer = recipe().tokenizer.path
    assert tokenizer is not None
    store = tmp_path / "pattern"
    prepare(Preparation(data=str(text), out=str(store), tokenizer=tokenizer, workers=1))
    losses = []
    for name in ("once", "twice"):
        train(recipe(
            "duration=70 steps", f"data.train={store}", "data.held_out=0", "model.dropout=0", f"run={tmp_path / name}",
            "optim.schedule.peak=1e-2", "save.every=never", "evaluate={every: never}",
        ))  # fmt: skip
        losses.append([event["loss"] for event in steps(tmp_path / name / "events.jsonl")])
    assert losses[0] == losses[1]
    assert losses[0][0] == pytest.approx(math.log(320), abs=0.3)
    assert losses[0][-1] < 1.0


def test_a_step_tells_everything_the_contract_names(recipe: Make, tmp_path: Path) -> None:
    train(recipe("duration=4 steps"))
    names = "kind time step tokens loss learning_rate grad_norm seconds tokens_per_second mfu loss/lm".split()  # noqa: SIM905
    told = steps(tmp_path / "run" / "events.jsonl")
    assert all(set(names) <= set(event) for event in told)
    assert [event["tokens"] for event in told] == [160, 320, 480, 640]
    for event in told:
        parts = sum(value for name, value in event.items() if name.startswith("seconds/"))
        assert parts == pytest.approx(event["seconds"], rel=0.1)
        assert {"seconds/data", "seconds/forward", "seconds/backward", "seconds/optimizer"} <= set(event)
    kinds = [event["kind"] for event in read_events(tmp_path / "run" / "events.jsonl")]
    assert kinds[0] == "start" and kinds[-1] == "end" and "evaluate" in kinds and "save" in kinds


def test_the_order_is_step_event_evaluate_save(recipe: Make, tmp_path: Path) -> None:
    train(recipe("evaluate.every=2 steps", "save.every=2 steps", "duration=2 steps"))
    kinds = [event["kind"] for event in read_events(tmp_path / "run" / "events.jsonl")]
    assert kinds == ["start", "step", "step", "evaluate", "save", "end"]


def test_evaluating_the_training_batch_gives_the_training_loss(recipe: Make) -> None:
    """S31: one definition of the loss. Without dropout, before the update."""
    with open_trainer(recipe("model.dropout=0", "duration=1 steps")) as trainer:
        batches = trainer.parts.source.batches(0)
        evaluated = measure(trainer.parts.engine, trainer.parts.objective, batches)["loss"]
        info = trainer.step()
    assert info.loss == pytest.approx(evaluated, abs=1e-6)


def test_the_logged_loss_is_the_mean_over_tokens_recomputed_by_hand(recipe: Make) -> None:
    with open_trainer(recipe("model.dropout=0", "data.tokens_per_batch=32")) as trainer:
        batches = trainer.parts.source.batches(0)
        with torch.no_grad():
            summed = sum(
                float((trainer.parts.policy(batch, ("logp",)).logp_BT * batch.weights_BT).sum()) for batch in batches
            )
        info = trainer.step()
    assert len(batches) > 1
    assert info.loss == pytest.approx(-summed / count(batches)["tokens"], abs=1e-5)


def test_a_field_that_nothing_reads_is_refused_after_one_step(recipe: Make, tmp_path: Path) -> None:
    """S41. A schedule kind of the user's own that forgets one of its fields."""
    (tmp_path / "forgetful.py").write_text(
        "from llmtrainer.core.schedule import Schedule\n"
        "class Forgetful(Schedule):\n"
        "    '''Constant.'''\n"
        "    wobble: float = 0.0\n"
        "    '''Promised, never used.'''\n"
        "    def shape(self, share, warm_share):\n"
        "        return 1.0\n"
    )
    import sys

    sys.path.insert(0, str(tmp_path))
    try:
        with pytest.raises(UserError, match=r"`optim.schedule.wobble` was set and nothing read it"):
            train(recipe("optim.schedule.kind=forgetful.Forgetful", "optim.schedule.wobble=0.5"))
    finally:
        sys.path.remove(str(tmp_path))
    assert not list((tmp_path / "run" / "checkpoints").glob("step-*"))


def poisoned(trainer: Trainer, name: str) -> None:
    """Plant a NaN in the gradient of one parameter."""
    parameter = dict(trainer.parts.policy.named_parameters())[name]
    parameter.register_hook(lambda gradient: torch.full_like(gradient, math.nan))


BAD = "model.layers.1.self_attn.k_proj.weight"


def test_a_gradient_that_is_no_number_stops_the_run_and_names_its_parameter(recipe: Make, tmp_path: Path) -> None:
    with open_trainer(recipe()) as trainer:
        trainer.step()
        before = {name: fingerprint(tensor) for name, tensor in trainer.parts.policy.named_parameters()}
        poisoned(trainer, BAD)
        with pytest.raises(UserError, match="not a number") as caught:
            trainer.step()
        assert BAD in str(caught.value) and "rank 0" in str(caught.value) and "step 2" in str(caught.value)
        after = {name: fingerprint(tensor) for name, tensor in trainer.parts.policy.named_parameters()}
    assert before == after


def test_skipping_leaves_weights_and_optimizer_and_counts_the_step(recipe: Make, tmp_path: Path) -> None:
    with open_trainer(recipe("optim.on_nonfinite=skip")) as trainer:
        trainer.step()
        state = {name: tensor.clone() for name, tensor in trainer.parts.engine.state().items()}
        poisoned(trainer, BAD)
        info = trainer.step()
        assert info.skipped and trainer.progress.step == 2
        assert all(torch.equal(tensor, state[name]) for name, tensor in trainer.parts.engine.state().items())
        schedule, length = trainer.parts.schedule, trainer.parts.schedule_length
        assert info.learning_rate == schedule.rate(trainer.progress, length)
        with pytest.raises(UserError, match="not a number"):
            for _ in range(20):
                trainer.step()
    warnings = events(tmp_path, "warning")
    assert BAD in warnings[0]["text"] and len(warnings) == 10


def test_a_step_without_a_target_is_an_error_and_not_a_loss_of_zero(recipe: Make) -> None:
    with open_trainer(recipe()) as trainer:
        batches = trainer.parts.source.batches

        def silent(step: int) -> list[Batch]:
            return [replace(batch, weights_BT=torch.zeros_like(batch.weights_BT)) for batch in batches(step)]

        trainer.parts.source.batches = silent  # type: ignore[method-assign]
        with pytest.raises(UserError, match="has no target"):
            trainer.step()


def test_the_first_step_moves_every_trainable_tensor_and_no_frozen_one(recipe: Make) -> None:
    with open_trainer(recipe("model.freeze=['model.embed_tokens.*']", "duration=1 steps")) as trainer:
        before = {name: tensor.detach().clone() for name, tensor in trainer.parts.policy.named_parameters()}
        for _ in trainer.steps():
            pass
        still = [n for n, tensor in trainer.parts.policy.named_parameters() if torch.equal(tensor, before[n])]
    assert still == ["model.embed_tokens.weight"]


def test_a_trainable_tensor_that_does_not_move_ends_the_run(recipe: Make) -> None:
    """S42: declared trainable, held by no optimizer group."""
    with open_trainer(recipe()) as trainer:
        engine = trainer.parts.engine
        step = engine.step

        def forgets_one(rate: float) -> bool:
            head = dict(trainer.parts.policy.named_parameters())["lm_head.weight"]
            kept = head.detach().clone()
            updated = step(rate)
            with torch.no_grad():
                head.copy_(kept)
            return updated

        engine.step = forgets_one  # type: ignore[method-assign]
        with pytest.raises(UserError, match="did not move") as caught:
            next(trainer.steps())
        assert "lm_head.weight" in str(caught.value)


def test_a_frozen_tensor_that_moves_ends_the_run(recipe: Make) -> None:
    with open_trainer(recipe("model.freeze=['model.norm.*']")) as trainer:
        engine = trainer.parts.engine
        step = engine.step

        def moves_it(rate: float) -> bool:
            with torch.no_grad():
                dict(trainer.parts.policy.named_parameters())["model.norm.weight"].add_(1e-3)
            return step(rate)

        engine.step = moves_it  # type: ignore[method-assign]
        with pytest.raises(UserError, match="frozen parameters changed"):
            next(trainer.steps())


@pytest.mark.parametrize("other", ["swapped", "negated", "nudged"])
def test_a_fingerprint_sees_what_a_sum_would_not(other: str) -> None:
    tensor = torch.tensor([1.0, -1.0, 3.0, 4.0])
    changed: dict[str, Tensor] = {
        "swapped": torch.tensor([-1.0, 1.0, 3.0, 4.0]),
        "negated": torch.tensor([-1.0, 1.0, 3.0, 4.0]).neg().roll(1),
        "nudged": torch.tensor([1.0 + 1e-7, -1.0 - 1e-7, 3.0, 4.0]),
    }
    assert fingerprint(changed[other]) != fingerprint(tensor) == fingerprint(tensor.clone())


def test_samples_of_the_models_writing_are_kept(recipe: Make, tmp_path: Path) -> None:
    import json

    train(recipe("duration=2 steps", "evaluate.prompts=['ab', 'ba c']", "evaluate.max_new_tokens=5"))
    told = json.loads((tmp_path / "run" / "samples" / "step-00000002.json").read_text())
    assert told["step"] == 2 and [sample["prompt"] for sample in told["samples"]] == ["ab", "ba c"]
    assert all(1 <= sample["tokens"] <= 5 and sample["finish"] in ("end", "length") for sample in told["samples"])


def test_a_row_longer_than_the_models_context_is_refused(recipe: Make) -> None:
    with pytest.raises(UserError, match="beyond the model's context"):
        train(recipe("model.context_length=16"))


def test_a_run_starts_from_another_runs_weights_with_a_fresh_optimizer(recipe: Make, tmp_path: Path) -> None:
    train(recipe("duration=4 steps"))
    start = ("data.held_out=0.1", f"model={{start_from: {tmp_path / 'run'}}}", f"run={tmp_path / 'next'}")
    with open_trainer(recipe(*start)) as trainer, open_trainer(recipe("duration=4 steps")) as old:
        assert trainer.progress.step == 0 and old.progress.step == 4
        batches = trainer.parts.source.batches(4)
        figures = [measure(part.parts.engine, part.parts.objective, batches)["loss"] for part in (trainer, old)]
        assert figures[0] == figures[1]
        assert not any(name.endswith("exp_avg") for name in trainer.parts.engine.state())


def test_a_shape_beside_start_from_is_a_second_truth(recipe: Make, tmp_path: Path) -> None:
    train(recipe("duration=1 steps"))
    with pytest.raises(UserError, match=r"beside `model[.]start_from`"):
        train(recipe(f"model={{start_from: {tmp_path / 'run'}, layers: 3}}", f"run={tmp_path / 'next'}"))


@pytest.mark.parametrize("beyond", [(), ("model={start_from: %s}",)], ids=["plain", "start_from"])
def test_a_saved_recipe_runs_again_with_every_default_spelled_out(
    recipe: Make, tmp_path: Path, beyond: tuple[str, ...]
) -> None:
    from llmtrainer.base.config import load

    train(recipe("duration=2 steps"))
    if beyond:
        started = (beyond[0] % (tmp_path / "run"), f"run={tmp_path / 'started'}", "duration=2 steps")
        train(recipe(*started))
    saved = tmp_path / ("started" if beyond else "run") / "recipe.yaml"
    assert train(load(Recipe, saved, overrides=[f"run={tmp_path / 'again'}"])).step == 2


@pytest.mark.parametrize(
    ("warmup", "told"), [("10k tokens", "not shorter than the schedule's length of 12 steps, about"),
                         ("1.1 epochs", "12 steps, about")],
)
def test_a_warmup_beyond_the_run_is_refused_in_whatever_unit(recipe: Make, warmup: str, told: str) -> None:
    with pytest.raises(UserError, match=told) as caught, open_trainer(recipe(f"optim.schedule.warmup={warmup}")):
        pass
    assert caught.value.fix == "optim.schedule.warmup='1 steps'"
