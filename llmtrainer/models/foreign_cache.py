"""What a model of transformers has read so far: keys and values in transformers' own cache, or tokens."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor


class Rows:
    """The tokens read so far, per row, for classes that keep no keys: every read computes the whole rows again."""

    def __init__(self, rows: int, capacity: int, device: torch.device) -> None:
        self.capacity = capacity
        self.tokens: list[list[int]] = [[] for _ in range(rows)]
        self.lengths_B = torch.zeros(rows, dtype=torch.int64, device=device)

    def take(self, rows: Sequence[int]) -> None:
        """Row i becomes what row rows[i] was."""
        self.tokens = [list(self.tokens[row]) for row in rows]
        self.lengths_B = self.lengths_B[list(rows)]

    def append(self, tokens_BT: Tensor, lengths_B: Tensor) -> None:
        for held, ids, length in zip(self.tokens, tokens_BT.tolist(), lengths_B.tolist(), strict=True):
            held += ids[:length]
        self.lengths_B = _longer(self.lengths_B, lengths_B, self.capacity)


class KeyRows:
    """Keys and values of every layer, as transformers' DynamicCache grows them: one column for each token that any row
    read at one time. Rows of other lengths have columns that hold nothing of theirs, which nothing sees."""

    def __init__(self, rows: int, capacity: int, device: torch.device) -> None:
        from transformers import DynamicCache

        self.capacity = capacity
        self.held: Any = DynamicCache()    # without a configuration: every layer keeps all, and windows are our masks'
        self.lengths_B = torch.zeros(rows, dtype=torch.int64, device=device)
        self.position_BS = torch.zeros(rows, 0, dtype=torch.int64, device=device)
        """Of each column's token in its document; -1 where a row has none."""

    def take(self, rows: Sequence[int]) -> None:
        """Row i becomes what row rows[i] was. Columns that no row needs any more are let go."""
        index = torch.tensor(list(rows), device=self.lengths_B.device)
        self.lengths_B, self.position_BS = self.lengths_B[index], self.position_BS[index]
        needed = (self.position_BS >= 0).any(dim=0).nonzero()[:, 0]
        self.position_BS = self.position_BS[:, needed]
        for layer in self.held.layers:
            layer.keys, layer.values = (kept[index][:, :, needed] for kept in (layer.keys, layer.values))

    def append(self, lengths_B: Tensor, T: int) -> Seen:
        """Make room for T more columns, of which each row fills the first `lengths_B`: what these may see."""
        place_T = torch.arange(T, device=self.lengths_B.device)
        lengths_B = lengths_B.to(place_T.device)
        position_BT = torch.where(place_T < lengths_B[:, None], self.lengths_B[:, None] + place_T, -1)
        self.lengths_B = _longer(self.lengths_B, lengths_B, self.capacity)
        self.position_BS = torch.cat([self.position_BS, position_BT], dim=1)
        return Seen(position_BT, self.position_BS)


@dataclass(frozen=True)
class Seen:
    """New tokens and the columns that they may see, in positions of their rows; -1 for what is no token."""

    position_BT: Tensor
    position_BS: Tensor

    def through(self, window: int | None) -> SeenThrough:
        """What a layer with this window sees. What is no token sees everything: nothing is no softmax."""
        query, key = self.position_BT[:, :, None], self.position_BS[:, None]
        seen = (key >= 0) & (key <= query)
        if window is not None:
            seen &= key > query - window
        return SeenThrough(seen | (query < 0))


@dataclass(frozen=True)
class SeenThrough:
    """What each new token sees of all columns."""

    mask_BTT: Tensor
    """bool [B, T, S], under the name that attention asks for."""


def attend_columns(q_BTHC: Tensor, k_BSKC: Tensor, v_BSKC: Tensor, visible: SeenThrough) -> Tensor:
    """New queries against all columns, by plain products: [B, T, H, C]. The heads that share a key head are queries
    to it, so that no key is repeated."""
    B, T, H, C = q_BTHC.shape
    K = k_BSKC.shape[2]
    q = q_BTHC.view(B, T, K, H // K, C).permute(0, 2, 3, 1, 4).flatten(2, 3) * C**-0.5
    scores = (q @ k_BSKC.permute(0, 2, 3, 1)).unflatten(2, (H // K, T))
    scores = scores.masked_fill(~visible.mask_BTT[:, None, None], -math.inf)
    p = scores.softmax(-1, dtype=torch.promote_types(scores.dtype, torch.float32)).to(v_BSKC.dtype)
    out = p.flatten(2, 3) @ v_BSKC.transpose(1, 2)
    return out.unflatten(2, (H // K, T)).permute(0, 3, 1, 2, 4).reshape(B, T, H, C)


def _longer(lengths_B: Tensor, more_B: Tensor, capacity: int) -> Tensor:
    longer_B = lengths_B + more_B.to(lengths_B.device)
    assert int(longer_B.max()) <= capacity, f"the cache holds {capacity} tokens a row"
    return longer_B
