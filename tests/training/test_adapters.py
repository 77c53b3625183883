"""Runs that train an adapter: what learns, what is saved, what continues, and what is refused."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from llmtrainer.apps.merge import Merge, merge
from llmtrainer.base.errors import UserError
from llmtrainer.models.families.llama import Llama
from llmtrainer.models.weights import load_policy, save_weights, tensors
from llmtrainer.tokenizer.tokenizer import load_tokenizer
from llmtrainer.training.models import open_model
from llmtrainer.training.recipe import Recipe
from llmtrainer.training.run import open_trainer, train
from llmtrainer.training.use import Evaluation, Generation, evaluate, generate
from tests.tolerances import FLOAT32_HIDDEN
from tests.worlds import ragged_documents, row_batch

Make = Callable[..., Recipe]


@pytest.fixture
def base(world: Path, tmp_path: Path) -> Path:
    """A Hugging Face folder with a model and its tokenizer."""
    policy = Llama(hidden_size=32, layers=2, heads=2, intermediate_size=64, context_length=32).build(320)
    policy.initialise(9)
    save_weights(policy, tmp_path / "base")
    load_tokenizer(world / "tokenizer").save(tmp_path / "base")
    return tmp_path / "base"


def adapting(recipe: Make, base: Path, kind: str = "lora", *overrides: str) -> Recipe:
    model = f"model={{start_from: {base}, adapter: {{kind: {kind}, rank: 4, dropout: 0.1}}}}"
    return recipe(model, "optim.schedule.peak=1e-2", *overrides)


def newest(recipe: Recipe) -> Path:
    return sorted((Path(recipe.run) / "checkpoints").iterdir())[-1]


@pytest.mark.parametrize("kind", ["lora", "dora"])
def test_only_the_adapter_learns_is_kept_by_the_optimizer_and_is_saved(recipe: Make, base: Path, kind: str) -> None:
    settings = adapting(recipe, base, kind, "duration=3 steps")
    with open_trainer(settings) as trainer:
        policy, losses = trainer.parts.policy, [info.loss for info in trainer.steps()]
        for name, value in tensors(policy).items():
            assert torch.equal(value, tensors(load_policy(base))[name]), name
        learned = {name for name, value in policy.named_parameters() if value.requires_grad}
        assert learned and all(".adapter." in name for name in learned)
        kept = {name.split(".", 1)[1].rpartition(".")[0] for name in trainer.parts.engine.state() if "exp_avg" in name}
        assert kept == learned
    assert losses[-1] != losses[0]
    folder = newest(settings)
    assert not (folder / "config.json").exists() and not (folder / "model.safetensors").exists()
    stored = load_file(folder / "adapter_model.safetensors")
    assert len(stored) == len(learned) and all(name.startswith("base_model.model.model.layers.") for name in stored)
    assert sum(value.numel() for name, value in stored.items() if "lora_B" in name and bool(value.any())) > 0
    assert json.loads((folder / "adapter_config.json").read_text())["base_model_name_or_path"] == str(base.resolve())


@pytest.mark.parametrize("kind", ["lora", "dora"])
def test_a_run_that_was_interrupted_ends_with_the_bytes_of_one_that_was_not(
    recipe: Make, base: Path, tmp_path: Path, kind: str
) -> None:
    whole = adapting(recipe, base, kind, "duration=6 steps", f"run={tmp_path / 'whole'}")
    train(whole)
    halves = adapting(recipe, base, kind, "duration=3 steps", "optim.schedule.length=6 steps", f"run={tmp_path / 'x'}")
    train(halves)
    halves = adapting(recipe, base, kind, "duration=6 steps", "optim.schedule.length=6 steps", f"run={tmp_path / 'x'}")
    train(halves)
    for name in ("adapter_model.safetensors", "optimizer.safetensors"):
        assert (newest(whole) / name).read_bytes() == (newest(halves) / name).read_bytes()


def test_a_run_is_used_as_its_base_with_the_adapter_beside_it(recipe: Make, base: Path, world: Path) -> None:
    settings = adapting(recipe, base, "lora", "duration=8 steps")
    with open_trainer(settings) as trainer:
        for _ in trainer.steps():
            pass
        trainer.parts.policy.eval()
        wanted = trainer.parts.policy.hidden(row_batch(ragged_documents([9])))
    opened = open_model(settings.run)
    assert torch.equal(opened.policy.hidden(row_batch(ragged_documents([9]))), wanted)
    alone = load_policy(base).hidden(row_batch(ragged_documents([9])))
    assert (wanted - alone).abs().max() > 100 * FLOAT32_HIDDEN
    text = str(world / "text" / "000.txt")
    adapted, plain = (evaluate(Evaluation(model=str(model), data=text)) for model in (settings.run, base))
    assert adapted.loss is not None and plain.loss is not None and adapted.loss < plain.loss
    written = generate(Generation(model=settings.run, prompt="abc", max_new_tokens=4, temperature=0.0))
    assert written.completions[0].text


def test_an_adapter_is_trained_on_from_its_folder_with_its_shape(
    recipe: Make, base: Path, tmp_path: Path
) -> None:
    first = adapting(recipe, base, "dora", "duration=2 steps")
    train(first)
    model = f"model={{start_from: {base}, adapter: {{start_from: {first.run}}}}}"
    second = recipe(model, "duration=1 steps", f"run={tmp_path / 'second'}")
    with open_trainer(second) as trainer:
        low = trainer.parts.policy.model.layers[0].mlp.up_proj.adapter
        assert low.lora_A.shape[0] == 4 and low.lora_magnitude_vector is not None
        stored = load_file(newest(first) / "adapter_model.safetensors")
        for what, value in (("lora_A", low.lora_A), ("lora_B", low.lora_B)):
            assert torch.equal(value, stored[f"base_model.model.model.layers.0.mlp.up_proj.{what}.weight"])
        for _ in trainer.steps():
            pass
    shutil.rmtree(first.run)
    train(recipe(model, "duration=2 steps", f"run={tmp_path / 'second'}"))
    with pytest.raises(UserError, match="second truth"):
        model = f"model={{start_from: {base}, adapter: {{start_from: {second.run}, rank: 8}}}}"
        train(recipe(model, f"run={tmp_path / 'third'}"))
    plain = adapting(recipe, base, "lora", "duration=1 steps", f"run={tmp_path / 'plain'}")
    train(plain)
    with pytest.raises(UserError, match="is dora, and the adapter that it starts from is lora") as error:
        model = f"model={{start_from: {base}, adapter: {{kind: dora, start_from: {plain.run}}}}}"
        train(recipe(model, f"run={tmp_path / 'fourth'}"))
    assert "model.adapter.kind=lora" in str(error.value.fix)


def test_a_moving_average_of_an_adapter_is_an_adapter(recipe: Make, base: Path) -> None:
    settings = adapting(recipe, base, "lora", "duration=3 steps", "optim.ema={decay: 0.5}")
    train(settings)
    average = load_file(newest(settings) / "ema" / "adapter_model.safetensors")
    last = load_file(newest(settings) / "adapter_model.safetensors")
    assert average.keys() == last.keys() and any(not torch.equal(average[name], last[name]) for name in last)
    open_model(f"{settings.run}/ema")
    train(adapting(recipe, base, "lora", "duration=4 steps", "optim.ema={decay: 0.5}"))


def test_what_an_adapter_cannot_be_is_refused(recipe: Make, base: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="without a model to stand beside"):
        train(recipe("model.adapter={kind: lora}"))
    with pytest.raises(UserError, match="trained beside an adapter"):
        train(adapting(recipe, base, "lora", "model.freeze=['!lm_head.*']"))
    settings = adapting(recipe, base, "lora", "duration=1 steps")
    train(settings)
    with pytest.raises(UserError, match="this is an adapter, not a model"):
        train(recipe(f"model={{start_from: {settings.run}}}", f"run={tmp_path / 'next'}"))
    base.rename(tmp_path / "elsewhere")
    with pytest.raises(UserError, match="is not there"):
        open_model(settings.run)


def test_noise_on_embeddings_changes_training_alone(recipe: Make, base: Path, tmp_path: Path) -> None:
    losses = []
    for size in (0.0, 5.0):
        model = f"model={{start_from: {base}, neftune: {size}}}"
        with open_trainer(recipe(model, "duration=1 steps", f"run={tmp_path / str(size)}")) as trainer:
            policy = trainer.parts.policy
            before = policy.eval().hidden(row_batch(ragged_documents([9])))
            policy.train()
            losses.append(next(info.loss for info in trainer.steps()))
        assert torch.equal(before, load_policy(base).hidden(row_batch(ragged_documents([9]))))
    assert losses[0] != losses[1]


def test_a_base_that_changed_behind_its_adapter_is_refused_and_a_copy_of_it_is_not(
    recipe: Make, base: Path, tmp_path: Path
) -> None:
    settings = adapting(recipe, base, "lora", "duration=1 steps")
    train(settings)
    adapter = newest(settings)
    merge(Merge(model=str(adapter), out=str(tmp_path / "before")))
    weights = base / "model.safetensors"
    kept = weights.read_bytes()
    shutil.copytree(base, tmp_path / "copy")
    save_file({name: value * 1.5 for name, value in load_file(weights).items()}, weights, {"format": "pt"})
    longer = adapting(recipe, base, "lora", "duration=2 steps")
    for again in (
        lambda: merge(Merge(model=str(adapter), out=str(tmp_path / "after"))),
        lambda: generate(Generation(model=str(adapter), prompt="a", max_new_tokens=1)), lambda: train(longer),
    ):
        with pytest.raises(UserError, match="has other weights than it was trained beside") as error:
            again()
        assert error.value.where == str(base)
    config = adapter / "adapter_config.json"
    moved = json.loads(config.read_text()) | {"base_model_name_or_path": str(tmp_path / "copy")}
    config.write_text(json.dumps(moved))
    merge(Merge(model=str(adapter), out=str(tmp_path / "after")))
    config.write_text(json.dumps(moved | {"base_model_name_or_path": str(base)}))
    weights.write_bytes(kept)
    assert generate(Generation(model=str(adapter), prompt="a", max_new_tokens=1)).completions
