"""Every attention path by name, and which of them can run where."""

from __future__ import annotations

import torch

from llmtrainer.base.errors import UserError
from llmtrainer.models import attention, flex, varlen
from llmtrainer.models.attention import Path

PATHS: dict[str, Path] = {**attention.PATHS, "flex": flex.attend_flex, "varlen": varlen.attend_varlen}
"""The same function of (q_BTHC, k_BTKC, v_BTKC, visible) -> out_BTHC."""

_NEEDS = {"flex": flex.missing, "varlen": varlen.missing}


def missing(name: str, device: torch.device, dtype: torch.dtype) -> str | None:
    """What keeps a path from training on `device` in `dtype`, for people; None: nothing."""
    needs = _NEEDS.get(name)
    return None if needs is None else needs(device, dtype)


def that_can_run(device: torch.device, dtype: torch.dtype) -> list[str]:
    return [name for name in PATHS if missing(name, device, dtype) is None]


def default_for(device: torch.device) -> str:
    """blocks on a CPU, where torch's fused kernels are the slowest of all; sdpa elsewhere."""
    return "blocks" if device.type == "cpu" else "sdpa"


def choose(asked: str, device: torch.device, dtype: torch.dtype, fallback: bool) -> tuple[str, tuple[str, ...]]:
    """The path to take, and what to tell about it. Raises UserError if it cannot run here and no other may."""
    if asked == "auto":
        return default_for(device), ()
    lack = missing(asked, device, dtype)
    if lack is None:
        return asked, ()
    if not fallback:
        able = that_can_run(device, dtype)
        raise UserError(
            f"attention by `{asked}` cannot run here",
            where="engine.attention",
            why=f"{lack}; here run {', '.join(able)}",
            fix=f"engine.attention={default_for(device)}, or engine.fallback=true to take that one and be told",
        )
    chosen = default_for(device)
    return chosen, (f"attention runs by `{chosen}` instead of `{asked}`: {lack}",)
