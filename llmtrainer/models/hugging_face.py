"""A family's shape as a Hugging Face config.json, and back."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from pydantic import ValidationError
from torch import Tensor

from llmtrainer.base.errors import UserError
from llmtrainer.base.refusal import refusal
from llmtrainer.models.families.llama import Llama
from llmtrainer.models.rotary import RopeScaling

READABLE = ("llama", "mistral", "qwen2", "qwen3")
"""Values of `model_type` whose weights a Llama family can hold."""

OWN = "llmtrainer"
"""The key of our own fields, and the `model_type` of what no class of transformers computes."""

_CLASS_DEFAULTS: dict[str, dict[str, Any]] = {
    "llama": {"max_position_embeddings": 2048},
    "mistral": {"max_position_embeddings": 131_072, "num_key_value_heads": 8, "sliding_window": 4096},
    "qwen2": {"max_position_embeddings": 32_768, "num_key_value_heads": 32, "sliding_window": 4096},
    "qwen3": {
        "max_position_embeddings": 32_768, "num_key_value_heads": 32, "sliding_window": 4096, "head_dim": 128
    },
}  # fmt: skip
"""What transformers' classes take for a key that a config.json does not have, where it is not null."""

_ROPE_KEYS = {
    "default": (),
    "linear": (),
    "dynamic": (),
    "llama3": ("low_freq_factor", "high_freq_factor"),
    "yarn": ("beta_fast", "beta_slow", "attention_factor", "mscale", "mscale_all_dim", "truncate"),
}
"""Settings of each `rope_type` besides factor and original_max_position_embeddings, which have the same names here."""


def to_config(
    family: Llama, vocabulary: int, *, end: int | None = None, pad: int | None = None, dtype: str = "float32",
    tokenizer_class: str | None = None,
) -> dict[str, Any]:  # fmt: skip
    """What transformers needs to build the same function, and the family's own fields under `llmtrainer`.

    Where no class of transformers computes the same (a partial rotary, say), `model_type` is `llmtrainer`: nobody
    then loads it as something it is not. `dtype` is that of the saved weights. `tokenizer_class` is what the
    tokenizer_config.json beside it says: `model_type` is only `qwen2` beside Qwen2's own tokenizer, because
    transformers 5 splits every text beside a qwen2 as Qwen2 does, whatever tokenizer lies there.
    """
    model_type, architecture = _class_of(family, qwen2=(tokenizer_class or "").startswith("Qwen2Tokenizer"))
    scaling = family.rope_scaling
    config: dict[str, Any] = {
        "architectures": [architecture] if architecture else [],
        "model_type": model_type,
        "vocab_size": vocabulary,
        "hidden_size": family.hidden_size,
        "intermediate_size": family.mlp_size,
        "num_hidden_layers": family.layers,
        "num_attention_heads": family.heads,
        "num_key_value_heads": family.kv_heads or family.heads,
        "head_dim": family.channels,
        "hidden_act": "silu",
        # A dynamic base grows from this number on; what the model may read is then factor times as much.
        "max_position_embeddings": (scaling and scaling.grows_beyond) or family.context_length,
        "rms_norm_eps": family.norm_epsilon,
        "initializer_range": family.init_std,
        "tie_word_embeddings": family.tied_head,
        # The names of transformers 4, which 5 and every other library read too.
        "rope_theta": family.rope_theta,
        "rope_scaling": _rope_to_config(scaling),
        "attention_bias": family.attention_bias,
        "mlp_bias": family.mlp_bias,
        "attention_dropout": 0.0,
        "sliding_window": family.sliding_window,
        # The classes' own defaults would be wrong ids.
        "bos_token_id": None,
        "eos_token_id": end,
        "pad_token_id": pad,
        "torch_dtype": dtype,
        OWN: family.model_dump(mode="json"),
    }
    if family.head is not None and family.head.instead:
        config |= _one_label(architecture, None if pad == end else pad)
    if model_type == OWN:
        del config["rope_scaling"]      # transformers warns about it where no class takes it
    if model_type in ("qwen2", "qwen3") and family.sliding_window is not None:
        config |= {
            "use_sliding_window": True, "max_window_layers": 0, "layer_types": ["sliding_attention"] * family.layers
        }
    return config


