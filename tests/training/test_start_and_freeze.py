"""Runs that start from weights of others, and runs that train a part of a model."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from llmtrainer.base.errors import UserError
from llmtrainer.models.families.llama import Llama
from llmtrainer.models.weights import load_policy, save_weights, tensors
from llmtrainer.tokenizer.tokenizer import load_tokenizer
from llmtrainer.training.recipe import Recipe
from llmtrainer.training.run import open_trainer, train

Make = Callable[..., Recipe]


@pytest.mark.parametrize(
    ("patterns", "trained"),
    [
        ("['*', '!model.embed_tokens.*']", {"model.embed_tokens.weight"}),
        ("['*', '!lm_head.*', '!model.norm.*']", {"lm_head.weight", "model.norm.weight"}),
    ],
    ids=["embeddings alone", "head and last norm"],
)
def test_three_steps_change_exactly_what_is_not_frozen_and_the_optimizer_holds_state_for_that_alone(
    recipe: Make, patterns: str, trained: set[str]
) -> None:
    with open_trainer(recipe(f"model.freeze={patterns}", "duration=3 steps")) as trainer:
        policy = trainer.parts.policy
        before = {name: value.clone() for name, value in tensors(policy).items()}
        for _ in trainer.steps():
            pass
        changed = {name for name, value in tensors(policy).items() if not torch.equal(value, before[name])}
        assert changed == trained
        state = trainer.parts.engine.state()
        held = {name for name in before if any(key.startswith(f"{name}.") or f".{name}." in key for key in state)}
        assert held == trained


@pytest.fixture
def folder(world: Path, tmp_path: Path) -> Path:
    """A Hugging Face folder with a model in bfloat16, and no tokenizer."""
    policy = Llama(hidden_size=32, layers=1, heads=2, intermediate_size=64, context_length=32, rope_theta=5e3).build(
        load_tokenizer(world / "tokenizer").vocabulary
    )
    policy.initialise(9)
    save_weights(policy, tmp_path / "folder", dtype=torch.bfloat16)
    return tmp_path / "folder"


def test_a_run_starts_from_a_folder_of_others_with_its_shape_and_saves_it_in_float32(
    recipe: Make, folder: Path, tmp_path: Path
) -> None:
    started = recipe(f"model={{start_from: {folder}}}", "duration=1 steps")
    with open_trainer(started) as trainer:
        policy = trainer.parts.policy
        for name, value in tensors(load_policy(folder)).items():
            assert torch.equal(tensors(policy)[name], value)
        assert trainer.progress.step == 0 and policy.family.rope_theta == 5e3
        assert not any("exp_avg" in name for name in trainer.parts.engine.state())
        for _ in trainer.steps():
            pass
    saved = sorted((tmp_path / "run" / "checkpoints").iterdir())[-1]
    assert json.loads((saved / "config.json").read_text())["torch_dtype"] == "float32"
    assert json.loads((saved / "manifest.json").read_text())["parent"] == str(folder)


def test_weights_of_another_shape_are_listed_by_name_and_refused(recipe: Make, folder: Path) -> None:
    config = json.loads((folder / "config.json").read_text())
    del config["llmtrainer"]
    (folder / "config.json").write_text(json.dumps({**config, "intermediate_size": 80}))
    with pytest.raises(UserError) as caught:
        train(recipe(f"model={{start_from: {folder}}}", "duration=1 steps"))
    assert "model.layers.0.mlp.up_proj.weight is [64, 32], the model has [80, 32]" in str(caught.value)
