"""Attention by torch's flex_attention: one compiled kernel that skips the blocks of keys nobody may see."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from typing import Any

import torch
from torch import Tensor

from llmtrainer.models.visible import Visible


def missing(device: torch.device, dtype: torch.dtype) -> str | None:
    """What keeps this path from training here; None: nothing."""
    if device.type != "cuda":
        return f"flex_attention has no backward on {device.type}, it is compiled for CUDA"
    return None


def attend_flex(q_BTHC: Tensor, k_BTKC: Tensor, v_BTKC: Tensor, visible: Visible) -> Tensor:
    """Compiled on CUDA. Elsewhere, forward only and slowly, for comparisons."""
    if "flex" not in visible.made:
        visible.made["flex"] = block_mask(visible)
    out_BHTC = _operator(q_BTHC.device.type == "cuda")(
        q_BTHC.transpose(1, 2), k_BTKC.transpose(1, 2), v_BTKC.transpose(1, 2),
        block_mask=visible.made["flex"], enable_gqa=q_BTHC.shape[2] != k_BTKC.shape[2],
    )  # fmt: skip
    return out_BHTC.transpose(1, 2)


def block_mask(visible: Visible) -> Any:
    """The same keys as `Visible.mask_BTT`, as a function of places; the [B, T, T] mask exists while it is made."""
    from torch.nn.attention.flex_attention import create_block_mask

    document_BT, sequence_BT, position_BT = visible.document_BT, visible.sequence_BT, visible.position_BT
    window = visible.window

    def sees(row: Tensor, head: Tensor, query: Tensor, key: Tensor) -> Tensor:
        whose = sequence_BT[row, key]
        seen = (key <= query) & (document_BT[row, query] == document_BT[row, key])
        seen = seen & ((whose == -1) | (whose == sequence_BT[row, query]))
        if window is not None:
            seen = seen & (position_BT[row, query] - position_BT[row, key] < window)
        return seen

    B, T = document_BT.shape
    return create_block_mask(sees, B, None, T, T, device=document_BT.device)


@cache
def _operator(compiled: bool) -> Callable[..., Tensor]:
    from torch.nn.attention.flex_attention import flex_attention

    # Dynamic from the start, as the pieces of the decoder are: a kernel that depends on the history of shapes
    # would give a resumed run other bits.
    return torch.compile(flex_attention, dynamic=True) if compiled else flex_attention  # type: ignore[return-value]
