"""Runs of a gated mixture of adapters: records name their gates, and a sample moves the adapters behind them alone."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch

from llmtrainer.base.config import load
from llmtrainer.base.errors import UserError
from llmtrainer.models.adapters.lora import adapters
from llmtrainer.models.families.llama import Llama
from llmtrainer.models.weights import save_weights
from llmtrainer.tokenizer.tokenizer import load_tokenizer
from llmtrainer.training.prepare import Preparation, prepare
from llmtrainer.training.recipe import Recipe
from llmtrainer.training.run import open_trainer, train

RECIPE = """
run: {folder}/run
model: {{start_from: {folder}/base, adapter: {{kind: gated_lora, rank: 2}}}}
tokenizer: {world}/tokenizer
data: {{kind: examples, train: {folder}/chats.jsonl, gate: gate, template: chatml, sequence_length: 64,
  tokens_per_batch: 128, sequences_per_step: 6, workers: 1}}
optim: {{rule: {{weight_decay: 0.0}}, schedule: {{peak: 1e-2, warmup: 0 steps}}}}
precision: float32
duration: 3 steps
cache: {folder}/cache
allow: [duplicates]
"""
Make = Callable[..., Recipe]


def write(path: Path, gates: Sequence[Any]) -> Path:
    records = [
        {"prompt": f"{'abcdefgh'[number % 8]} {number}\n", "response": "dcba"[number % 4], "gate": gate}
        for number, gate in enumerate(gates)
    ]
    found = [{key: value for key, value in record.items() if value is not None} for record in records]
    path.write_text("".join(json.dumps(record) + "\n" for record in found))
    return path


@pytest.fixture
def recipe(world: Path, tmp_path: Path) -> Make:
    policy = Llama(hidden_size=32, layers=2, heads=2, intermediate_size=64, context_length=64).build(320)
    policy.initialise(9)
    save_weights(policy, tmp_path / "base")
    load_tokenizer(world / "tokenizer").save(tmp_path / "base")
    (tmp_path / "recipe.yaml").write_text(RECIPE.format(folder=tmp_path, world=world))
    write(tmp_path / "chats.jsonl", ["t1a3"] * 20)
    return lambda *overrides: load(Recipe, tmp_path / "recipe.yaml", overrides=overrides)


def moved(settings: Recipe) -> list[str]:
    """Which of the eight adapters are not what they were at first, after the run."""
    names = ["t0", "t1", "t2", "t3", "a0", "a1", "a2", "a3"]
    with open_trainer(settings) as trainer:
        found = adapters(trainer.parts.policy)
        before = {name: linear.adapter.lora_A.detach().clone() for name, linear in found.items()}
        for _ in trainer.steps():
            pass
        changed = set()
        for name, linear in found.items():
            low = linear.adapter
            rows = (low.lora_A != before[name]).any(1).view(8, 2).any(1)
            assert torch.equal(rows, low.lora_B.any(0).view(8, 2).any(1)), "A and B of an adapter move together"
            changed.add(tuple(torch.nonzero(rows).flatten().tolist()))
    (places,) = changed
    return [names[place] for place in places]


def test_a_sample_of_two_gates_trained_by_a_recipe_moves_its_own_adapters_alone(recipe: Make, tmp_path: Path) -> None:
    assert moved(recipe()) == ["t1", "a3"]
    write(tmp_path / "chats.jsonl", ["t0a0", "t2a0", "t2"] * 8)
    assert moved(recipe(f"run={tmp_path}/second")) == ["t0", "t2", "a0"]


def test_gates_of_a_row_stay_with_it_wherever_it_is_drawn(recipe: Make, tmp_path: Path) -> None:
    gates = [f"t{number % 4}a{number // 4 % 4}" if number % 5 else "" for number in range(20)]
    write(tmp_path / "chats.jsonl", gates)
    with open_trainer(recipe("data.tokens_per_batch=64")) as trainer:
        source = trainer.parts.source
        for step in range(4):
            draws = source.draws(step)
            for batch in source.batches(step):
                for place_T, named_TG in zip(batch.place_BT, batch.signals["gates_BTG"], strict=True):
                    for place, named in zip(place_T.tolist(), named_TG.tolist(), strict=True):
                        gate = gates[draws[place][1]]
                        assert named == ([int(gate[1]), int(gate[3])] if gate else [-1, -1])


def test_rows_with_gates_continue_bit_for_bit_and_are_evaluated(recipe: Make, tmp_path: Path) -> None:
    write(tmp_path / "dev.jsonl", ["t3a1"] * 4)
    write(tmp_path / "chats.jsonl", ["t0a0", "t2a0", "t2"] * 8)
    settings = ("data.evaluate={dev: %s}" % (tmp_path / "dev.jsonl"), "data.held_out=0.2")
    assert set(train(recipe(*settings)).figures) == {"dev/loss", "held_out/loss"}
    train(recipe(*settings, f"run={tmp_path}/parts", "duration=2 steps", "optim.schedule.length=3 steps"))
    train(recipe(*settings, f"run={tmp_path}/parts", "optim.schedule.length=3 steps"))
    whole, parts = (
        tmp_path / name / "checkpoints" / "step-00000003" / "adapter_model.safetensors" for name in ("run", "parts")
    )
    assert whole.read_bytes() == parts.read_bytes()
    write(tmp_path / "dev.jsonl", ["t3a7"] * 4)
    with pytest.raises(UserError, match="`t3a7` names no gates") as error:
        train(recipe(*settings, f"run={tmp_path}/wrong"))
    assert "dev.jsonl, document 1" in str(error.value.where)


def test_a_mixture_without_gates_and_gates_without_a_mixture_are_refused(recipe: Make, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="rows do not say which adapters") as error:
        train(recipe("data.gate=null"))
    assert "data.gate=KEY" in str(error.value.fix)
    for change in ("model.adapter={kind: lora}", "model.adapter=null"):
        with pytest.raises(UserError, match=r"the rows name gates \(t1a3\) and the model has none"):
            train(recipe(change))
    assert train(recipe("model.adapter={kind: lora}", "data.gate=null")).step == 3


def test_a_record_without_gates_is_named_or_dropped(recipe: Make, tmp_path: Path) -> None:
    write(tmp_path / "chats.jsonl", ["t1a3"] * 6 + [None, 3] + ["t1"] * 12)
    with pytest.raises(UserError, match="names no gates") as error:
        train(recipe())
    assert str(error.value.where).endswith("chats.jsonl, line 7, key `gate`")
    assert train(recipe("data.bad_records=drop")).step == 3


def test_a_store_prepared_with_gates_is_trained_on(recipe: Make, world: Path, tmp_path: Path) -> None:
    settings = Preparation(
        data=str(tmp_path / "chats.jsonl"), out=str(tmp_path / "store"), tokenizer=str(world / "tokenizer"),
        format="prompt_response", template="chatml", max_length=64, gate="gate",
    )  # fmt: skip
    assert prepare(settings).documents == 20
    assert moved(recipe(f"data.train={tmp_path}/store")) == ["t1", "a3"]


def test_text_that_names_no_gates_is_refused_before_the_first_step(recipe: Make) -> None:
    for asked in ("evaluate.prompts=[hi]", "evaluate.suites=[{kind: perplexity, path: x.txt}]"):
        settings = recipe(asked)
        with pytest.raises(UserError, match="do not say which adapters") as error:
            train(settings)
        assert not list((Path(settings.run) / "checkpoints").iterdir())
        assert train(recipe(asked, *str(error.value.fix).split(), f"run={settings.run}-{asked[9:12]}")).step == 3
