"""Weights on disk: our own layout is Hugging Face's, and what does not fit is refused by name."""

from __future__ import annotations

import hashlib
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file

from llmtrainer.base.errors import UserError
from llmtrainer.models.decoder import Decoder
from llmtrainer.models.families.llama import Llama
from llmtrainer.models.weights import freeze, load_policy, load_weights, save_weights, tensors
from tests.models.rows import rows
from tests.models.test_decoder import TINY, decoder, logits
from tests.models.theirs import in_float64, loaded
from tests.tolerances import FLOAT64_LOGITS

FAMILIES: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("LlamaForCausalLM", dict(rope_theta=500.0)),
    "llama, tied": ("LlamaForCausalLM", dict(tied_head=True, head_size=12)),
    "llama, biases": ("LlamaForCausalLM", dict(attention_bias=True, output_bias=True, mlp_bias=True)),
    "mistral": ("MistralForCausalLM", dict(sliding_window=5)),
    "qwen2": ("Qwen2ForCausalLM", dict(attention_bias=True)),
    "qwen2, window": ("Qwen2ForCausalLM", dict(attention_bias=True, sliding_window=5)),
    "qwen3": ("Qwen3ForCausalLM", dict(query_key_norm=True, head_size=12, tied_head=True)),
    "qwen3, window": ("Qwen3ForCausalLM", dict(query_key_norm=True, sliding_window=5)),
}


@pytest.mark.parametrize(("architecture", "fields"), FAMILIES.values(), ids=FAMILIES.keys())
def test_transformers_computes_the_same_logits_and_gradients_from_what_we_save(
    tmp_path: Path, architecture: str, fields: dict[str, Any]
) -> None:
    ours, batch = decoder(**fields), rows([[14], [14]])
    save_weights(ours, tmp_path, end=5, pad=6, tokenizer_class="Qwen2Tokenizer")
    other = loaded(tmp_path, architecture)
    assert (other.config.eos_token_id, other.config.pad_token_id, other.config.bos_token_id) == (5, 6, None)
    found = other(batch.tokens_BT).logits
    torch.testing.assert_close(logits(ours, batch), found, rtol=0, atol=FLOAT64_LOGITS)
    ours(batch, ("logp",)).logp_BT.sum().backward()
    found.log_softmax(-1).gather(-1, batch.targets_BT[..., None]).sum().backward()
    gradients = {name: parameter.grad for name, parameter in other.named_parameters()}
    assert set(gradients) == set(tensors(ours))
    for name, parameter in ours.named_parameters():
        torch.testing.assert_close(parameter.grad, gradients[name], rtol=0, atol=FLOAT64_LOGITS)


@pytest.mark.parametrize(("architecture", "fields"), FAMILIES.values(), ids=FAMILIES.keys())
def test_a_model_that_transformers_saved_loads_with_the_same_logits(
    tmp_path: Path, architecture: str, fields: dict[str, Any]
) -> None:
    ours, batch = decoder(**fields), rows([[14]])
    save_weights(ours, tmp_path / "ours", tokenizer_class="Qwen2Tokenizer")
    loaded(tmp_path / "ours", architecture).save_pretrained(tmp_path / "theirs")
    config = json.loads((tmp_path / "theirs/config.json").read_text())
    config.pop("llmtrainer")
    (tmp_path / "theirs/config.json").write_text(json.dumps(config))
    again = load_policy(tmp_path / "theirs", torch.float64)
    torch.testing.assert_close(logits(again, batch), logits(ours, batch), rtol=0, atol=FLOAT64_LOGITS)


def test_the_library_s_own_fresh_model_loads_with_the_same_logits(tmp_path: Path) -> None:
    transformers = pytest.importorskip("transformers")
    config = transformers.LlamaConfig(
        vocab_size=96, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=64,
    )
    torch.manual_seed(0)
    other = transformers.LlamaForCausalLM(config).double().eval()
    in_float64(other)
    other.save_pretrained(tmp_path)
    batch = rows([[20], [20]], vocabulary=96)
    again = load_policy(tmp_path, torch.float64)
    torch.testing.assert_close(logits(again, batch), other(batch.tokens_BT).logits, rtol=0, atol=FLOAT64_LOGITS)


