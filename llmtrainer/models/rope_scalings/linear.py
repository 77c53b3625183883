"""Positions divided by a factor (position interpolation)."""

from __future__ import annotations

from pydantic import Field
from torch import Tensor

from llmtrainer.models.rotary import RopeScaling, plain_frequencies


class Linear(RopeScaling):
    """Every angle is that of position / factor (arXiv:2306.15595)."""

    factor: float = Field(ge=1.0)
    """How many times further the model reads."""

    def frequencies(self, size: int, theta: float, length: int) -> Tensor:
        return plain_frequencies(size, theta) / self.factor
