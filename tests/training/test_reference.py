"""The frozen reference of a run: which model it is, that it stays, and what is refused."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from llmtrainer.base.errors import UserError
from llmtrainer.models.families.llama import Llama
from llmtrainer.models.weights import load_policy, save_weights
from llmtrainer.tokenizer.tokenizer import load_tokenizer
from llmtrainer.training.checkpoint import read_manifest
from llmtrainer.training.recipe import Recipe
from llmtrainer.training.run import open_trainer, train

Make = Callable[..., Recipe]
NEAR = "objective={kind: tests.training.nearness.Near}"


def model(world: Path, folder: Path, seed: int) -> Path:
    policy = Llama(hidden_size=32, layers=2, heads=2, intermediate_size=64, context_length=32).build(320)
    policy.initialise(seed)
    save_weights(policy, folder)
    load_tokenizer(world / "tokenizer").save(folder)
    return folder


@pytest.fixture
def base(world: Path, tmp_path: Path) -> Path:
    return model(world, tmp_path / "base", 9)


def nearing(recipe: Make, base: Path, *overrides: str, beside: str = "") -> Recipe:
    return recipe(f"model={{start_from: {base}{beside}}}", NEAR, "optim.schedule.peak=1e-2", *overrides)


def moved(recipe: Recipe) -> list[dict[str, float]]:
    with open_trainer(recipe) as trainer:
        return [info.metrics for info in trainer.steps()]


@pytest.mark.parametrize("precision", ["float32", "bfloat16", "float64"])
def test_the_reference_is_the_policy_as_the_run_began_to_the_bit(recipe: Make, base: Path, precision: str) -> None:
    first, *_, last = moved(nearing(recipe, base, "duration=3 steps", f"precision={precision}"))
    assert first["away"] == 0.0
    assert last["away"] > 0.0


@pytest.mark.parametrize("kind", ["lora", "dora"])
def test_beside_a_new_adapter_the_reference_is_the_model_without_it(recipe: Make, base: Path, kind: str) -> None:
    beside = f", adapter: {{kind: {kind}, rank: 4, dropout: 0.1}}"
    first, *_, last = moved(nearing(recipe, base, "duration=4 steps", beside=beside))
    assert first["away"] < 1e-6 if kind == "dora" else first["away"] == 0.0
    assert last["away"] > 0.0


def test_the_reference_does_not_move_and_is_the_same_after_a_resume(recipe: Make, base: Path) -> None:
    straight = moved(nearing(recipe, base, "duration=6 steps"))
    again = ["optim.schedule.length=6 steps", f"run={base.parent}/again"]
    train(nearing(recipe, base, "duration=3 steps", *again))
    resumed = moved(nearing(recipe, base, "duration=6 steps", *again))
    assert [step["reference"] for step in resumed] == [step["reference"] for step in straight[3:]]
    assert [step["away"] for step in resumed] == [step["away"] for step in straight[3:]]


def test_its_hash_stands_in_every_checkpoint(recipe: Make, base: Path) -> None:
    hashes = set()
    for overrides in (["duration=3 steps"], ["duration=6 steps"]):
        settings = nearing(recipe, base, *overrides)
        train(settings)
        newest = sorted((Path(settings.run) / "checkpoints").iterdir())[-1]
        hashes.add(read_manifest(newest)["reference_sha256"])
    assert len(hashes) == 1 and len(hashes.pop()) == 64


def test_a_reference_that_was_changed_meanwhile_is_refused(recipe: Make, base: Path, world: Path) -> None:
    train(nearing(recipe, base, "duration=3 steps"))
    model(world, base, seed=10)
    with pytest.raises(UserError, match="the reference changed") as caught:
        train(nearing(recipe, base, "duration=6 steps"))
    assert "SHA-256" in str(caught.value) and "restore" in str(caught.value)


def test_a_reference_that_is_gone_is_named(recipe: Make, base: Path) -> None:
    tokenizer = f"tokenizer={base.parent}/words"
    load_tokenizer(base).save(base.parent / "words")
    train(nearing(recipe, base, "duration=3 steps", tokenizer))
    base.rename(base.parent / "elsewhere")
    with pytest.raises(UserError, match="not there any more"):
        train(nearing(recipe, base, "duration=6 steps", tokenizer))


def test_a_random_reference_is_refused(recipe: Make) -> None:
    with pytest.raises(UserError, match="there is none") as caught:
        train(recipe(NEAR))
    assert "model.start_from" in str(caught.value)


def test_a_named_reference_is_that_model(recipe: Make, base: Path, world: Path, tmp_path: Path) -> None:
    other = model(world, tmp_path / "other", seed=1)
    settings = nearing(recipe, base, "duration=1 steps", f"reference={other}")
    with open_trainer(settings) as trainer:
        (batch, *_) = trainer.parts.source.batches(0)
        read = load_policy(other).eval()
        with torch.no_grad():
            expected = read(batch, ("logp",)).logp_BT
        (annotate,) = trainer.parts.annotators
        assert expected is not None and torch.equal(annotate(batch).signals["reference_logp_BT"], expected)


def test_a_continued_adapter_is_held_to_what_it_was(recipe: Make, base: Path, tmp_path: Path) -> None:
    beside = ", adapter: {kind: lora, rank: 4}"
    began = nearing(recipe, base, "duration=3 steps", f"run={tmp_path}/first", beside=beside)
    train(began)
    adapter = sorted((tmp_path / "first" / "checkpoints").iterdir())[-1]
    beside = f", adapter: {{start_from: {adapter}}}"
    first, *_, last = moved(nearing(recipe, base, "duration=3 steps", f"run={tmp_path}/second", beside=beside))
    assert first["away"] == 0.0 and last["away"] > 0.0
    off = nearing(recipe, base, "duration=1 steps", f"run={tmp_path}/third", f"reference={base}", beside=beside)
    (only,) = moved(off)
    assert only["away"] > 0.0


def test_a_reference_that_nobody_reads_is_refused(recipe: Make, base: Path) -> None:
    with pytest.raises(UserError, match="reference"):
        train(recipe(f"model={{start_from: {base}}}", f"reference={base}", "duration=1 steps"))
