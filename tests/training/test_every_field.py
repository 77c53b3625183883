"""No field of fine-tuning is decoration: each changes what a run reads or computes, or it is listed why not (S41)."""

from __future__ import annotations

import json
import pickle
from collections.abc import Callable
from pathlib import Path, PurePosixPath
from typing import Any

import pytest
import torch

from llmtrainer.base.config import load
from llmtrainer.base.errors import UserError
from llmtrainer.core.batch import GATES
from llmtrainer.models.adapters.dora import Dora
from llmtrainer.models.adapters.gated_lora import GatedLora
from llmtrainer.models.adapters.lora import Lora, adapters, initialise
from llmtrainer.models.families.hf import HuggingFace
from llmtrainer.tokenizer.tokenizer import load_tokenizer
from llmtrainer.training.assemble import engine_of, rows_of, tokenizer_of
from llmtrainer.training.datasets.examples import Examples
from llmtrainer.training.policies import policy_of
from llmtrainer.training.recipe import Recipe
from tests.worlds import ragged_documents, row_batch, tiny_model

RECIPE = """
run: {folder}/run
model: {{hidden_size: 32, layers: 1, heads: 2, intermediate_size: 64, context_length: 64}}
tokenizer: {world}/tokenizer
cache: {folder}/cache
data: {{kind: examples, train: {folder}/a.jsonl, template: chatml, sequence_length: 64, tokens_per_batch: 64,
  sequences_per_step: 4, workers: 1}}
precision: float32
"""
CLOCK = "{{ strftime_now('%d') }}" + (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
SHORT = "data.sequence_length=40 data.max_dropped_share=1.0"
EXAMPLES: dict[str, tuple[str, str]] = {
    "critical": ("", '{"<|im_end|>": 2.0}'),
    "train": ("", "FOLDER/b.jsonl"), "format": ("", "roles"), "template": ("", "role_end"),
    "date": ("data.template=FOLDER/clock.jinja data.date=2026-11-22", "2026-11-23"), "learn": ("", "everything"),
    "gate": ("", "gate"), "leave_out": ("data.train=FOLDER/thought.jsonl", "[thinking]"),
    "sequence_length": (SHORT, "50"), "tokens_per_batch": ("", "128"),
    "tokens_per_step": ("data.sequences_per_step=null data.tokens_per_step=100", "200"),
    "sequences_per_step": ("", "5"), "held_out": ("", "0.3"), "shuffle": ("", "false"),
    "too_long": (SHORT, "split"), "cut_side": (f"{SHORT} data.too_long=cut", "left"),
    "cut_end": (f"{SHORT} data.too_long=cut", "leave_out"), "max_dropped_share": ("data.sequence_length=40", "1.0"),
    "bad_records": ("data.train=FOLDER/bad.jsonl data.max_dropped_share=1.0 data.format=messages", "drop"),
    "allow_truncated": ("data.train=FOLDER/broken.jsonl", "true"),
    "allow_pickle": ("data.train=FOLDER/a.pkl", "true"), "evaluate": ("", "{dev: FOLDER/b.jsonl}"),
    "test_dataset_dir": ("data.evaluate=[b.jsonl]", "FOLDER"),
}
"""What else is said, and a value of the field that is to change the rows, their steps or the refusal."""
NO_RESULT = {"Examples.workers": "only how fast rows are made; test_examples holds that it changes no byte"}
ELSEWHERE = {
    "Lora.start_from": "test_adapters.py: test_an_adapter_is_trained_on_from_its_folder_with_its_shape",
    "Dora.start_from": "test_adapters.py: test_an_adapter_is_trained_on_from_its_folder_with_its_shape",
    "GatedLora.start_from": "test_gates.py: test_rows_with_gates_continue_bit_for_bit_and_are_evaluated",
    "HuggingFace.head": "test_reward.py: test_a_class_of_transformers_is_trained_as_a_reward_model_and_continued",
    "HuggingFace.start_from": "test_foreign_runs.py: test_what_a_foreign_model_cannot_do_is_refused",
}
"""Fields that need a run before the run: the test that shows what they do."""
ADAPTERS: dict[str, Any] = {
    "rank": 5, "alpha": 3.0, "rslora": True, "targets": ("q_proj",), "dropout": 0.5, "groups": (("x",), ("y", "z")),
}
FOREIGN = {"freeze": "[gpt_neox.embed_in.*]", "adapter": "{kind: lora, rank: 2}", "neftune": "5", "apart": "true"}


def said(question: str, answer: str, **more: str) -> dict[str, Any]:
    return {"messages": [{"role": "user", "content": question}, {"role": "assistant", "content": answer, **more}],
            "gate": "t1a1"}    # fmt: skip


@pytest.fixture
def recipe(world: Path, tmp_path: Path) -> Callable[..., Recipe]:
    many = [said("abcdefgh"[number % 8] * (number + 1), "hgf " * (number // 2 + 1)) for number in range(14)]
    files = {
        "a": many, "b": many[:5], "thought": [said("a", "b", thinking="c")], "bad": [*many[:3], {"messages": []}],
    }
    for name, records in files.items():
        (tmp_path / f"{name}.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    (tmp_path / "broken.jsonl").write_text(json.dumps(many[0]) + "\n" + json.dumps(many[1])[:30])
    (tmp_path / "a.pkl").write_bytes(pickle.dumps([{**many[0], "from": PurePosixPath("a")}]))
    (tmp_path / "clock.jinja").write_text(CLOCK)
    (tmp_path / "recipe.yaml").write_text(RECIPE.format(folder=tmp_path, world=world))

    def made(*overrides: str) -> Recipe:
        return load(Recipe, tmp_path / "recipe.yaml", [item.replace("FOLDER", str(tmp_path)) for item in overrides])

    return made


def read(make: Callable[..., Recipe], overrides: list[str]) -> Any:
    """All that a model would read: rows, weights, gates, what stands in the first micro-batches, what is measured."""
    try:
        recipe = make(*overrides)
        opened = rows_of(recipe, *tokenizer_of(recipe), engine_of(recipe)[0])
        store = opened.train.store
        rows = [(store.read(row).tolist(), _listed(store.weights(row))) for row in range(store.documents)]
        steps = [
            (batch.tokens_BT.tolist(), batch.weights_BT.tolist())
            for step in range(2) for batch in opened.train.batches(step)
        ]
        measured = {name: rows.rows_per_step for name, rows in opened.measured().items()}
        opened.train.close()
        return rows, store.gate_names, steps, measured
    except UserError as error:
        return error.what


def _listed(weights: Any) -> list[float]:
    return [] if weights is None else weights.tolist()


@pytest.mark.parametrize("field", EXAMPLES)
def test_every_field_of_examples_changes_what_is_read(recipe: Callable[..., Recipe], field: str) -> None:
    given, value = EXAMPLES[field]
    before = read(recipe, given.split())
    assert read(recipe, given.split()) == before, "the same recipe reads the same"
    after = read(recipe, [*given.split(), f"data.{field}={value}"])
    assert after != before and not (isinstance(after, str) and isinstance(before, str)), "not another refusal"


def computed(adapter: Lora) -> Any:
    """Parameters and hidden states of a tiny model that trains with this adapter, its B no longer 0."""
    policy = tiny_model(torch.float64).train()
    adapter.insert(policy)
    initialise(policy, 5)
    batch = row_batch(ragged_documents([17, 9]))
    if isinstance(adapter, GatedLora):
        first = [group[0] for group in adapter.groups]
        batch.signals[GATES] = torch.tensor(adapter.numbers("".join(first))).expand(*batch.tokens_BT.shape, -1)
    for linear in adapters(policy).values():
        assert linear.adapter is not None
        linear.adapter.lora_B.data.normal_(0.0, 0.1, generator=torch.Generator().manual_seed(2))
    return [tuple(value.shape) for _, value in policy.named_parameters()], policy.hidden(batch).tolist()


@pytest.mark.parametrize(
    ("kind", "field"),
    [(kind, field) for kind in (Lora, Dora, GatedLora) for field in ADAPTERS if field in kind.model_fields],
)
def test_every_field_of_an_adapter_changes_what_is_computed(kind: type[Lora], field: str) -> None:
    before = computed(kind())
    assert computed(kind()) == before and computed(kind.model_validate({field: ADAPTERS[field]})) != before


@pytest.mark.parametrize("field", FOREIGN)
def test_every_field_of_a_foreign_model_changes_what_is_computed(
    recipe: Callable[..., Recipe], field: str, world: Path, tmp_path: Path
) -> None:
    transformers = pytest.importorskip("transformers", reason="the extra hf is not installed")
    torch.manual_seed(1)
    shape = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 4, "intermediate_size": 48}
    config = transformers.GPTNeoXConfig(**shape, vocab_size=320, max_position_embeddings=64, hidden_dropout=0.0)
    transformers.AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path / "base")
    tokenizer = load_tokenizer(world / "tokenizer")

    def seen(*overrides: str) -> Any:
        wanted = recipe("model={kind: hf, start_from: FOLDER/base}", *overrides)
        policy = policy_of(wanted, tokenizer, torch.float32, None)
        policy.train()
        learned = [name for name, value in policy.named_parameters() if value.requires_grad]
        torch.manual_seed(3)
        return learned, policy.hidden(row_batch(ragged_documents([17, 9]))).tolist(), getattr(policy, "apart", None)

    assert seen() == seen() != seen(f"model.{field}={FOREIGN[field]}")


def test_no_field_is_forgotten_and_what_is_shown_elsewhere_is_there() -> None:
    shown = {f"Examples.{field}" for field in EXAMPLES} | {f"HuggingFace.{field}" for field in FOREIGN}
    shown |= {f"{kind.__name__}.{field}" for kind in (Lora, Dora, GatedLora) for field in ADAPTERS
              if field in kind.model_fields}    # fmt: skip
    every = {
        f"{kind.__name__}.{field}" for kind in (Examples, Lora, Dora, GatedLora, HuggingFace)
        for field in kind.model_fields
    }  # fmt: skip
    assert every == shown | NO_RESULT.keys() | ELSEWHERE.keys()
    for where in ELSEWHERE.values():
        file, _, test = where.partition(": ")
        assert f"def {test}(" in (Path(__file__).parent / file).read_text()