@pytest.mark.parametrize("fields", [{}, dict(rotary_share=0.5, dropout=0.1, tied_head=True)])
def test_saved_weights_load_bitwise_in_a_new_process(tmp_path: Path, fields: dict[str, Any]) -> None:
    model, batch = decoder(compute=torch.bfloat16, **fields), rows([[14]])
    save_weights(model, tmp_path)
    loaded = load_policy(tmp_path, torch.bfloat16)
    assert loaded.family == model.family and loaded.vocabulary == 320
    for name, value in tensors(model).items():
        assert torch.equal(tensors(loaded)[name], value)
    assert torch.equal(logits(loaded, batch), logits(model, batch))
    script = (
        "import sys, torch; torch.set_num_threads(1)\n"
        "from pathlib import Path\n"
        "from llmtrainer.models.weights import load_policy\n"
        "from tests.models.rows import rows\n"
        "m = load_policy(Path(sys.argv[1]), torch.bfloat16)\n"
        "x = m.hidden(rows([[14]])) @ m.head_weight.to(torch.bfloat16).t()\n"
        "print(x.detach().float().numpy().tobytes().hex()[:4000])\n"
    )
    done = subprocess.run([sys.executable, "-c", script, str(tmp_path)], capture_output=True, text=True, check=True,
                          cwd=Path(__file__).parents[2], env={**os.environ, "PYTHONPATH": "."}, timeout=120)
    assert done.stdout.strip() == logits(model, batch).detach().float().numpy().tobytes().hex()[:4000]


def test_shards_have_an_index_and_load_like_one_file(tmp_path: Path) -> None:
    model = decoder(compute=torch.float32)
    save_weights(model, tmp_path / "one")
    files = save_weights(model, tmp_path / "many", shard_bytes=20_000)
    assert sum(file.suffix == ".safetensors" for file in files) > 3
    assert sorted(files) == sorted((tmp_path / "many").iterdir())
    index = json.loads((tmp_path / "many/model.safetensors.index.json").read_text())
    assert set(index["weight_map"]) == set(tensors(model))
    assert index["metadata"]["total_size"] == sum(value.nbytes for value in tensors(model).values())
    for file in files:
        if file.suffix == ".safetensors" and len(load_file(file)) > 1:
            assert sum(value.nbytes for value in load_file(file).values()) <= 20_000
    one, many = load_policy(tmp_path / "one"), load_policy(tmp_path / "many")
    for name, value in tensors(one).items():
        assert torch.equal(value, tensors(many)[name])


def test_of_one_file_and_an_index_the_one_file_is_read_as_transformers_does(tmp_path: Path) -> None:
    model, other = decoder(compute=torch.float32), decoder(compute=torch.float32)
    with torch.no_grad():
        other.model.norm.weight.mul_(2.0)
    save_weights(model, tmp_path, shard_bytes=20_000)
    save_weights(other, tmp_path / "again")
    (tmp_path / "again/model.safetensors").rename(tmp_path / "model.safetensors")
    theirs = transformers.AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float32)
    ours = tensors(load_policy(tmp_path))["model.norm.weight"]
    assert torch.equal(ours, theirs.model.norm.weight) and torch.equal(ours, other.model.norm.weight)


def test_the_bytes_are_a_function_of_the_weights(tmp_path: Path) -> None:
    digests = set()
    for folder in ("a", "b"):
        save_weights(decoder(tied_head=True), tmp_path / folder)
        digests.add(hashlib.sha256((tmp_path / folder / "model.safetensors").read_bytes()).hexdigest())
    assert len(digests) == 1


def test_a_tied_head_is_saved_once_and_its_copy_is_accepted_only_if_equal(tmp_path: Path) -> None:
    model = decoder(tied_head=True)
    save_weights(model, tmp_path)
    stored = load_file(tmp_path / "model.safetensors")
    assert "lm_head.weight" not in stored
    stored["lm_head.weight"] = stored["model.embed_tokens.weight"].clone()
    save_file(stored, tmp_path / "model.safetensors")
    load_policy(tmp_path, torch.float64)
    stored["lm_head.weight"][0, 0] += 1
    save_file(stored, tmp_path / "model.safetensors")
    with pytest.raises(UserError, match="tied"):
        load_policy(tmp_path, torch.float64)


