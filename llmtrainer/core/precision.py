"""The types a recipe may compute in, and which of them a device multiplies natively."""

from __future__ import annotations

from typing import Any

import torch

DTYPES = {
    "bfloat16": torch.bfloat16,
    "float16": torch.float16,
    "float32": torch.float32,
    "float64": torch.float64,
}


def multiplies_bfloat16(device: torch.device) -> bool:
    """Whether bfloat16 products run in hardware: slower than float32, and less exact, where they do not."""
    if device.type == "cuda":
        return torch.cuda.is_bf16_supported(including_emulation=False)
    return device.type == "cpu" and bool(torch.cpu._is_avx512_bf16_supported())


_INSTRUCTIONS = {torch.bfloat16: ("avx512_bf16", "amx_bf16"), torch.float16: ("avx512_fp16", "amx_fp16")}


def multiplies(device: torch.device, dtype: torch.dtype) -> bool:
    """Whether products of this type run in hardware. Only of processors of x86 it is known where they do not."""
    if device.type != "cpu" or dtype not in _INSTRUCTIONS:
        return True
    # The question is newer than the oldest torch that we run on.
    has: dict[str, Any] = getattr(torch.cpu, "get_capabilities", dict)()
    return has.get("architecture") != "x86_64" or any(has.get(name) for name in _INSTRUCTIONS[dtype])


def resolve(asked: str, device: torch.device) -> str:
    """`auto` becomes bfloat16 where the device multiplies it natively, else float32."""
    if asked != "auto":
        return asked
    return "bfloat16" if multiplies_bfloat16(device) else "float32"