_WORDED, _LABELLED = "ForCausalLM", "ForSequenceClassification"


def _one_label(architecture: str | None, pad: int | None) -> dict[str, Any]:
    """What a config says of a model that gives one number. Its class of transformers reads that behind the last token
    that is no padding: where texts end in the padding's id, it must be told of none, and then reads one at a time."""
    return {
        "architectures": [architecture.replace(_WORDED, _LABELLED)] if architecture else [],
        "id2label": {"0": "LABEL_0"}, "label2id": {"LABEL_0": 0}, "pad_token_id": pad,
    }  # fmt: skip


def _head_of(config: Mapping[str, Any], where: str) -> dict[str, Any] | None:
    """The head that a config of transformers describes, besides the vocabulary's."""
    named = config.get("architectures") or ()
    if not any(str(name).endswith(_LABELLED) for name in named):
        return None
    labels = len(config.get("id2label") or ()) or config.get("num_labels", 2)
    _refuse(where, "num_labels", labels, 1)
    return {"kind": "score"}


def zero_biases(named: Mapping[str, Tensor], config: Mapping[str, Any]) -> dict[str, Tensor]:
    """The biases that the class a config names has and the model has not, by name: zeros change nothing."""
    if config["model_type"] not in ("llama", "qwen3"):
        return {}
    zeros = {}
    for name in named:
        other = name.replace("q_proj.bias", "o_proj.bias")
        if other != name and other not in named:
            matrix = named[other.replace("bias", "weight")]
            zeros[other] = torch.zeros(matrix.shape[0], dtype=matrix.dtype)
    return zeros


def _class_of(family: Llama, *, qwen2: bool) -> tuple[str, str | None]:
    # These classes have one switch for the biases of all four matrices; one that is missing is saved as zeros.
    all_biases = family.attention_bias or not family.output_bias
    if family.rotary_share != 1.0:
        return OWN, None
    if family.query_key_norm:
        return ("qwen3", "Qwen3ForCausalLM") if all_biases and not family.mlp_bias else (OWN, None)
    if qwen2 and family.attention_bias and not family.output_bias and not family.mlp_bias:
        return "qwen2", "Qwen2ForCausalLM"
    if family.sliding_window is None and all_biases:
        return "llama", "LlamaForCausalLM"
    if not (family.attention_bias or family.output_bias or family.mlp_bias):
        return "mistral", "MistralForCausalLM"
    return OWN, None


def _rope_to_config(scaling: RopeScaling | None) -> dict[str, Any] | None:
    if scaling is None:
        return None
    fields = {key: value for key, value in scaling.model_dump(mode="json").items() if value is not None}
    kind, original = fields.pop("kind"), fields.pop("original_context", None)
    if original is not None and scaling.grows_beyond is None:
        fields["original_max_position_embeddings"] = original
    return {"rope_type": kind, **fields}


def from_config(config: Mapping[str, Any], where: str) -> tuple[Llama, int]:
    """The family and the vocabulary of a config.json. What we would compute differently is refused by name."""
    model_type, own = config.get("model_type"), config.get(OWN)
    if model_type not in READABLE and own is None:
        raise UserError(
            f"model_type `{model_type}` is no family of ours",
            where=where, why=f"these can be read: {', '.join(READABLE)}", fix="choose a model of one of these types",
        )
    vocabulary = _required(config, "vocab_size", where)
    ours = _family(own, where) if own is not None else None
    if model_type not in READABLE:
        assert ours is not None
        return ours, vocabulary
    theirs = _family(_fields(config, where), where)
    if ours is not None:
        _require_same(ours, theirs, where)
    return ours or theirs, vocabulary


