"""What each query of a batch may see, and the blocks in which attention is worked out."""

from __future__ import annotations

import itertools
import math
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from llmtrainer.core.batch import Batch

BLOCK = 128
"""Query rows of one block. Measured on CPU: smaller blocks skip more keys, larger ones multiply faster."""
GRAIN = 32
"""Blocks of a row of several documents, and their keys, begin at multiples of it, so that few shapes occur: on a CPU
the first product of a shape costs as much as thirty others."""

@dataclass(frozen=True)
class Visible:
    """Which keys each query of a batch may see; made once for all layers.

    A key must not be later, must be of the same document, within the sliding window by position, and either
    shared by all sequences of its document (-1: a prompt with several answers) or of the query's own.
    Padding is a document of its own.
    """

    document_BT: Tensor
    sequence_BT: Tensor
    position_BT: Tensor
    window: int | None = None
    """A query sees at most this many positions, its own included."""
    made: dict[str, Any] = field(default_factory=dict, compare=False, repr=False)
    """What a path made of this once for all layers, by the path's name."""

    @classmethod
    def of(cls, batch: Batch, window: int | None) -> Visible:
        return cls(batch.document_BT, batch.sequence_BT, batch.position_BT, window)

    def reading_only(self, mask_BTT: Tensor | None) -> Visible:
        """The same answers, but a mask from elsewhere: for kernels that are recorded now, and later read other numbers
        at the same place."""
        same = Visible(self.document_BT, self.sequence_BT, self.position_BT, self.window)
        known = {"plain": self.plain, "branching": self.branching}
        same.__dict__.update(known if mask_BTT is None else {**known, "mask_BTT": mask_BTT})
        return same

    @cached_property
    def mask_BTT(self) -> Tensor:
        """bool [B, query, key]."""
        whole = slice(0, self.document_BT.shape[1])
        return self._mask(whole, whole)

    def _mask(self, queries: slice, keys: slice) -> Tensor:
        """The part of the mask for some queries and keys: bool [B, queries, keys]."""
        document_BT, sequence_BT, position_BT = self.document_BT, self.sequence_BT, self.position_BT
        place_T = torch.arange(document_BT.shape[1], device=document_BT.device)
        seen = document_BT[:, queries, None] == document_BT[:, None, keys]
        seen &= place_T[queries, None] >= place_T[None, keys]
        query_BQ1, key_B1K = sequence_BT[:, queries, None], sequence_BT[:, None, keys]
        seen &= (key_B1K == -1) | (key_B1K == query_BQ1)
        if self.window is not None:
            seen &= position_BT[:, queries, None] - position_BT[:, None, keys] < self.window
        return seen

    @cached_property
    def branching(self) -> bool:
        """Whether some document holds several sequences, so that what a query sees is no unbroken range."""
        same = self.document_BT[:, 1:] == self.document_BT[:, :-1]
        return bool((same & (self.sequence_BT[:, 1:] != self.sequence_BT[:, :-1])).any())

    @cached_property
    def plain(self) -> bool:
        """Whether causality alone decides for every real token: one document a row, no window that bites."""
        short = self.window is None or self.document_BT.shape[1] <= self.window
        return short and not self.branching and bool((self.document_BT <= 0).all())

    @cached_property
    def first_BT(self) -> Tensor:
        """The earliest key a query may see, never falling along a row.

        Padding goes on with the document before it: nothing reads what it sees, and plain rows need no mask.
        """
        T = self.document_BT.shape[1]
        place_T = torch.arange(T, device=self.document_BT.device)
        starts_BT = torch.zeros_like(self.document_BT, dtype=torch.bool)
        starts_BT[:, 1:] = (self.document_BT[:, 1:] != self.document_BT[:, :-1]) & (self.document_BT[:, 1:] >= 0)
        first_BT = (starts_BT * place_T).cummax(dim=1).values
        if self.window is not None and not self.branching:
            first_BT = torch.maximum(first_BT, place_T - (self.window - 1))
        return first_BT

    @cached_property
    def blocks(self) -> tuple[Block, ...]:
        """The queries in blocks, each with the one range of keys that its rows need."""
        return tuple(self._block(start, stop) for start, stop in itertools.pairwise(self._borders()))

    def _borders(self) -> list[int]:
        """Where blocks begin, and the end of the last. One row of several documents is cut where they begin: a block
        across two would multiply each with the other's keys. Short neighbours share a block all the same."""
        T = self.document_BT.shape[1]
        changes = self.document_BT[0, 1:] != self.document_BT[0, :-1]
        if len(self.document_BT) > 1 or not bool(changes.any()):
            return [*range(0, T, BLOCK), T]
        # Not below a document's begin: the block's first rows would need the keys of the document before.
        ends = sorted({min(-(-place // GRAIN) * GRAIN, T) for place in [*(1 + changes.nonzero()[:, 0]).tolist(), T]})
        borders, whole = [0], 0
        for end in ends:
            if end - borders[-1] > BLOCK:
                if whole > borders[-1]:
                    borders.append(whole)    # the documents before it fill a block of their own
                while end - borders[-1] > BLOCK:
                    pieces = -(-(end - borders[-1]) // BLOCK)
                    borders.append(borders[-1] + -(-(end - borders[-1]) // (pieces * GRAIN)) * GRAIN)
            whole = end
        return [*borders, T]

    def _block(self, start: int, stop: int) -> Block:
        earliest = int(self.first_BT[:, start].min()) // GRAIN * GRAIN
        if self.branching:
            hidden = ~self._mask(slice(start, stop), slice(earliest, stop))
            return Block(start, stop, earliest, stop, hidden[:, None, None])
        if int(self.first_BT[:, stop - 1].max()) <= earliest:
            return Block(start, stop, earliest, stop, None)
        place_k = torch.arange(earliest, stop, device=self.document_BT.device)
        hidden = place_k < self.first_BT[:, start:stop, None]
        hidden |= place_k > place_k[start - earliest :, None]
        return Block(start, stop, earliest, stop, hidden[:, None, None])


@dataclass(frozen=True)
class Block:
    """Queries start..stop against keys earliest..latest, ends not included."""

    start: int
    stop: int
    earliest: int
    latest: int
    hidden_B11QK: Tensor | None
    """What may not be seen, bool. None: the last key stands at the last query, and only what is later is
    hidden."""
    made: dict[torch.dtype, Tensor] = field(default_factory=dict, compare=False, repr=False)

    @property
    def keys(self) -> slice:
        return slice(self.earliest, self.latest)

    def bias(self, dtype: torch.dtype, device: torch.device) -> Tensor:
        """0 where a key may be seen and -inf where not, of the block's last keys: [B or 1, 1, 1, Q, their number].

        To be added: that is many times faster than to fill by a mask, and 0 changes no bit. Made once for all layers.
        """
        if dtype not in self.made:
            if self.hidden_B11QK is None:
                n = self.stop - self.start    # only the square on the diagonal holds later keys
                self.made[dtype] = torch.full((1, 1, 1, n, n), -math.inf, dtype=dtype, device=device).triu(1)
            else:
                bias = torch.zeros(self.hidden_B11QK.shape, dtype=dtype, device=device)
                self.made[dtype] = bias.masked_fill_(self.hidden_B11QK, -math.inf)
        return self.made[dtype]


def cached_blocks(
    read_B: Tensor, T: int, window: int | None, capacity: int, grain: int = 1
) -> tuple[Block, ...]:
    """T new tokens of each row, of which `read_B` were read before, against all keys up to them. The keys of a block
    begin and, where there are so many, end at multiples of `grain`."""
    shortest, longest = int(read_B.min()), int(read_B.max())
    blocks = []
    for start in range(0, T, BLOCK):
        stop = min(start + BLOCK, T)
        latest = min(-(-(longest + stop) // grain) * grain, capacity)
        # Padding past the capacity is taken to stand at its last place: every query must see some key.
        earliest = 0 if window is None else max(0, min(shortest + start, capacity - 1) - window + 1) // grain * grain
        hidden = None
        if shortest != longest or window is not None or latest != longest + stop:
            key_k = torch.arange(earliest, latest, device=read_B.device)
            query_BQ1 = (read_B[:, None] + torch.arange(start, stop, device=read_B.device))[:, :, None]
            query_BQ1 = query_BQ1.clamp(max=capacity - 1)
            hidden = key_k > query_BQ1
            if window is not None:
                hidden |= key_k <= query_BQ1 - window
            hidden = hidden[:, None, None]
        blocks.append(Block(start, stop, earliest, latest, hidden))
    return tuple(blocks)
