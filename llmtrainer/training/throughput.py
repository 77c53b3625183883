"""How much a token costs, how much of the device that uses, and where the memory is."""

from __future__ import annotations

import re
import resource
import sys
from collections.abc import Iterable, Mapping
from fnmatch import fnmatchcase

import torch
from torch import Tensor, nn

from llmtrainer.models.decoder import Decoder
from llmtrainer.models.stored import Policy

LOOKUPS = ("*embed_tokens.weight",)
"""Names of tables that are read, not multiplied with."""

PEAKS: tuple[tuple[str, dict[str, float]], ...] = (
    # Dense FLOP per second from the maker's data sheets, without sparsity; float32 outside the tensor cores,
    # since float32 here is never TF32. A name counts where it stands as words in the device's own name, the
    # first one that does; what differs by form factor is listed by form factor or not at all.
    ("H200", {"float16": 989e12, "bfloat16": 989e12, "float32": 67e12, "float64": 67e12}),
    ("H100 PCIe", {"float16": 756e12, "bfloat16": 756e12, "float32": 51e12, "float64": 51e12}),
    ("H100 NVL", {"float16": 835e12, "bfloat16": 835e12, "float32": 60e12, "float64": 60e12}),
    ("H100", {"float16": 989e12, "bfloat16": 989e12, "float32": 67e12, "float64": 67e12}),
    ("A100", {"float16": 312e12, "bfloat16": 312e12, "float32": 19.5e12, "float64": 19.5e12}),
    ("A800", {"float16": 312e12, "bfloat16": 312e12, "float32": 19.5e12, "float64": 19.5e12}),
    ("A40", {"float16": 149.7e12, "bfloat16": 149.7e12, "float32": 37.4e12}),
    ("A10", {"float16": 125e12, "bfloat16": 125e12, "float32": 31.2e12}),
    ("L40S", {"float16": 362e12, "bfloat16": 362e12, "float32": 91.6e12}),
    ("L4", {"float16": 121e12, "bfloat16": 121e12, "float32": 30.3e12}),
    ("V100-SXM2", {"float16": 125e12, "float32": 15.7e12, "float64": 7.8e12}),
    ("T4", {"float16": 65e12, "float32": 8.1e12}),
)


def peak_flops(device: torch.device, precision: str, override: float | None = None) -> float | None:
    """FLOP per second of one device at its best, or None where nobody knows: no figure beats a wrong one."""
    if override is not None:
        return override
    return peak_of(torch.cuda.get_device_name(device), precision) if device.type == "cuda" else None


def peak_of(device_name: str, precision: str) -> float | None:
    """The table's figure for a device by the name it gives itself, such as `NVIDIA A100-SXM4-80GB`."""
    if re.search(r"\bMIG\b|Laptop|Max-Q", device_name):  # a slice, or a weaker namesake
        return None
    for name, peaks in PEAKS:
        if re.search(rf"\b{re.escape(name)}\b", device_name):
            return peaks.get(precision)
    return None


def multiplied_weights(parameters: Iterable[tuple[str, nn.Parameter]], *, tied_head: bool) -> int:
    """Weights that a token is multiplied with: all matrices, a tied head once. The input table of an untied
    head is only looked up, so it costs memory and no multiplication."""
    return sum(
        parameter.numel()
        for name, parameter in parameters
        if parameter.ndim >= 2 and (tied_head or not any(fnmatchcase(name, lookup) for lookup in LOOKUPS))
    )


def flops_per_token(policy: Policy, sequence_length: int) -> float:
    """Floating-point operations to train on one token: forward, input gradient and weight gradient.

    Two per weight and product, and for attention two products of width D over the causal half of T positions
    in each of L layers: 6 x weights + 6 x L x D x T. The tokens of both sequences of a preference pair are
    counted as tokens, so nothing is multiplied by a number of sequences.
    """
    if not isinstance(policy, Decoder):
        config = policy.model.config.get_text_config()
        weights = multiplied_weights(policy.named_parameters(), tied_head=bool(config.tie_word_embeddings))
        return 6.0 * weights + 6.0 * config.num_hidden_layers * config.hidden_size * sequence_length
    family = policy.family
    weights = multiplied_weights(policy.named_parameters(), tied_head=family.tied_head and policy.worded)
    return 6.0 * weights + 6.0 * family.layers * family.heads * family.channels * sequence_length


def palm_flops_per_token(parameters: int, layers: int, heads: int, head_size: int, sequence_length: int) -> float:
    """The same by the PaLM convention (arXiv:2204.02311, appendix B), for comparison with published figures:
    every parameter counts, vectors and tables too, and attention is not halved."""
    return 6.0 * parameters + 12.0 * layers * heads * head_size * sequence_length


def utilisation(tokens_per_second: float, flops_per_token: float, peak: float | None) -> float | None:
    """Model FLOPs utilisation, 0..1: useful operations over what all devices together could do. `peak` is the
    sum over devices; None if it is unknown."""
    return tokens_per_second * flops_per_token / peak if peak else None


def memory_report(policy: nn.Module, engine_state: Mapping[str, Tensor], device: torch.device) -> dict[str, int]:
    """Bytes of weights, of gradients (whether they exist at the moment or not) and of the engine's state, and
    the largest amount held so far."""
    parameters = list(policy.parameters())
    return {
        "parameters": sum(_size(parameter) for parameter in parameters),
        "gradients": sum(_size(parameter) for parameter in parameters if parameter.requires_grad),
        "optimizer": sum(_size(tensor) for tensor in engine_state.values()),
        "peak": peak_memory(device),
    }


def peak_memory(device: torch.device) -> int:
    """Largest amount of memory so far in bytes: of the device for CUDA, else of the process."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    largest = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return largest if sys.platform == "darwin" else largest * 1024  # Linux counts in KiB


def _size(tensor: Tensor) -> int:
    return tensor.numel() * tensor.element_size()
