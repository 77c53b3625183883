"""Slow frequencies divided by a factor, fast ones kept, a ramp by channel between them, and sharper scores: YaRN."""

from __future__ import annotations

import math
from typing import Self

import torch
from pydantic import Field, model_validator
from torch import Tensor

from llmtrainer.base.errors import UserError
from llmtrainer.models.rotary import RopeScaling, plain_frequencies


class Yarn(RopeScaling):
    """Channels that turn more than beta_fast times within original_context keep their frequency, those that turn
    less than beta_slow times have it divided by `factor`, with a linear ramp over the channels between; cosines
    and sines are multiplied by an attention factor (arXiv:2309.00071, section 3.4 and equation 22)."""

    factor: float = Field(ge=1.0)
    """How many times further the model reads."""
    original_context: int = Field(gt=0)
    """Tokens of the context of the first training."""
    beta_fast: float = Field(default=32.0, gt=0.0)
    """Turns within original_context from which on a channel keeps its frequency."""
    beta_slow: float = Field(default=1.0, gt=0.0)
    """Turns within original_context up to which a channel is slowed by the whole factor."""
    attention_factor: float | None = Field(default=None, gt=0.0)
    """Factor of cosines and sines. None: 0.1 * ln(factor) + 1, or the quotient that mscale and mscale_all_dim make."""
    mscale: float | None = Field(default=None, gt=0.0)
    """With mscale_all_dim: the attention factor is (0.1 * mscale * ln(factor) + 1) / (0.1 * mscale_all_dim *
    ln(factor) + 1)."""
    mscale_all_dim: float | None = Field(default=None, gt=0.0)
    """See mscale."""
    truncate: bool = True
    """Whether the ends of the ramp are rounded outward to whole channels."""

    @model_validator(mode="after")
    def _means_something(self) -> Self:
        if self.beta_fast <= self.beta_slow:
            raise UserError(
                f"beta_fast={self.beta_fast} is not above beta_slow={self.beta_slow}",
                why="the ramp goes from the one to the other", fix="beta_fast=32, beta_slow=1",
            )
        if (self.mscale is None) != (self.mscale_all_dim is None):
            raise UserError(
                "one of mscale and mscale_all_dim is given without the other",
                why="only their quotient is used, so it would be ignored", fix="give both or neither",
            )
        if self.mscale is not None and self.attention_factor is not None:
            raise UserError(
                "attention_factor is given beside mscale and mscale_all_dim",
                why="the first replaces what the others say", fix="remove mscale and mscale_all_dim",
            )
        return self

    @property
    def magnitude(self) -> float:
        if self.attention_factor is not None:
            return self.attention_factor
        if self.mscale is not None and self.mscale_all_dim is not None:
            return self._magnitude(self.mscale) / self._magnitude(self.mscale_all_dim)
        return self._magnitude(1.0)

    def frequencies(self, size: int, theta: float, length: int) -> Tensor:
        plain = plain_frequencies(size, theta)
        first, last = (self._channel(turns, size, theta) for turns in (self.beta_fast, self.beta_slow))
        if self.truncate:
            first, last = math.floor(first), math.ceil(last)
        first, last = max(first, 0), min(last, size - 1)
        # The published code widens an empty ramp by as much.
        width = last - first if last != first else 0.001
        slowed = ((torch.arange(size // 2, dtype=torch.float64) - first) / width).clamp(0.0, 1.0)
        return (1.0 - slowed) * plain + slowed * plain / self.factor

    def _channel(self, turns: float, size: int, theta: float) -> float:
        """The (fractional) pair of channels that turns so many times within original_context."""
        return size * math.log(self.original_context / (2 * math.pi * turns)) / (2 * math.log(theta))

    def _magnitude(self, scale: float) -> float:
        return 0.1 * scale * math.log(self.factor) + 1.0
