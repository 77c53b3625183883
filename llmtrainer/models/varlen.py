"""Attention by flash kernels over documents laid end to end: torch's own, or the flash-attn package's."""

from __future__ import annotations

import importlib.util
import inspect
from collections.abc import Callable
from functools import cache
from typing import Any

import torch
from torch import Tensor

from llmtrainer.base.errors import UserError
from llmtrainer.models.visible import Visible

Kernel = Callable[[Tensor, Tensor, Tensor, Tensor, int, int], Tensor]
"""(q_NHC, k_NKC, v_NKC, first places of documents and the end, tokens of the longest, window or -1) -> out_NHC."""


DTYPES = (torch.bfloat16, torch.float16)
"""What flash kernels multiply."""


def takes(channels: int) -> bool:
    """Whether flash kernels have heads of this size."""
    return channels % 8 == 0 and channels <= 256


def missing(device: torch.device, dtype: torch.dtype) -> str | None:
    """What keeps this path from running here; None: nothing."""
    if device.type != "cuda":
        return f"flash kernels run on CUDA, not on {device.type}"
    if dtype not in DTYPES:
        return f"flash kernels multiply bfloat16 and float16, not {str(dtype).removeprefix('torch.')}"
    if not _torch_has_it() and importlib.util.find_spec("flash_attn") is None:
        return (
            f"torch {torch.__version__} has no varlen_attn with windows, and flash-attn is not installed: "
            "pip install 'llmtrainer[flash]'"
        )
    return None


def attend_varlen(q_BTHC: Tensor, k_BTKC: Tensor, v_BTKC: Tensor, visible: Visible) -> Tensor:
    """Every document of every row as a sequence of its own. Raises UserError where a document branches."""
    if "varlen" not in visible.made:
        visible.made["varlen"] = documents(visible)
    bounds_S, longest = visible.made["varlen"]
    out_NHC = kernel()(
        q_BTHC.flatten(0, 1), k_BTKC.flatten(0, 1), v_BTKC.flatten(0, 1), bounds_S, longest, visible.window or -1
    )
    return out_NHC.view(q_BTHC.shape)


def documents(visible: Visible) -> tuple[Tensor, int]:
    """First places of documents in rows laid end to end, and the end, int32 [documents + 1]; tokens of the longest.

    Padding is a document like any other.
    """
    if visible.branching:
        raise UserError(
            "varlen attention cannot read a prompt that several answers share",
            where="engine.attention",
            why="its kernels see one unbroken range of keys for each query",
            fix="engine.attention=flex, or engine.attention=sdpa",
        )
    begins_BT = torch.ones_like(visible.document_BT, dtype=torch.bool)
    begins_BT[:, 1:] = visible.document_BT[:, 1:] != visible.document_BT[:, :-1]
    places = begins_BT.flatten().nonzero().squeeze(1)
    bounds_S = torch.cat([places, places.new_tensor([begins_BT.numel()])]).to(torch.int32)
    return bounds_S, int(bounds_S.diff().max())


@cache
def kernel() -> Kernel:
    """torch's kernel where this torch has it, else flash-attn's."""
    if _torch_has_it():
        from torch.nn.attention import varlen

        # Where grouped heads have no argument of their own, the kernel takes them unasked (seen with torch 2.11).
        asked = "enable_gqa" in inspect.signature(varlen.varlen_attn).parameters

        def run(q: Tensor, k: Tensor, v: Tensor, bounds: Tensor, longest: int, window: int) -> Tensor:
            grouped: dict[str, Any] = {"enable_gqa": True} if asked and q.shape[1] != k.shape[1] else {}
            out = varlen.varlen_attn(
                q, k, v, bounds, bounds, longest, longest, window_size=_window(window), **grouped
            )  # fmt: skip
            assert isinstance(out, Tensor)
            return out

        return run
    from flash_attn import flash_attn_varlen_func

    def run_package(q: Tensor, k: Tensor, v: Tensor, bounds: Tensor, longest: int, window: int) -> Tensor:
        out: Tensor = flash_attn_varlen_func(
            q, k, v, bounds, bounds, longest, longest, causal=True, window_size=_window(window), deterministic=True
        )
        return out

    return run_package


def _window(window: int) -> tuple[int, int]:
    """Keys to the left and to the right of a query, its own not counted; -1: all."""
    return (-1 if window == -1 else window - 1), 0


@cache
def _torch_has_it() -> bool:
    if importlib.util.find_spec("torch.nn.attention.varlen") is None:
        return False
    from torch.nn.attention import varlen

    return "window_size" in inspect.signature(varlen.varlen_attn).parameters