def _fields(config: Mapping[str, Any], where: str) -> dict[str, Any]:
    """The family's fields, from the keys of transformers."""
    model_type = config["model_type"]
    given = {**_CLASS_DEFAULTS[model_type], **config}
    _refuse(where, "hidden_act", given.get("hidden_act", "silu"), "silu")
    _refuse(where, "quantization_config", given.get("quantization_config"), None)
    heads, hidden_size = _required(config, "num_attention_heads", where), _required(config, "hidden_size", where)
    bias = bool(given.get("attention_bias", False))
    longest = int(given["max_position_embeddings"])
    theta, scaling, reach = _rope(given, longest, where)
    return {
        "hidden_size": hidden_size,
        "layers": _required(config, "num_hidden_layers", where),
        "heads": heads,
        "kv_heads": given.get("num_key_value_heads") or heads,
        "head_size": given.get("head_dim") or hidden_size // heads,
        "intermediate_size": _required(config, "intermediate_size", where),
        "context_length": max(longest, reach),
        "rope_theta": theta,
        "rope_scaling": scaling,
        "norm_epsilon": float(given.get("rms_norm_eps", 1e-6)),
        "tied_head": bool(given.get("tie_word_embeddings", False)),
        "query_key_norm": model_type == "qwen3",
        "attention_bias": model_type == "qwen2" or (model_type != "mistral" and bias),
        "output_bias": model_type in ("llama", "qwen3") and bias,
        "mlp_bias": model_type == "llama" and bool(given.get("mlp_bias", False)),
        "sliding_window": _window(given, where),
        "init_std": float(given.get("initializer_range") or 0.02),
        "head": _head_of(config, where),
    }


def _rope(given: Mapping[str, Any], longest: int, where: str) -> tuple[float, dict[str, Any] | None, int]:
    """theta, the fields of the scaling, and the tokens that the scaling is said to reach.

    transformers 4 writes `rope_theta` and `rope_scaling`, transformers 5 `rope_parameters`; where a file has both,
    transformers takes the older, and so do we.
    """
    rope = dict(given.get("rope_scaling") or given.get("rope_parameters") or {})
    theta = float(rope.pop("rope_theta", None) or given.get("rope_theta") or 10_000.0)
    told, older = rope.pop("rope_type", None), rope.pop("type", None)
    kind = str(told or older or "default")
    partial = rope.pop("partial_rotary_factor", None) or given.get("partial_rotary_factor")
    _refuse(where, "partial_rotary_factor", 1.0 if partial is None else partial, 1.0)
    if kind not in _ROPE_KEYS or any(isinstance(value, dict) for value in rope.values()):
        raise UserError(
            f"rope_type `{kind}` cannot be computed here" if kind not in _ROPE_KEYS
            else "each kind of layer has rotary positions of its own",
            where=where, why=f"there are: {', '.join(_ROPE_KEYS)}, one for all layers", fix="choose another model",
        )  # fmt: skip
    rope = {key: value for key, value in rope.items() if value is not None and key != "finetuned"}
    original = int(rope.pop("original_max_position_embeddings", None) or longest)
    if kind == "default":
        _require_no_more(rope, kind, where)
        return theta, None, 0
    if kind == "dynamic":
        # The class of transformers grows the base from here on, whatever the other key says.
        _refuse(where, "original_max_position_embeddings", original, longest)
    # Only YaRN's class works a missing factor out.
    factor = rope.pop("factor", longest / original if kind == "yarn" else None)
    if not isinstance(factor, int | float):
        _refuse(where, f"`factor` of rope_type `{kind}`", factor, "a number")
    scaling: dict[str, Any] = {"kind": kind, "factor": float(factor)}
    if kind != "linear":
        scaling["original_context"] = original
    scaling |= {key: _number(rope.pop(key)) for key in _ROPE_KEYS[kind] if key in rope}
    if "attention_factor" in scaling or not (scaling.get("mscale") and scaling.get("mscale_all_dim")):
        # An explicit attention factor replaces them, and so does one of them that is missing or 0.
        scaling = {key: value for key, value in scaling.items() if not key.startswith("mscale")}
    _require_no_more(rope, kind, where)
    # Linear scaling is told both with the old context and with the new one, so nothing follows from it.
    return theta, scaling, round(scaling["factor"] * original) if kind in ("dynamic", "yarn") else 0


