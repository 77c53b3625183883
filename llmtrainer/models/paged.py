"""Reading token by token with keys and values in blocks that rows share, so that memory follows what is read."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from llmtrainer.models.reading import read_into
from llmtrainer.models.replay import OneEach, recordings

if TYPE_CHECKING:
    from llmtrainer.models.reading_weights import ReadingWeights


class Pages:
    """`count` blocks of `size` tokens each in every layer, with the weights that fill them (arXiv:2309.06180).

    A row is a list of blocks, its table; who owns which block is not known here. Block 0 pads the tables of shorter
    rows: nothing is ever written there.
    """

    def __init__(self, weights: ReadingWeights, count: int, size: int, longest: int) -> None:
        self.weights, self.size = weights, size
        self.longest = longest
        """Tokens that a row may come to have: some rotary positions depend on it."""
        self.device = weights.embedding_VD.device
        kv_heads, channels = weights.key_shape
        # Zeros, not unset memory: a masked key has probability 0, but 0 * NaN would still be NaN.
        shape = (count, 2, kv_heads, size, channels)
        self.held = [_zeros(shape, weights.compute, self.device) for _ in weights.layers]
        """Keys and values side by side: [blocks, 2, K, size, C] of each layer."""
        self._room = torch.empty(0, dtype=weights.compute, device=self.device)
        self._recordings = recordings(self.device)

    def copy(self, source: int, target: int) -> None:
        """One block becomes what another is."""
        for held in self.held:
            held[target] = held[source]

    def read(
        self, tokens_BT: Tensor, lengths_B: Tensor, tables: Sequence[Sequence[int]], before: Sequence[int]
    ) -> Tensor:
        """Put the first `lengths_B` of each row's tokens behind the `before` tokens in the blocks of its table;
        logits [B, V] of what follows them, float32 or wider."""
        if self._recordings is None or tokens_BT.shape[1] > 1 or not bool((lengths_B == 1).all()):
            width = max(map(len, tables))
            return read_into(_Rows(self, tables, before, width), tokens_BT.to(self.device), lengths_B)
        B = len(tables)
        # Behind the rows some that repeat the last one, and write once more what it writes: few sizes are recorded.
        same = [*range(B), *[B - 1] * (_more_rows(B) - B)]
        width = min(_power_of_two(max(map(len, tables))), -(-self.longest // self.size))
        rows = _Rows(self, [tables[row] for row in same], [before[row] for row in same], width)
        step = OneEach(rows, tokens_BT[same, 0].to(self.device), rows.capacity)
        return self._recordings.read(rows, step)[:B]

    def gathered(self, layer: int, block_N: Tensor, shape: tuple[int, ...]) -> tuple[Tensor, Tensor]:
        """Keys and values of some blocks, one after the other for each head. The next call writes over them."""
        held = self.held[layer]
        flat = held.view(-1, held.shape[-2] * held.shape[-1])
        if self.device.type != "cpu":    # whose allocator gives the same memory to every layer
            keys, values = flat.index_select(0, block_N).view(2, *shape).unbind(0)
            return keys, values
        needed = len(block_N) * flat.shape[1]
        if len(self._room) < needed:
            self._room = held.new_empty(needed + needed // 4)
        torch.index_select(flat, 0, block_N, out=self._room[:needed].view(len(block_N), -1))
        keys, values = self._room[:needed].view(2, *shape).unbind(0)
        return keys, values


def _power_of_two(number: int) -> int:
    """The next one from `number` on."""
    return 1 << (number - 1).bit_length()


def _more_rows(number: int) -> int:
    """1, 2, 4, and from there on multiples of 8."""
    return _power_of_two(number) if number <= 8 else -(-number // 8) * 8


def _zeros(shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> Tensor:
    if device.type != "cpu":
        return torch.zeros(shape, dtype=dtype, device=device)
    # numpy asks the system for zeros, which gives each page when it is first touched: a block that no row comes to
    # need costs nothing. torch writes them all.
    return torch.from_numpy(np.zeros(math.prod(shape) * dtype.itemsize, dtype=np.uint8)).view(dtype).view(shape)


class _Rows:
    """The rows of one `read`, as the cache's own reading sees them."""

    def __init__(
        self, pages: Pages, tables: Sequence[Sequence[int]], before: Sequence[int], width: int
    ) -> None:
        """width: blocks that are looked at of each row, at least as many as the longest table has."""
        self.pages, self.weights, self.longest = pages, pages.weights, pages.longest
        self.capacity = width * pages.size
        self.lengths_B = torch.tensor(before, device=pages.device)
        self.table_BW = torch.tensor([[*table, *[0] * (width - len(table))] for table in tables], device=pages.device)
        K, C = self.weights.key_shape
        self.shape = (len(tables), K, self.capacity, C)
        head_K11 = torch.arange(K, device=pages.device)[:, None]
        first_BKW = 2 * K * self.table_BW[:, None] + head_K11
        self.block_N = torch.stack([first_BKW, first_BKW + K]).flatten()
        """[2 * B * K * W]: places of the heads' blocks, keys and then values, among all of a layer."""

    def slots(self, row_N: Tensor, place_N: Tensor) -> tuple[Tensor, Tensor]:
        size, K = self.pages.size, self.shape[1]
        block_N1 = self.table_BW[row_N, place_N // size][:, None]
        head_K = torch.arange(K, device=block_N1.device)
        slot_NK = (2 * K * block_N1 + head_K) * size + (place_N % size)[:, None]
        return slot_NK.flatten(), (slot_NK + K * size).flatten()

    def memory(self, layer: int) -> tuple[Tensor, Tensor]:
        held = self.pages.held[layer]
        flat = held.view(-1, held.shape[-1])
        return flat, flat

    def places(self) -> list[Tensor]:
        return [self.block_N]

    def whole(self, layer: int) -> tuple[Tensor, Tensor]:
        return self.pages.gathered(layer, self.block_N, self.shape)


class TokenPages:
    """The same for a model that reads whole rows again each time: blocks hold ids."""

    def __init__(
        self, logits_of: Callable[[list[list[int]]], Tensor], count: int, size: int, device: torch.device
    ) -> None:
        """`logits_of`: rows of ids -> logits [B, V] of what follows each."""
        self.logits_of, self.size, self.device = logits_of, size, device
        self.held = torch.zeros(count, size, dtype=torch.int64)

    def copy(self, source: int, target: int) -> None:
        """One block becomes what another is."""
        self.held[target] = self.held[source]

    def read(
        self, tokens_BT: Tensor, lengths_B: Tensor, tables: Sequence[Sequence[int]], before: Sequence[int]
    ) -> Tensor:
        """See Pages.read."""
        rows = []
        for new, length, table, start in zip(tokens_BT.tolist(), lengths_B.tolist(), tables, before, strict=True):
            place_N = torch.arange(start, start + length)
            self.held[torch.tensor(table)[place_N // self.size], place_N % self.size] = torch.tensor(new[:length])
            rows.append(self.held[list(table)].flatten()[: start + length].tolist())
        return self.logits_of(rows)
