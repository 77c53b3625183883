"""Slow frequencies divided by a factor, fast ones kept, a ramp between them: Llama 3.1's."""

from __future__ import annotations

import math
from typing import Self

from pydantic import Field, model_validator
from torch import Tensor

from llmtrainer.base.errors import UserError
from llmtrainer.models.rotary import RopeScaling, plain_frequencies


class Llama3(RopeScaling):
    """A frequency that turns at least high_freq_factor times within original_context stays, one that turns at most
    low_freq_factor times is divided by `factor`, and between them the share that stays rises linearly with the
    turns (arXiv:2407.21783, section 3.4.2; the published Llama 3.1 code)."""

    factor: float = Field(ge=1.0)
    """How much slower the slow frequencies turn."""
    original_context: int = Field(gt=0)
    """Tokens of the context of the first training."""
    low_freq_factor: float = Field(default=1.0, gt=0.0)
    """Turns within original_context up to which a frequency is slow."""
    high_freq_factor: float = Field(default=4.0, gt=0.0)
    """Turns within original_context from which on a frequency is fast."""

    @model_validator(mode="after")
    def _has_a_ramp(self) -> Self:
        if self.high_freq_factor <= self.low_freq_factor:
            raise UserError(
                f"high_freq_factor={self.high_freq_factor} is not above low_freq_factor={self.low_freq_factor}",
                why="the ramp goes from the one to the other",
                fix=f"high_freq_factor={4 * self.low_freq_factor:g}",
            )
        return self

    def frequencies(self, size: int, theta: float, length: int) -> Tensor:
        plain = plain_frequencies(size, theta)
        turns = plain * self.original_context / (2 * math.pi)
        kept = ((turns - self.low_freq_factor) / (self.high_freq_factor - self.low_freq_factor)).clamp(0.0, 1.0)
        return kept * plain + (1.0 - kept) * plain / self.factor