def _number(value: Any) -> Any:
    return float(value) if isinstance(value, int) and not isinstance(value, bool) else value


def _require_no_more(rope: Mapping[str, Any], kind: str, where: str) -> None:
    if rope:
        raise UserError(
            f"rope_type `{kind}` has a setting `{next(iter(rope))}`, which nothing here computes",
            where=where, why="another function under the same weights would be another model",
            fix="remove it if it means nothing, or choose another model",
        )


def _family(fields: Mapping[str, Any], where: str) -> Llama:
    try:
        return Llama.model_validate(dict(fields))
    except ValidationError as error:
        told = refusal(error, Llama, fields, {})
        raise UserError(
            told.what, where=where, why=told.why or "no model can have this shape", fix="save the model again"
        ) from None


def _require_same(ours: Llama, theirs: Llama, where: str) -> None:
    """Refuse a file whose two descriptions differ: someone changed one of them."""
    pairs = {
        "hidden_size": (ours.hidden_size, theirs.hidden_size),
        "num_hidden_layers": (ours.layers, theirs.layers),
        "num_attention_heads": (ours.heads, theirs.heads),
        "num_key_value_heads": (ours.kv_heads or ours.heads, theirs.kv_heads or theirs.heads),
        "head_dim": (ours.channels, theirs.channels),
        "intermediate_size": (ours.mlp_size, theirs.mlp_size),
        "rms_norm_eps": (ours.norm_epsilon, theirs.norm_epsilon),
        "rope_theta": (ours.rope_theta, theirs.rope_theta),
        "rope_scaling": (ours.rope_scaling, theirs.rope_scaling),
        "tie_word_embeddings": (ours.tied_head, theirs.tied_head),
        "sliding_window": (ours.sliding_window, theirs.sliding_window),
    }
    for key, (one, other) in pairs.items():
        if one != other:
            raise UserError(
                f"{key} is {_rope_or(other)}, and {_rope_or(one)} under `{OWN}`",
                where=where, why="one of the two was changed after the file was written",
                fix=f"remove `{OWN}` from the file if the other keys are right",
            )


def _rope_or(value: object) -> object:
    return value.model_dump(mode="json") if isinstance(value, RopeScaling) else value


def _window(given: Mapping[str, Any], where: str) -> int | None:
    window = given.get("sliding_window")
    if given["model_type"] == "llama" or not window:
        return None
    if given["model_type"] == "mistral":
        # Its class gives every layer the window; a file that says otherwise means another class.
        kinds = {"sliding_attention", *(given.get("layer_types") or ())}
    elif not given.get("use_sliding_window", False):
        return None
    else:
        layers = int(given["num_hidden_layers"])
        first = int(given.get("max_window_layers", 28))
        kinds = set(given.get("layer_types") or ()) or {
            "sliding_attention" if layer >= first else "full_attention" for layer in range(layers)
        }
    if len(kinds) > 1:
        raise UserError(
            "some layers have a sliding window and some have none", where=where,
            why="a family here has one window for all layers",
            fix=f'"use_sliding_window": false, if no text is longer than {window:,} tokens; or another model',
        )
    return int(window) if kinds == {"sliding_attention"} else None


def _required(config: Mapping[str, Any], key: str, where: str) -> int:
    value = config.get(key)
    if not isinstance(value, int) or value <= 0:
        raise UserError(
            f"`{key}` is {'missing' if value is None else repr(value)}", where=where,
            why="the shape of the model cannot be known without it", fix="copy the model's config.json again",
        )
    return value


def _refuse(where: str, key: str, found: object, wanted: object) -> None:
    if found != wanted:
        raise UserError(
            f"{key} is {found!r}, and only {wanted!r} is computed here",
            where=where, why="another function under the same weights would be another model",
            fix="choose another model",
        )
