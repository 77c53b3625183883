"""Every attention path by name, and which of them can run where."""

from __future__ import annotations

import torch
from torch import Tensor

from llmtrainer.base.errors import UserError
from llmtrainer.models import attention, flex, varlen
from llmtrainer.models.attention import Path
from llmtrainer.models.visible import Visible


def attend_fused(q_BTHC: Tensor, k_BTKC: Tensor, v_BTKC: Tensor, visible: Visible) -> Tensor:
    """Each batch by the fused kernel that takes it as it is: documents end to end by `varlen`, which neither makes a
    mask nor looks at what it hides; a document a row, and prompts with several answers, by `sdpa`."""
    whole = visible.plain or visible.branching or not varlen.takes(q_BTHC.shape[-1])
    return (attention.attend_sdpa if whole else varlen.attend_varlen)(q_BTHC, k_BTKC, v_BTKC, visible)


PATHS: dict[str, Path] = {
    **attention.PATHS, "flex": flex.attend_flex, "varlen": varlen.attend_varlen, "fused": attend_fused,
}  # fmt: skip
"""The same function of (q_BTHC, k_BTKC, v_BTKC, visible) -> out_BTHC."""

_NEEDS = {"flex": flex.missing, "varlen": varlen.missing, "fused": varlen.missing}


def missing(name: str, device: torch.device, dtype: torch.dtype) -> str | None:
    """What keeps a path from training on `device` in `dtype`, for people; None: nothing."""
    needs = _NEEDS.get(name)
    return None if needs is None else needs(device, dtype)


def that_can_run(device: torch.device, dtype: torch.dtype) -> list[str]:
    return [name for name in PATHS if missing(name, device, dtype) is None]


def default_for(device: torch.device, dtype: torch.dtype) -> str:
    """blocks on a CPU, where torch's fused kernels are the slowest of all; fused on CUDA in 16 bits; else sdpa."""
    if device.type == "cpu":
        return "blocks"
    return "fused" if missing("fused", device, dtype) is None else "sdpa"


def choose(asked: str, device: torch.device, dtype: torch.dtype, fallback: bool) -> tuple[str, tuple[str, ...]]:
    """The path to take, and what to tell about it. Raises UserError if it cannot run here and no other may."""
    chosen = default_for(device, dtype)
    if asked == "auto":
        slow = device.type == "cuda" and dtype in varlen.DTYPES and chosen != "fused"
        lack = missing("fused", device, dtype)
        return chosen, (f"attention over packed documents makes a mask (`{chosen}`): {lack}",) if slow else ()
    lack = missing(asked, device, dtype)
    if lack is None:
        return asked, ()
    if not fallback:
        able = that_can_run(device, dtype)
        raise UserError(
            f"attention by `{asked}` cannot run here",
            where="engine.attention",
            why=f"{lack}; here run {', '.join(able)}",
            fix=f"engine.attention={chosen}, or engine.fallback=true to take that one and be told",
        )
    return chosen, (f"attention runs by `{chosen}` instead of `{asked}`: {lack}",)
