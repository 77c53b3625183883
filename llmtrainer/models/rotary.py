"""Rotary positions: the table of cosines and sines, and what stretches it over more text."""

from __future__ import annotations

import math
from typing import ClassVar

import torch
from torch import Tensor

from llmtrainer.base.config import Kind

Table = tuple[Tensor, Tensor]
"""cos, sin [B, T, 1, R/2]."""


class RopeScaling(Kind):
    """How a model reads further than the context that it was first trained on."""

    folder: ClassVar[str] = "llmtrainer.models.rope_scalings"

    @property
    def grows_beyond(self) -> int | None:
        """Tokens from which on the frequencies depend on the length of the text. None: they never do."""
        return None

    @property
    def magnitude(self) -> float:
        """Factor of every cosine and sine; a score between rotated channels has its square."""
        return 1.0

    def frequencies(self, size: int, theta: float, length: int) -> Tensor:
        """Radians per position, float64 [R/2], fastest first, of `size` = R channels in a text of `length` tokens."""
        raise NotImplementedError


def plain_frequencies(size: int, theta: float) -> Tensor:
    """theta^(-2i/R) radians per position, float64 [R/2] (arXiv:2104.09864, section 3.2.2)."""
    return theta ** -(torch.arange(0, size, 2, dtype=torch.float64, device="cpu") / size)


class Rotary:
    """Cosines and sines of position times frequency.

    Angles are float64 and made on the CPU, so that far positions keep their digits and every device has the same
    table. The table grows when a longer row arrives; it is a function of its arguments and no part of the model's
    state.

    Some frequencies depend on the length of the text (`dynamic`). In a batch that is the length of each token's
    own document, so that a document is read alike whatever lies beside it. A text that grows token by token has
    from its first token on the frequencies of the length that it may grow to: keys turned by one set and queries
    turned by another would not tell their distance.
    """

    def __init__(self, size: int, theta: float, scaling: RopeScaling | None = None) -> None:
        assert size % 2 == 0
        self.size = size
        """R, how many channels of a head are rotated."""
        self.theta = theta
        self.scaling = scaling
        self._grows_beyond = scaling.grows_beyond if scaling else None
        self._magnitude = scaling.magnitude if scaling else 1.0
        self._table: Table | None = None
        self._length = 0

    def __call__(self, position_BT: Tensor, longest: int, dtype: torch.dtype) -> Table:
        """Factors of positions below `longest`, in texts that may grow to so many tokens."""
        table, length = self._table, self._that_counts(longest)
        if (
            table is None
            or table[0].shape[0] < longest
            or table[0].dtype != dtype
            or table[0].device != position_BT.device
            or self._length != length
        ):
            rows = torch.arange(64 * math.ceil(longest / 64), dtype=torch.float64, device="cpu")
            cos, sin = self._turned(torch.outer(rows, self.frequencies(length)), dtype)
            table = self._table = cos.to(position_BT.device), sin.to(position_BT.device)
            self._length = length
        # No views of something else: what was compiled for one is compiled again for the other.
        place_BT1 = position_BT[:, :, None]
        return table[0][place_BT1], table[1][place_BT1]

    def of_documents(self, position_BT: Tensor, longest: int, dtype: torch.dtype) -> Table:
        """Factors of positions below `longest`, each in its own document: one begins wherever a position is 0."""
        beyond = self._grows_beyond
        if beyond is None or longest <= beyond:
            return self(position_BT, longest, dtype)
        place_BT = position_BT.cpu()
        lengths, which_BT = document_lengths(place_BT).clamp(min=beyond).unique(return_inverse=True)
        if lengths.tolist() == [beyond]:
            return self(position_BT, beyond, dtype)
        frequencies = torch.stack([self.frequencies(length) for length in lengths.tolist()])
        cos, sin = self._turned(place_BT[:, :, None, None] * frequencies[which_BT[:, :, None]], dtype)
        return cos.to(position_BT.device), sin.to(position_BT.device)

    def frequencies(self, length: int = 0) -> Tensor:
        """Radians per position, float64 [R/2], in a text of `length` tokens."""
        if self.scaling is None:
            return plain_frequencies(self.size, self.theta)
        return self.scaling.frequencies(self.size, self.theta, length)

    def _that_counts(self, length: int) -> int:
        """The same number for all lengths that have the same frequencies."""
        return 0 if self._grows_beyond is None else max(length, self._grows_beyond)

    def _turned(self, angles: Tensor, dtype: torch.dtype) -> Table:
        return (angles.cos() * self._magnitude).to(dtype), (angles.sin() * self._magnitude).to(dtype)


def document_lengths(position_BT: Tensor) -> Tensor:
    """Tokens of the document that each token is of, int64 [B, T]: its last position and 1."""
    number_BT = (position_BT == 0).cumsum(1)
    B, T = position_BT.shape
    lengths = torch.zeros(B, T + 1, dtype=torch.int64, device=position_BT.device)
    lengths.scatter_reduce_(1, number_BT, position_BT.long() + 1, "amax")
    return lengths.gather(1, number_BT)
