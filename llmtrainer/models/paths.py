"""Every attention path by name, and which of them can run where."""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

from llmtrainer.base.errors import UserError
from llmtrainer.models import attention, flex, varlen
from llmtrainer.models.attention import Path
from llmtrainer.models.visible import Visible


def attend_fused(q_BTHC: Tensor, k_BTKC: Tensor, v_BTKC: Tensor, visible: Visible) -> Tensor:
    """Each batch by the fused kernel that takes it as it is: documents end to end by `varlen`, which neither makes a
    mask nor looks at what it hides; a document a row, and prompts with several answers, by `sdpa`."""
    documents = needed("fused", visible, q_BTHC.shape[-1]) == "documents"
    return (varlen.attend_varlen if documents else attention.attend_sdpa)(q_BTHC, k_BTKC, v_BTKC, visible)


Needed = Literal["nothing", "mask", "documents"]


def needed(name: str, visible: Visible, channels: int) -> Needed:
    """What one of RECORDED reads of a batch, in heads of so many channels: `Visible.mask_BTT`, the bounds of its
    documents, or nothing but that each query sees all before it."""
    if name == "fused":
        end_to_end = not visible.plain and not visible.branching and varlen.takes(channels)
        name = "varlen" if end_to_end else "sdpa"
    if name == "sdpa" and visible.plain:
        return "nothing"
    return "documents" if name == "varlen" else "mask"


RECORDED = ("sdpa", "reference", "varlen", "fused")
"""Paths that wait for no tensor once they have what `needed` says."""


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


def require_recordable(name: str) -> None:
    """Raises UserError where a path cannot be recorded as a CUDA graph."""
    if name not in RECORDED:
        raise UserError(
            f"attention by `{name}` cannot be recorded as a CUDA graph", where="engine.cuda_graphs",
            why="which blocks it works through differs from batch to batch",
            fix=f"engine.attention=auto, or one of {', '.join(RECORDED)}; or engine.cuda_graphs=false",
        )
