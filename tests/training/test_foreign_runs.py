"""Runs with models of transformers' own classes: trained, saved as transformers saves, continued, used."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from llmtrainer.apps.merge import Merge, merge
from llmtrainer.base.errors import UserError
from llmtrainer.base.events import read_events
from llmtrainer.base.rundir import RunDir
from llmtrainer.models.foreign import Foreign
from llmtrainer.tokenizer.tokenizer import load_tokenizer
from llmtrainer.training.models import open_model
from llmtrainer.training.recipe import Recipe
from llmtrainer.training.run import open_trainer, train
from llmtrainer.training.use import Evaluation, Generation, evaluate, generate

transformers = pytest.importorskip("transformers")
Make = Callable[..., Recipe]


@pytest.fixture
def base(world: Path, tmp_path: Path) -> Path:
    """A GPT-NeoX with dropout, and its tokenizer."""
    torch.manual_seed(1)
    config = transformers.GPTNeoXConfig(
        hidden_size=32, num_hidden_layers=2, num_attention_heads=4, intermediate_size=48, vocab_size=320,
        max_position_embeddings=64, hidden_dropout=0.1, attention_dropout=0.1, bos_token_id=None, eos_token_id=1,
    )  # fmt: skip
    transformers.AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path / "base")
    load_tokenizer(world / "tokenizer").save(tmp_path / "base")
    return tmp_path / "base"


def foreign(recipe: Make, base: Path, *overrides: str, more: str = "") -> Recipe:
    return recipe(f"model={{kind: hf, start_from: {base}{more}}}", "optim.schedule.length=4 steps", *overrides)


def newest(recipe: Recipe) -> Path:
    return sorted((Path(recipe.run) / "checkpoints").iterdir())[-1]


@pytest.mark.parametrize("more", ["", ", adapter: {kind: dora, rank: 2, dropout: 0.2}"], ids=["whole", "adapter"])
def test_an_interrupted_run_ends_with_the_bytes_of_one_that_was_not(
    recipe: Make, base: Path, tmp_path: Path, more: str
) -> None:
    whole = foreign(recipe, base, "duration=4 steps", f"run={tmp_path / 'whole'}", more=more)
    train(whole)
    for steps in (2, 4):
        halves = foreign(recipe, base, f"duration={steps} steps", f"run={tmp_path / 'halves'}", more=more)
        train(halves)
    files = {path.name for path in newest(whole).iterdir()}
    assert ("adapter_model.safetensors" in files) == bool(more) and ("config.json" in files) != bool(more)
    for name in files:
        if name.endswith(".safetensors"):
            assert (newest(whole) / name).read_bytes() == (newest(halves) / name).read_bytes()
    said = [event["text"] for event in read_events(RunDir(Path(whole.run)).events) if event["kind"] == "warning"]
    assert sum("drawn from the seed of the step" in text for text in said) == 1


def test_what_was_trained_is_used_from_its_run_and_opened_by_transformers(
    recipe: Make, base: Path, world: Path
) -> None:
    settings = foreign(recipe, base, "duration=4 steps", "optim.schedule.peak=1e-2")
    train(settings)
    text = str(world / "text" / "000.txt")
    before, after = (evaluate(Evaluation(model=str(model), data=text)).loss for model in (base, settings.run))
    assert before is not None and after is not None and after < before
    assert generate(Generation(model=settings.run, prompt="abc", max_new_tokens=3)).completions[0].ids
    model = transformers.AutoModelForCausalLM.from_pretrained(newest(settings)).eval()
    opened = open_model(settings.run).policy
    assert isinstance(opened, Foreign)
    ids = torch.tensor([[5, 6, 7]])
    with torch.no_grad():
        ours = opened.read(ids, torch.tensor([3]), opened.cache(1, 3))[0]
        assert (model(ids).logits[0, -1] - ours).abs().max() < 1e-5


@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
def test_an_adapter_on_a_foreign_model_merges_into_a_folder_of_transformers(
    recipe: Make, base: Path, tmp_path: Path, precision: str
) -> None:
    settings = foreign(
        recipe, base, "duration=4 steps", "optim.schedule.peak=1e-2", more=", adapter: {kind: lora, rank: 4}"
    )
    train(settings)
    told = merge(Merge(model=settings.run, out=str(tmp_path / "merged"), precision=precision))
    assert told.changed == 8 and told.max_logit_difference <= told.allowed_logit_difference
    model = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "merged", dtype="auto").eval()
    assert next(model.parameters()).dtype == getattr(torch, precision)
    opened = open_model(settings.run).policy
    ids = torch.tensor([[5, 6, 7]])
    with torch.no_grad():
        ours = opened.read(ids, torch.tensor([3]), opened.cache(1, 3))[0]
        far = (model(ids).logits[0, -1].float() - ours).abs().max()
    assert far < (1e-5 if precision == "float32" else 3e-2) * ours.abs().max()


def test_freezing_by_pattern_trains_the_embedding_alone(recipe: Make, base: Path) -> None:
    settings = foreign(recipe, base, "duration=3 steps", more=", freeze: ['*', '!gpt_neox.embed_in.*']")
    with open_trainer(settings) as trainer:
        policy = trainer.parts.policy
        before = {name: value.detach().clone() for name, value in policy.named_parameters()}
        for _ in trainer.steps():
            pass
        changed = {name for name, value in policy.named_parameters() if not torch.equal(value, before[name])}
        held = {name for name in before if any(f".{name}." in key for key in trainer.parts.engine.state())}
    assert changed == held == {"gpt_neox.embed_in.weight"}


def test_what_a_foreign_model_cannot_do_is_refused(recipe: Make, base: Path, tmp_path: Path) -> None:
    for override, what in (
        ("engine.recompute_every=1", "recompute_every"), ("engine.compile=true", "not compiled"),
    ):
        with pytest.raises(UserError, match=what):
            train(foreign(recipe, base, override, "duration=1 steps", f"run={tmp_path / what}"))
    with pytest.raises(UserError, match="no shape of its own"):
        train(recipe("model={kind: hf}", f"run={tmp_path / 'none'}"))
