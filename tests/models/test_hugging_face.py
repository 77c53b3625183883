"""Every family and every rotary scaling is the function that transformers computes, both ways, with gradients."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from llmtrainer.base.errors import UserError
from llmtrainer.models.decoder import Decoder
from llmtrainer.models.families.llama import Llama
from llmtrainer.models.hugging_face import from_config, to_config
from llmtrainer.models.rotary import RopeScaling
from llmtrainer.models.weights import load_policy, save_weights, tensors
from tests.models import rope, theirs
from tests.models.rows import rows
from tests.models.test_decoder import TINY, decoder, logits
from tests.tolerances import FLOAT32_FREQUENCY_RELATIVE, FLOAT64_LOGITS

SHAPES: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("llama", {}),
    "llama, as many key heads, tied": ("llama", dict(num_key_value_heads=4, tie_word_embeddings=True, head_dim=12)),
    "llama, one key head, biases": ("llama", dict(num_key_value_heads=1, attention_bias=True, mlp_bias=True)),
    "mistral": ("mistral", dict(sliding_window=5)),
    "mistral, no window, tied": ("mistral", dict(sliding_window=None, tie_word_embeddings=True)),
    "qwen2": ("qwen2", {}),
    "qwen2, window, tied": (
        "qwen2", dict(use_sliding_window=True, sliding_window=5, max_window_layers=0, tie_word_embeddings=True),
    ),
    "qwen3, tied": ("qwen3", dict(tie_word_embeddings=True, head_dim=12)),
    "qwen3, biases, as many key heads": ("qwen3", dict(attention_bias=True, num_key_value_heads=4)),
}  # fmt: skip
SCALINGS: dict[str, dict[str, Any] | None] = {"plain": None, **rope.KINDS}
CASES = [
    pytest.param(*SHAPES[shape], scaling, id=f"{shape}, {name}")
    for name, scaling in SCALINGS.items()
    for shape in (SHAPES if scaling is None else ("llama", "mistral", "qwen2", "qwen3, tied"))
]


def gradients(model: Any, logits_BTV: torch.Tensor, targets_BT: torch.Tensor) -> dict[str, torch.Tensor]:
    logits_BTV.log_softmax(-1).gather(-1, targets_BT[..., None]).sum().backward()
    return {name: parameter.grad for name, parameter in model.named_parameters()}


def require_equal(ours: Decoder, other: Any) -> None:
    """The same logits, and the same gradient of every parameter; 14 positions are beyond a context of 8."""
    batch = rows([[14], [14]])
    found = other(batch.tokens_BT).logits
    torch.testing.assert_close(logits(ours, batch), found, rtol=0, atol=FLOAT64_LOGITS)
    expected = gradients(other, found, batch.targets_BT)
    ours(batch, ("logp",)).logp_BT.sum().backward()
    for name, parameter in ours.named_parameters():
        torch.testing.assert_close(parameter.grad, expected.pop(name), rtol=0, atol=FLOAT64_LOGITS)
    assert all(name.endswith("o_proj.bias") and not ours.family.output_bias for name in expected)


@pytest.mark.parametrize(("model_type", "changes", "scaling"), CASES)
def test_a_model_of_transformers_is_the_same_function_here_and_back_there(
    tmp_path: Path, model_type: str, changes: dict[str, Any], scaling: dict[str, Any] | None
) -> None:
    other = theirs.tiny(model_type, scaling, **changes)
    other.save_pretrained(tmp_path / "theirs")
    ours = load_policy(tmp_path / "theirs", torch.float64)
    require_equal(ours, other)
    assert ours.context_length == (8 * 4 if scaling and scaling["kind"] == "dynamic" else reach(scaling))
    ours.zero_grad()
    save_weights(ours, tmp_path / "ours", end=5, tokenizer_class="Qwen2Tokenizer")
    # Without a window, a mistral is a llama by another name.
    same = model_type if model_type != "mistral" or changes.get("sliding_window", 4096) else "llama"
    back = theirs.loaded(tmp_path / "ours", theirs.ARCHITECTURES[same], scaling)
    require_equal(ours, back)
    assert (back.config.eos_token_id, back.config.pad_token_id, back.config.bos_token_id) == (5, None, None)
    # And what transformers saves of it, without a word of ours, is still the same.
    back.save_pretrained(tmp_path / "again")
    without_own_fields(tmp_path / "again")
    assert torch.equal(
        logits(load_policy(tmp_path / "again", torch.float64), rows([[14]])), logits(ours, rows([[14]]))
    )


def reach(scaling: dict[str, Any] | None) -> int:
    yarn = scaling is not None and scaling["kind"] == "yarn"
    return max(64, round(scaling["factor"] * scaling["original_context"])) if yarn and scaling else 64


def without_own_fields(folder: Path) -> None:
    config = json.loads((folder / "config.json").read_text())
    config.pop("llmtrainer")
    (folder / "config.json").write_text(json.dumps(config))


FIELDS: list[dict[str, Any]] = [
    {},
    dict(kv_heads=1, rope_theta=5e5, init_std=0.1, norm_epsilon=1e-6, context_length=77),
    dict(attention_bias=True, output_bias=True, mlp_bias=True, head_size=12),
    dict(sliding_window=5, tied_head=True),
    dict(query_key_norm=True, sliding_window=5),
    dict(query_key_norm=True, attention_bias=True, output_bias=True),
]


@pytest.mark.parametrize("fields", FIELDS)
@pytest.mark.parametrize("scaling", SCALINGS.values(), ids=SCALINGS.keys())
def test_a_family_is_read_back_from_its_config_with_and_without_our_own_words(
    fields: dict[str, Any], scaling: dict[str, Any] | None
) -> None:
    family = Llama.model_validate({**TINY, **fields, "rope_scaling": scaling})
    config = json.loads(json.dumps(to_config(family, 320)))
    assert from_config(config, "here") == (family, 320)
    config.pop("llmtrainer")
    read, vocabulary = from_config(config, "here")
    assert vocabulary == 320
    unspoken = {"kv_heads": family.kv_heads or family.heads, "head_size": family.channels}
    unspoken |= {"intermediate_size": family.mlp_size, "context_length": read.context_length}
    assert read == family.model_copy(update=unspoken)


@pytest.mark.parametrize("scaling", SCALINGS.values(), ids=SCALINGS.keys())
def test_files_of_transformers_4_and_5_say_the_same(scaling: dict[str, Any] | None) -> None:
    config = to_config(Llama.model_validate({**TINY, "rope_scaling": scaling}), 320)
    config.pop("llmtrainer")
    older = {**config, "rope_scaling": theirs.rope_parameters(scaling, 5e5), "rope_theta": 5e5}
    older["rope_scaling"].pop("rope_theta")
    if scaling is not None:     # as the first files had it
        older["rope_scaling"]["type"] = older["rope_scaling"].pop("rope_type")
    else:
        older["rope_scaling"] = None
    newer = {key: value for key, value in config.items() if key not in ("rope_theta", "rope_scaling")}
    newer["rope_parameters"] = theirs.rope_parameters(scaling, 5e5)
    read = from_config(older, "here")[0]
    assert read == from_config(newer, "here")[0] and read.rope_theta == 5e5
    assert read.rope_scaling == (None if scaling is None else RopeScaling.model_validate(scaling))


@pytest.mark.parametrize("model_type", theirs.ARCHITECTURES)
def test_what_a_config_leaves_out_is_what_the_class_takes(model_type: str) -> None:
    transformers = pytest.importorskip("transformers")
    whole = transformers.AutoConfig.for_model(model_type, hidden_size=4096, num_attention_heads=32).to_dict()
    named = ["model_type", "vocab_size", "hidden_size", "intermediate_size"]
    named += ["num_attention_heads", "num_hidden_layers"]
    assert from_config({key: whole[key] for key in named}, "here") == from_config(whole, "here")


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (dict(model_type="gpt2"), "gpt2"),
        (dict(hidden_act="gelu"), "hidden_act"),
        (dict(quantization_config={"quant_method": "fp8"}), "quantization_config"),
        (dict(num_hidden_layers=None), "num_hidden_layers"),
        (dict(num_key_value_heads=3), "share"),
        (dict(partial_rotary_factor=0.5), "partial_rotary"),
        (dict(rope_scaling=None, rope_parameters={"rope_theta": 1e4, "partial_rotary_factor": 0.5}), "partial_rotary"),
        (dict(rope_scaling={"rope_type": "longrope", "factor": 4.0}), "longrope"),
        (dict(rope_scaling={"type": "mrope", "mrope_section": [1, 2]}), "mrope"),
        (dict(rope_scaling={"rope_type": "yarn", "factor": 4.0, "extrapolation_factor": 2.0}), "extrapolation_factor"),
        (dict(rope_scaling={"rope_type": "default", "factor": 4.0}), "factor"),
        (dict(rope_scaling={"rope_type": "linear", "factor": 0.5}), "factor"),
        (dict(rope_scaling={"rope_type": "llama3"}), "factor"),
        (dict(rope_scaling={"type": "dynamic", "factor": 2.0, "original_max_position_embeddings": 9}), "is 9"),
        (dict(rope_scaling={"full_attention": {"rope_type": "default"}}), "each kind of layer"),
    ],
)
def test_a_model_that_would_be_computed_differently_is_refused_by_name(change: dict[str, Any], words: str) -> None:
    config = to_config(Llama(**TINY), 320)
    config.pop("llmtrainer")
    with pytest.raises(UserError, match=words) as caught:
        from_config({**config, **change}, "here/config.json")
    assert caught.value.where == "here/config.json" and caught.value.fix


@pytest.mark.parametrize(
    "change",
    [
        dict(model_type="qwen2", use_sliding_window=True, sliding_window=5, max_window_layers=1),
        dict(model_type="qwen3", use_sliding_window=True, sliding_window=5,
             layer_types=["sliding_attention", "full_attention"]),
        dict(model_type="mistral", sliding_window=5, layer_types=["full_attention", "full_attention"]),
    ],
    ids=lambda change: change["model_type"],
)  # fmt: skip
def test_layers_with_and_without_a_window_are_refused_by_name(change: dict[str, Any]) -> None:
    config = to_config(Llama(**TINY), 320)
    config.pop("llmtrainer")
    with pytest.raises(UserError, match="some layers have a sliding window"):
        from_config({**config, **change}, "here")
    off = {**config, **change, "use_sliding_window": False}
    if change["model_type"] != "mistral":
        assert from_config(off, "here")[0].sliding_window is None


@pytest.mark.parametrize(
    "told",
    [
        {"factor": None, "original_max_position_embeddings": 16},
        {"factor": 4.0, "original_max_position_embeddings": 16, "finetuned": True, "beta_fast": 32, "mscale": 0.7},
        {"factor": 4, "original_max_position_embeddings": 16, "attention_factor": 1.2, "mscale": 1.0,
         "mscale_all_dim": 2.0},
        {"factor": 4.0},
    ],
    ids=["factor worked out", "half of mscale", "mscale beside its result", "no original context"],
)  # fmt: skip
def test_settings_of_yarn_that_the_class_works_out_or_ignores_are_understood_alike(told: dict[str, Any]) -> None:
    transformers = pytest.importorskip("transformers")
    from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

    given = {"rope_type": "yarn", **told}
    told = {**given, "rope_theta": 500.0}
    config = {**to_config(Llama(**TINY), 320), "rope_scaling": None, "rope_parameters": told}
    config.pop("llmtrainer")
    scaling = from_config(config, "here")[0].rope_scaling
    assert scaling is not None
    whole = transformers.LlamaConfig(
        hidden_size=32, num_attention_heads=4, max_position_embeddings=64, rope_parameters=dict(told)
    )
    expected, magnitude = ROPE_INIT_FUNCTIONS["yarn"](whole)
    assert scaling.magnitude == pytest.approx(magnitude, rel=1e-12)
    torch.testing.assert_close(
        scaling.frequencies(8, 500.0, 1), expected.double(), rtol=FLOAT32_FREQUENCY_RELATIVE, atol=0.0
    )


def test_a_description_that_was_edited_in_one_place_is_refused() -> None:
    config = to_config(Llama(**TINY), 320)
    edited = {**config, "rope_scaling": {"rope_type": "yarn", "factor": 4.0}}
    with pytest.raises(UserError, match="rope_scaling"):
        from_config(edited, "here")
    edited.pop("llmtrainer")
    scaling = from_config(edited, "here")[0].rope_scaling
    assert scaling == RopeScaling.model_validate({"kind": "yarn", "factor": 4.0, "original_context": 64})


def test_what_no_class_of_transformers_computes_is_not_called_by_its_name(tmp_path: Path) -> None:
    for fields in (
        dict(rotary_share=0.5), dict(query_key_norm=True, mlp_bias=True), dict(output_bias=True),
        dict(attention_bias=True, sliding_window=5),
    ):  # fmt: skip
        save_weights(decoder(**fields), tmp_path)
        assert json.loads((tmp_path / "config.json").read_text())["model_type"] == "llmtrainer"
        load_policy(tmp_path, torch.float64)


@pytest.mark.parametrize("fields", [{}, dict(query_key_norm=True), dict(mlp_bias=True)], ids=str)
def test_a_bias_of_zeros_makes_a_class_fit_that_has_one_more(tmp_path: Path, fields: dict[str, Any]) -> None:
    ours = decoder(attention_bias=True, **fields)
    save_weights(ours, tmp_path)
    model_type = "qwen3" if "query_key_norm" in fields else "llama"
    require_equal(ours, theirs.loaded(tmp_path, theirs.ARCHITECTURES[model_type]))
    again = load_policy(tmp_path, torch.float64)
    assert again.family == ours.family and set(tensors(again)) == set(tensors(ours))