PREFIXES = [("", ""), ("language_model.model.", "language_model."), ("model.language_model.", ""), ("a.model.", "a.")]


@pytest.mark.parametrize(("prefix", "outer"), PREFIXES)
@pytest.mark.parametrize("tied", [True, False], ids=["tied", "own head"])
def test_the_prefix_of_the_names_is_found(tmp_path: Path, prefix: str, outer: str, tied: bool) -> None:
    model, batch = decoder(tied_head=tied), rows([[9]])
    save_weights(model, tmp_path)
    stored = load_file(tmp_path / "model.safetensors")
    named = {
        outer + name if name.startswith("lm_head") else prefix + name.removeprefix("model."): value
        for name, value in stored.items()
    }
    assert named.keys() != stored.keys()
    save_file(named, tmp_path / "model.safetensors")
    assert torch.equal(logits(load_policy(tmp_path, torch.float64), batch), logits(model, batch))


def test_what_lies_beside_the_language_model_is_refused_by_name(tmp_path: Path) -> None:
    save_weights(decoder(), tmp_path)
    stored = {f"language_model.{name}": value for name, value in load_file(tmp_path / "model.safetensors").items()}
    save_file({**stored, "vision_tower.patch.weight": torch.zeros(2)}, tmp_path / "model.safetensors")
    with pytest.raises(UserError, match=r"unexpected: vision_tower\.patch\.weight"):
        load_policy(tmp_path)
    other = {f"draft.{name}": value.clone() for name, value in stored.items()}
    save_file({**stored, **other}, tmp_path / "model.safetensors")
    with pytest.raises(UserError, match="holds 2 models") as caught:
        load_policy(tmp_path)
    assert "`language_model.model.`" in str(caught.value) and "`draft.language_model.model.`" in str(caught.value)


def test_an_export_in_bfloat16_is_the_weights_rounded_once(tmp_path: Path) -> None:
    model = decoder(compute=torch.float32, attention_bias=True)
    save_weights(model, tmp_path / "whole")
    save_weights(model, tmp_path / "half", dtype=torch.bfloat16, shard_bytes=20_000)
    size = {name: sum(file.stat().st_size for file in (tmp_path / name).glob("*.safetensors")) for name in
            ("whole", "half")}
    assert size["half"] < 0.6 * size["whole"]
    told = {name: json.loads((tmp_path / name / "config.json").read_text())["torch_dtype"] for name in size}
    assert told == {"whole": "float32", "half": "bfloat16"}
    index = json.loads((tmp_path / "half/model.safetensors.index.json").read_text())
    for name, file in index["weight_map"].items():
        assert load_file(tmp_path / "half" / file)[name].dtype == torch.bfloat16
    again = load_policy(tmp_path / "half")
    for name, value in tensors(model).items():
        assert torch.equal(tensors(again)[name], value.bfloat16().float())
    transformers = pytest.importorskip("transformers")
    assert transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "half").dtype == torch.bfloat16


def test_a_bias_that_the_model_has_not_must_be_zero(tmp_path: Path) -> None:
    model = decoder(attention_bias=True)
    save_weights(model, tmp_path)
    stored = load_file(tmp_path / "model.safetensors")
    name = "model.layers.1.self_attn.o_proj.bias"
    assert name not in tensors(model) and not stored[name].any()
    load_weights(model, tmp_path)
    stored[name][3] = 1.0
    save_file(stored, tmp_path / "model.safetensors")
    before = {name: value.clone() for name, value in tensors(model).items()}
    with pytest.raises(UserError, match=r"layers\.1\.self_attn\.o_proj\.bias is not zero"):
        load_weights(model, tmp_path)
    assert all(torch.equal(value, before[name]) for name, value in tensors(model).items())


def test_quantised_weights_are_refused(tmp_path: Path) -> None:
    save_weights(decoder(), tmp_path)
    stored = load_file(tmp_path / "model.safetensors")
    stored["model.layers.0.mlp.up_proj.weight"] = stored["model.layers.0.mlp.up_proj.weight"].to(torch.float8_e4m3fn)
    save_file(stored, tmp_path / "model.safetensors")
    with pytest.raises(UserError, match="F8_E4M3"):
        load_policy(tmp_path)


