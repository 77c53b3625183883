"""transformers' own classes, tiny and exact, to hold ours against."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.models import rope

ARCHITECTURES = {
    "llama": "LlamaForCausalLM", "mistral": "MistralForCausalLM", "qwen2": "Qwen2ForCausalLM",
    "qwen3": "Qwen3ForCausalLM",
}  # fmt: skip


def in_float64(model: Any, scaling: dict[str, Any] | None = None) -> Any:
    """Replace the library's float32 angles and norms by float64 ones: the formula is the oracle, not its
    rounding. `scaling` is in our words."""
    for norm in [module for module in model.modules() if type(module).__name__.endswith("RMSNorm")]:
        norm.forward = partial(_rms_norm, norm)
    rotary = model.model.rotary_emb
    size, theta = rotary.inv_freq.numel() * 2, model.config.rope_parameters["rope_theta"]

    def forward(x: torch.Tensor, position_ids: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        pair = rope.table(position_ids.numpy(), size, theta, scaling, int(position_ids.max()) + 1)
        cos, sin = (torch.from_numpy(part).repeat(1, 1, 2).to(x.dtype) for part in pair)
        return cos, sin

    rotary.forward = forward
    return model.eval()


def _rms_norm(norm: Any, x: torch.Tensor) -> torch.Tensor:
    return torch.nn.functional.rms_norm(x, (x.shape[-1],), norm.weight, norm.variance_epsilon)


def loaded(folder: Path, architecture: str, scaling: dict[str, Any] | None = None) -> Any:
    """What transformers makes of a folder, in float64."""
    transformers = pytest.importorskip("transformers")
    # Its eager attention would take the softmax in float32.
    model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float64, attn_implementation="sdpa")
    assert type(model).__name__ == architecture
    return in_float64(model, scaling)


def rope_parameters(scaling: dict[str, Any] | None, theta: float) -> dict[str, Any]:
    """Our words for a scaling in those of transformers."""
    names = {"kind": "rope_type", "original_context": "original_max_position_embeddings"}
    told = {names.get(key, key): value for key, value in (scaling or {"kind": "default"}).items()}
    if told["rope_type"] == "dynamic":
        del told["original_max_position_embeddings"]    # it is the model's max_position_embeddings
    if told["rope_type"] == "llama3":
        told = {"low_freq_factor": 1.0, "high_freq_factor": 4.0, **told}
    return {**told, "rope_theta": theta}


def tiny(model_type: str, scaling: dict[str, Any] | None = None, seed: int = 0, **changes: Any) -> Any:
    """A model of 2 layers with random weights, norms and biases unlike 1 and 0, in float64."""
    transformers = pytest.importorskip("transformers")
    dynamic = scaling is not None and scaling["kind"] == "dynamic"
    config = transformers.AutoConfig.for_model(model_type, **{
        "vocab_size": 320, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2,
        "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 8,
        "max_position_embeddings": scaling["original_context"] if dynamic and scaling else 64,
        "rope_parameters": rope_parameters(scaling, 500.0), "bos_token_id": None, "eos_token_id": 5, **changes,
    })  # fmt: skip
    model = getattr(transformers, ARCHITECTURES[model_type])(config).double()
    random = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(1.0 if parameter.ndim == 1 else 0.0, 0.2, generator=random)
    return in_float64(model, scaling)
