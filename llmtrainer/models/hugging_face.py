"""A family's shape as a Hugging Face config.json, and back."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from llmtrainer.base.errors import UserError
from llmtrainer.models.families.llama import Llama

READABLE = ("llama", "mistral", "qwen2", "qwen3")
"""Values of `model_type` whose weights a Llama family can hold."""


def to_config(family: Llama, vocabulary: int, *, end: int | None = None, pad: int | None = None) -> dict[str, Any]:
    """What transformers needs to build the same function, and the family's own fields under `llmtrainer`.

    Where no class of transformers computes the same (a partial rotary, say), `model_type` is `llmtrainer`:
    nobody then loads it as something it is not.
    """
    model_type, architecture = _class_of(family)
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
        "max_position_embeddings": family.context_length,
        "rms_norm_eps": family.norm_epsilon,
        "initializer_range": family.init_std,
        "tie_word_embeddings": family.tied_head,
        "rope_theta": family.rope_theta,
        "rope_scaling": None,
        "attention_bias": family.attention_bias,
        "mlp_bias": family.mlp_bias,
        "attention_dropout": 0.0,
        "sliding_window": family.sliding_window,
        # The classes' own defaults would be wrong ids.
        "bos_token_id": None,
        "eos_token_id": end,
        "pad_token_id": pad,
        "torch_dtype": "float32",
        "llmtrainer": family.model_dump(mode="json"),
    }
    if model_type in ("qwen2", "qwen3") and family.sliding_window is not None:
        config |= {
            "use_sliding_window": True, "max_window_layers": 0, "layer_types": ["sliding_attention"] * family.layers
        }
    return config


def _class_of(family: Llama) -> tuple[str, str | None]:
    plain_bias = family.attention_bias == family.output_bias
    if family.rotary_share == 1.0:
        if family.query_key_norm:
            if plain_bias and not family.mlp_bias:
                return "qwen3", "Qwen3ForCausalLM"
        elif family.sliding_window is None and plain_bias:
            return "llama", "LlamaForCausalLM"
        elif not (family.attention_bias or family.output_bias or family.mlp_bias):
            return "mistral", "MistralForCausalLM"
        elif family.attention_bias and not family.output_bias and not family.mlp_bias:
            return "qwen2", "Qwen2ForCausalLM"
    return "llmtrainer", None


def from_config(config: Mapping[str, Any], where: str) -> tuple[Llama, int]:
    """The family and the vocabulary of a config.json. What we would compute differently is refused by name."""
    own = config.get("llmtrainer")
    if own is not None:
        return Llama.model_validate(own), int(config["vocab_size"])
    model_type = config.get("model_type")
    if model_type not in READABLE:
        raise UserError(
            f"model_type `{model_type}` is no family of ours",
            where=where, why=f"these can be read: {', '.join(READABLE)}", fix="choose a model of one of these types",
        )
    rope = config.get("rope_parameters") or config.get("rope_scaling") or {}
    _refuse(where, "hidden_act", config.get("hidden_act", "silu"), "silu")
    _refuse(where, "rope_type", rope.get("rope_type") or rope.get("type") or "default", "default")
    _refuse(where, "partial_rotary_factor", rope.get("partial_rotary_factor", 1.0), 1.0)
    heads, hidden_size = int(config["num_attention_heads"]), int(config["hidden_size"])
    bias = bool(config.get("attention_bias", False))
    return Llama(
        hidden_size=hidden_size,
        layers=config["num_hidden_layers"],
        heads=heads,
        kv_heads=config.get("num_key_value_heads"),
        head_size=config.get("head_dim") or hidden_size // heads,
        intermediate_size=config["intermediate_size"],
        context_length=config["max_position_embeddings"],
        rope_theta=float(rope.get("rope_theta") or config.get("rope_theta") or 10_000.0),
        norm_epsilon=config["rms_norm_eps"],
        tied_head=bool(config.get("tie_word_embeddings", False)),
        query_key_norm=model_type == "qwen3",
        attention_bias=model_type == "qwen2" or (model_type != "mistral" and bias),
        output_bias=model_type in ("llama", "qwen3") and bias,
        mlp_bias=model_type == "llama" and bool(config.get("mlp_bias", False)),
        sliding_window=_window(config, where),
        init_std=config.get("initializer_range", 0.02),
    ), int(config["vocab_size"])


def _window(config: Mapping[str, Any], where: str) -> int | None:
    window = config.get("sliding_window")
    if config["model_type"] == "llama" or not window:
        return None
    if config["model_type"] == "mistral":
        return int(window)
    if not config.get("use_sliding_window", False):
        return None
    kinds = set(config.get("layer_types") or ())
    if not kinds:
        first_windowed = int(config.get("max_window_layers", 28))
        layers = int(config["num_hidden_layers"])
        kinds = {"sliding_attention"} if first_windowed == 0 else {"full_attention"}
        kinds |= {"sliding_attention"} if first_windowed < layers else set()
    if len(kinds) > 1:
        raise UserError("some layers have a sliding window and some have none", where=where,
                        why="a family here has one window for all layers", fix="choose another model")
    return int(window) if kinds == {"sliding_attention"} else None


def _refuse(where: str, key: str, found: object, wanted: object) -> None:
    if found != wanted:
        raise UserError(
            f"{key} is {found!r}, and only {wanted!r} is computed here",
            where=where, why="another function under the same weights would be another model",
            fix="choose another model",
        )