def test_what_does_not_fit_is_listed_and_nothing_is_changed(tmp_path: Path) -> None:
    save_weights(decoder(layers=2), tmp_path)
    stored = load_file(tmp_path / "model.safetensors")
    del stored["model.norm.weight"]
    stored["model.extra.weight"] = torch.zeros(2)
    stored["lm_head.weight"] = torch.zeros(64, 32)
    save_file(stored, tmp_path / "model.safetensors")
    target = decoder(layers=2, seed=9)
    before = {name: value.clone() for name, value in tensors(target).items()}
    with pytest.raises(UserError) as caught:
        load_weights(target, tmp_path)
    text = str(caught.value)
    assert "missing: model.norm.weight [32]" in text and "unexpected: model.extra.weight [2]" in text
    assert "lm_head.weight is [64, 32], the model has [320, 32]" in text
    for name, value in tensors(target).items():
        assert torch.equal(value, before[name])


def test_folders_without_readable_weights_say_what_is_wrong(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no model"):
        load_policy(tmp_path)
    save_weights(decoder(compute=torch.float32), tmp_path)
    whole = (tmp_path / "model.safetensors").read_bytes()
    (tmp_path / "model.safetensors").write_bytes(whole[: len(whole) // 2])
    with pytest.raises(UserError, match="damaged"):
        load_policy(tmp_path)
    (tmp_path / "model.safetensors").rename(tmp_path / "pytorch_model.bin")
    with pytest.raises(UserError, match="pickles"):
        load_policy(tmp_path)
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(UserError, match="JSON"):
        load_policy(tmp_path)


@pytest.mark.parametrize("index", ["{", "[]", "{}", '{"weight_map": {"a": "../other/model.safetensors"}}'])
def test_an_index_that_names_no_files_of_the_folder_is_refused(tmp_path: Path, index: str) -> None:
    save_weights(decoder(), tmp_path)
    (tmp_path / "model.safetensors").unlink()
    (tmp_path / "model.safetensors.index.json").write_text(index)
    with pytest.raises(UserError, match=r"model\.safetensors\.index\.json"):
        load_policy(tmp_path)


def trained_names(model: Decoder) -> set[str]:
    """Names of the parameters that three steps of AdamW with decay change; the optimizer's state is theirs."""
    before = {name: value.clone() for name, value in tensors(model).items()}
    named = {p: n for n, p in model.named_parameters()}
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=0.1, weight_decay=0.1)
    for seed in range(3):
        (-model(rows([[9]], seed=seed), ("logp",)).logp_BT.sum()).backward()
        optimizer.step()
        optimizer.zero_grad()
    changed = {name for name, value in tensors(model).items() if not torch.equal(value, before[name])}
    assert {named[p] for p in optimizer.state} == changed
    return changed


@pytest.mark.parametrize(
    ("patterns", "trained"),
    [
        (["*", "!model.embed_tokens.*"], {"model.embed_tokens.weight"}),
        (["*", "!*.self_attn.k_proj.*"], {f"model.layers.{n}.self_attn.k_proj.weight" for n in (0, 1)}),
        (["*", "!lm_head.*", "!model.norm.weight"], {"lm_head.weight", "model.norm.weight"}),
    ],
)
def test_exactly_the_parameters_that_are_not_frozen_change(patterns: list[str], trained: set[str]) -> None:
    model = decoder(compute=torch.float32)
    frozen = freeze(model, patterns)
    assert set(frozen) == set(tensors(model)) - trained
    assert trained_names(model) == trained


def test_a_frozen_layer_in_the_middle_lets_gradients_through() -> None:
    model = Llama(**TINY).build(320)
    model.initialise(0)
    freeze(model, ["model.layers.1.*"])
    assert trained_names(model) == {name for name in tensors(model) if ".layers.1." not in name}


def test_a_pattern_that_matches_nothing_is_an_error_with_the_nearest_name() -> None:
    with pytest.raises(UserError, match=r"model\.embed_tokens\.weight"):
        freeze(decoder(), ["model.embed_token.weight"])
