"""Our attention inside the classes of transformers: who sees whom follows from the documents that are read."""

from __future__ import annotations

import math
from collections.abc import Callable
from contextvars import ContextVar
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from llmtrainer.base.errors import UserError
from llmtrainer.core.batch import Batch
from llmtrainer.models.foreign_cache import Seen
from llmtrainer.models.visible import Visible

ATTENTION = "llmtrainer"
"""What our attention is called among those of transformers."""
NOW: ContextVar[Reading] = ContextVar("reading")
"""The forward pass that is going on."""


@dataclass
class Asked:
    """What a pass through a class of transformers asked of our attention."""

    calls: int = 0
    masked: bool = False
    """Whether it brought a mask that was not made by us."""
    windows: set[int] = field(default_factory=set)
    """Widths that it wanted masks for."""
    told: set[int] = field(default_factory=set)
    """Widths that it told the attention itself."""


class Reading:
    """One forward pass: what its tokens may see, for every attention layer that asks."""

    def __init__(self, batch: Batch | Seen, path: Callable[..., Tensor], compute: torch.dtype) -> None:
        self.path, self.compute = path, compute
        self.batch = batch
        self._visible: dict[int | None, Any] = {}
        self.asked = Asked()

    def visible(self, window: int | None) -> Any:
        if window not in self._visible:
            batch = self.batch
            self._visible[window] = batch.through(window) if isinstance(batch, Seen) else Visible.of(batch, window)
        return self._visible[window]


def attend_packed(
    module: nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None = None, *,
    scaling: float | None = None, dropout: float = 0.0, sliding_window: int | None = None,
    softcap: float | None = None, s_aux: Tensor | None = None, is_causal: bool | None = None,
    position_bias: Tensor | None = None, **_: Any,
) -> tuple[Tensor, None]:  # fmt: skip
    """transformers' attention function: query [B, H, T, C], key and value [B, K, T, C] -> [B, T, H, C].

    What may be seen follows from the documents of the batch that is being read; the mask that the model's class
    makes knows nothing of them and is not looked at.
    """
    reading = NOW.get()
    reading.asked.calls += 1
    reading.asked.masked |= attention_mask is not None
    if sliding_window is not None:
        reading.asked.told.add(sliding_window)
    if is_causal is False or position_bias is not None:
        raise UserError(
            f"{type(module).__name__} is no causal softmax attention", where="model.kind hf",
            why="it looks ahead" if position_bias is None else "it adds a bias for every pair of places",
            fix="model.apart=true, or another model",
        )
    visible = reading.visible(sliding_window)
    q_BTHC, k_BTKC, v_BTKC = (x.transpose(1, 2).to(reading.compute).contiguous() for x in (query, key, value))
    scale = q_BTHC.shape[-1] ** -0.5 if scaling is None else scaling
    with torch.autocast(query.device.type, enabled=False):
        if softcap or s_aux is not None or dropout or v_BTKC.shape[-1] != q_BTHC.shape[-1]:
            return _by_definition(q_BTHC, k_BTKC, v_BTKC, visible, scale, softcap, s_aux, dropout), None
        # Our paths scale by the root of C.
        factor = scale * math.sqrt(q_BTHC.shape[-1])
        return reading.path(q_BTHC if factor == 1.0 else q_BTHC * factor, k_BTKC, v_BTKC, visible), None


def made_mask(*_: Any, local_size: int | None = None, **__: Any) -> None:
    """transformers' maker of masks for our attention, which sees to it itself: none. `local_size`: a window's width."""
    reading = NOW.get(None)
    if reading is not None and local_size:
        reading.asked.windows.add(local_size)


def _by_definition(
    q_BTHC: Tensor, k_BTKC: Tensor, v_BTKC: Tensor, visible: Visible, scale: float, softcap: float | None,
    sinks_H: Tensor | None, dropout: float,
) -> Tensor:  # fmt: skip
    """Attention with what only some models have: capped scores (arXiv:2408.00118, section 2), a score that no key
    has (sinks), dropout of probabilities."""
    groups = q_BTHC.shape[2] // k_BTKC.shape[2]
    q, k, v = (x.transpose(1, 2) for x in (q_BTHC, k_BTKC, v_BTKC))
    k, v = (x.repeat_interleave(groups, dim=1) for x in (k, v))
    scores_BHTT = q @ k.transpose(2, 3) * scale
    if softcap:
        scores_BHTT = softcap * torch.tanh(scores_BHTT / softcap)
    scores_BHTT = scores_BHTT.masked_fill(~visible.mask_BTT[:, None], -math.inf)
    wide = torch.promote_types(scores_BHTT.dtype, torch.float32)
    if sinks_H is not None:
        column = sinks_H.to(scores_BHTT.dtype)[None, :, None, None].expand(*scores_BHTT.shape[:3], 1)
        scores_BHTT = torch.cat([scores_BHTT, column], dim=-1)
    p = scores_BHTT.softmax(-1, dtype=wide).to(v.dtype)
    if sinks_H is not None:
        p = p[..., :-1]
    return (F.dropout(p, dropout) @ v).transpose(1, 2)
