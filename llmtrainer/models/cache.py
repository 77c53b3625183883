"""Reading token by token: keys and values of what was read, per row."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from llmtrainer.models.reading import read_into
from llmtrainer.models.reading_weights import ReadingWeights
from llmtrainer.models.replay import OneEach, recordings

if TYPE_CHECKING:
    from llmtrainer.models.decoder import Decoder


class Cache:
    """Keys and values [B, K, S, C] of every layer, S the capacity, with the weights that made them.

    Rows may have different lengths; a row's tokens lie without gaps from place 0. Padding is never written, and
    costs nothing but its share of attention.
    """

    def __init__(self, decoder: Decoder, rows: int, capacity: int) -> None:
        family = decoder.family
        self.capacity = capacity
        self.weights = ReadingWeights.of(decoder)
        device = decoder.head_weight.device
        self.lengths_B = torch.zeros(rows, dtype=torch.int64, device=device)
        shape = (rows, family.kv_heads or family.heads, capacity, family.channels)
        # Zeros, not unset memory: a masked key has probability 0, but 0 * NaN would still be NaN.
        self.keys, self.values = (
            [torch.zeros(shape, dtype=self.weights.compute, device=device) for _ in range(family.layers)]
            for _ in range(2)
        )
        self._recordings = recordings(device)

    def take(self, rows: Sequence[int]) -> None:
        """Row i becomes what row rows[i] was, and there are as many rows as named: finished rows are left out, and
        the row of a prompt is repeated for each of its answers."""
        assert rows and min(rows) >= 0 and max(rows) < len(self.lengths_B)
        self.lengths_B = self.lengths_B[list(rows)]
        downwards = len(set(rows)) == len(rows) and all(source >= row for row, source in enumerate(rows))
        if not downwards and self._recordings is not None:
            self._recordings.forget()
        for held in (self.keys, self.values):
            for layer, kept_BKSC in enumerate(held):
                if not downwards:
                    held[layer] = kept_BKSC[list(rows)]
                    continue
                # Only rows that move are copied. None moves up, so none is written over before it was read.
                for row, source in enumerate(rows):
                    if source != row:
                        kept_BKSC[row] = kept_BKSC[source]
                held[layer] = kept_BKSC[: len(rows)]

    @property
    def longest(self) -> int:
        """Tokens that a row may come to have, which some rotary positions depend on."""
        return self.capacity

    def slots(self, row_N: Tensor, place_N: Tensor) -> tuple[Tensor, Tensor]:
        """Where the keys and the values of a place of a row go, in memory that is one list of them: [N * K] each."""
        K = self.keys[0].shape[1] if self.keys else 1
        device = self.lengths_B.device
        slot_NK = ((row_N * K)[:, None] + torch.arange(K, device=device)) * self.capacity + place_N[:, None]
        return slot_NK.flatten(), slot_NK.flatten()

    def places(self) -> list[Tensor]:
        """Tensors that say where rows lie; here a row lies where its number says."""
        return []

    def memory(self, layer: int) -> tuple[Tensor, Tensor]:
        """The two lists: [slots, C]."""
        C = self.keys[layer].shape[-1]
        return self.keys[layer].view(-1, C), self.values[layer].view(-1, C)

    def whole(self, layer: int) -> tuple[Tensor, Tensor]:
        """Keys and values of every place: [B, K, capacity, C]."""
        return self.keys[layer], self.values[layer]

    def read(self, tokens_BT: Tensor, lengths_B: Tensor) -> Tensor:
        """See Decoder.read."""
        if self._recordings is None or tokens_BT.shape[1] > 1 or not bool((lengths_B == 1).all()):
            logits_BV = read_into(self, tokens_BT, lengths_B)
        else:
            longest = int(self.lengths_B.max()) + 1
            assert longest <= self.capacity, f"room for {self.capacity} tokens a row"
            # Few sizes are recorded, and no row looks at more than twice its places.
            looked_at = min(max(1 << (longest - 1).bit_length(), 64), self.capacity)
            logits_BV = self._recordings.read(self, OneEach(self, tokens_BT[:, 0], looked_at))
        self.lengths_B = self.lengths_B + lengths_B.to(self.lengths_B.device)
        return logits_BV
