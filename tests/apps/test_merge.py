"""merge: the folder gives what the adapter beside its model gives, or there is no folder."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from llmtrainer.apps import merge as module
from llmtrainer.apps.cli import main
from llmtrainer.apps.export import Export, export
from llmtrainer.apps.merge import Merge, merge
from llmtrainer.base.errors import UserError
from llmtrainer.models.adapters.dora import Dora
from llmtrainer.models.adapters.gated_lora import GatedLora
from llmtrainer.models.adapters.lora import Lora, adapters, initialise
from llmtrainer.models.families.llama import Llama
from llmtrainer.models.peft_format import adapter_config, adapter_tensors, write_adapter
from llmtrainer.models.weights import load_policy, save_weights
from llmtrainer.tokenizer.tokenizer import FileTokenizer, load_tokenizer
from llmtrainer.training.models import load_model
from tests.tolerances import MERGED_LOGITS
from tests.worlds import ragged_documents, row_batch

KINDS = {"lora": Lora, "dora": Dora}


@pytest.fixture(scope="module")
def words(tmp_path_factory: pytest.TempPathFactory) -> FileTokenizer:
    from llmtrainer.training.prepare import TokenizerTraining, train_tokenizer

    folder = tmp_path_factory.mktemp("words")
    (folder / "text.txt").write_text("some words to learn from, " * 40)
    train_tokenizer(TokenizerTraining(data=str(folder / "text.txt"), out=str(folder / "tokenizer"), vocabulary=280))
    return load_tokenizer(folder / "tokenizer")


@pytest.fixture
def base(words: FileTokenizer, tmp_path: Path) -> Path:
    family = Llama(hidden_size=32, layers=2, heads=2, intermediate_size=64, context_length=64, tied_head=True)
    policy = family.build(320)
    policy.initialise(9)
    save_weights(policy, tmp_path / "base")
    words.save(tmp_path / "base")
    (tmp_path / "base" / "generation_config.json").write_text('{"temperature": 0.6}')
    return tmp_path / "base"


def write(base: Path, folder: Path, kind: str = "lora", size: float = 0.1) -> Path:
    policy = load_policy(base)
    KINDS[kind](rank=3, alpha=3.0).insert(policy)
    initialise(policy, 4)
    for linear in adapters(policy).values():
        assert linear.adapter is not None
        linear.adapter.lora_B.data.normal_(0.0, size, generator=torch.Generator().manual_seed(6))
    write_adapter(adapter_tensors(policy), adapter_config(policy, str(base)), folder)
    return folder


@pytest.mark.parametrize("precision", ["float32", "bfloat16", "float64"])
@pytest.mark.parametrize("kind", KINDS)
def test_a_merged_folder_has_the_logits_of_the_adapter_beside_its_model(
    base: Path, tmp_path: Path, kind: str, precision: str
) -> None:
    adapter = write(base, tmp_path / "adapter", kind)
    told = merge(Merge(model=str(adapter), out=str(tmp_path / "merged"), precision=precision))
    row = row_batch(ragged_documents([20]))
    wanted, found = (load_model(path).eval().hidden(row) for path in (adapter, tmp_path / "merged"))
    far = float(((wanted - found).abs().max() / wanted.abs().max()).detach())
    assert far < MERGED_LOGITS[precision] and told.max_logit_difference <= told.allowed_logit_difference
    assert told.base_logit_difference > 100 * told.max_logit_difference or precision == "bfloat16"
    assert told.changed == 14 and told.precision == precision
    stored = load_file(tmp_path / "merged" / "model.safetensors")
    assert {value.dtype for value in stored.values()} == {getattr(torch, precision)}
    old = load_file(base / "model.safetensors")
    same = {name for name in old if torch.equal(old[name].to(stored[name].dtype), stored[name])}
    assert same == {name for name in old if "_proj" not in name}


def test_the_verb_prints_its_proof_and_keeps_what_belongs_to_the_model(
    base: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    adapter = write(base, tmp_path / "adapter")
    assert main(["merge", str(adapter), str(tmp_path / "merged"), "--json"]) == 0
    told = json.loads(capsys.readouterr().out)
    assert told["max_logit_difference"] <= told["allowed_logit_difference"] and told["base"] == str(base)
    assert set(told["checks"]) >= {"weights", "config", "tokenizer", "logits", "base", "generation_config"}
    for name in ("tokenizer.json", "generation_config.json"):
        assert (tmp_path / "merged" / name).read_bytes() == (base / name).read_bytes()
    assert not [line for line in told["differences"] if "rope" in line or line.startswith("tokenizer.json")]


def test_a_merge_that_is_not_the_adapter_leaves_no_folder(
    base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    adapter = write(base, tmp_path / "adapter")

    def nothing(decoder: torch.nn.Module) -> None:
        for linear in adapters(decoder).values():
            linear.adapter = None

    monkeypatch.setattr(module, "merge_in_place", nothing)
    with pytest.raises(UserError, match="the merged model is its base"):
        merge(Merge(model=str(adapter), out=str(tmp_path / "merged")))

    def half(decoder: torch.nn.Module) -> None:
        for linear in adapters(decoder).values():
            linear.weight.data.copy_((linear.weight + linear.merged()) / 2)
            linear.adapter = None

    monkeypatch.setattr(module, "merge_in_place", half)
    with pytest.raises(UserError, match="is not the adapter beside its model: logits differ"):
        merge(Merge(model=str(adapter), out=str(tmp_path / "merged")))
    assert sorted(path.name for path in tmp_path.iterdir()) == ["adapter", "base"]


def test_an_adapter_that_rounding_takes_away_is_refused_and_one_that_learned_nothing_is_the_base(
    base: Path, tmp_path: Path
) -> None:
    adapter = write(base, tmp_path / "small", size=1e-12)
    with pytest.raises(UserError, match="in bfloat16 the merged model is its base"):
        merge(Merge(model=str(adapter), out=str(tmp_path / "merged"), precision="bfloat16"))
    adapter = write(base, tmp_path / "nothing", size=0.0)
    told = merge(Merge(model=str(adapter), out=str(tmp_path / "merged")))
    assert told.changed == 0 and told.base_logit_difference == 0.0 and told.max_logit_difference == 0.0


def test_what_belongs_to_the_tokenizer_is_compared_with_the_base_and_told(base: Path, tmp_path: Path) -> None:
    adapter = write(base, tmp_path / "adapter")
    load_tokenizer(base).save(adapter)
    (adapter / "chat_template.jinja").write_text("{{ messages[0].content }}")
    told = merge(Merge(model=str(adapter), out=str(tmp_path / "merged")))
    assert "chat_template.jinja: the base has none" in told.differences
    assert (tmp_path / "merged" / "chat_template.jinja").read_text() == "{{ messages[0].content }}"


def test_a_whole_model_has_nothing_to_merge_and_an_adapter_is_no_export(base: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no adapter to merge"):
        merge(Merge(model=str(base), out=str(tmp_path / "merged")))
    adapter = write(base, tmp_path / "adapter")
    with pytest.raises(UserError, match=f"llmtrainer merge {adapter} out="):
        export(Export(model=str(adapter), out=str(tmp_path / "exported")))


@pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::UserWarning")
def test_transformers_reads_a_merged_folder_and_answers_the_same(base: Path, tmp_path: Path) -> None:
    pytest.importorskip("transformers")
    adapter = write(base, tmp_path / "adapter", "dora")
    told = merge(Merge(model=str(adapter), out=str(tmp_path / "merged"), check=True))
    assert {"AutoTokenizer", "greedy text"} <= set(told.checks)


def test_a_gated_mixture_is_exported_as_an_adapter_for_every_combination_and_is_no_merge(
    base: Path, tmp_path: Path
) -> None:
    policy = load_policy(base)
    GatedLora(rank=2).insert(policy)
    initialise(policy, 4)
    write_adapter(adapter_tensors(policy), adapter_config(policy, str(base)), tmp_path / "gated")
    told = export(Export(model=str(tmp_path / "gated"), out=str(tmp_path / "out")))
    assert "16 adapters" in told.text() and f'from_pretrained("{tmp_path / "out" / "t0a0"}")' in told.text()
    assert len(told.files) == 16 and sorted(path.name for path in (tmp_path / "out").iterdir()) == told.files
    assert merge(Merge(model=str(tmp_path / "out" / "t1a3"), out=str(tmp_path / "one"))).changed == 0
    with pytest.raises(UserError, match="which adapters it goes through"):
        merge(Merge(model=str(tmp_path / "gated"), out=str(tmp_path / "merged")))


def test_a_run_that_has_no_checkpoint_and_a_folder_without_a_model_are_called_what_they_are(tmp_path: Path) -> None:
    for name, file in (("refused", "events.jsonl"), ("text", "readme.txt")):
        (tmp_path / name).mkdir()
        (tmp_path / name / file).write_text("")
    with pytest.raises(UserError, match="no checkpoint in this run"):
        merge(Merge(model=str(tmp_path / "refused"), out=str(tmp_path / "out")))
    for name, why in (("text", "no config.json"), ("nowhere", "no such folder")):
        with pytest.raises(UserError, match="no model") as error:
            merge(Merge(model=str(tmp_path / name), out=str(tmp_path / "out")))
        assert why in str(error.value.why)
