"""Adam's scaling from row and column means alone, so that a matrix needs hardly any state."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar, Literal

import torch
from pydantic import Field

from llmtrainer.core.protocols import Rule


class Adafactor(Rule):
    """Shazeer and Stern 2018, arXiv:1804.04235, algorithms 4 and 5, without momentum; computed by torch.

    The learning rate is relative: a tensor moves by its own root mean square times the rate, which is never more
    than 1 / sqrt(step). So peaks are larger than AdamW's, near 1e-2."""

    elementwise: ClassVar[bool] = False

    square_decay: float = Field(default=-0.8, ge=-1.0, lt=0.0)
    """The mean square of step t keeps 1 - t to this power (section 7.2): little at first, nearly all later."""

    smallest: float = Field(default=1e-3, gt=0.0, allow_inf_nan=False)
    """What a tensor's root mean square is taken to be at least, so that zeros can begin to move (epsilon 2)."""

    clip: float = Field(default=1.0, ge=1.0, allow_inf_nan=False)
    """Root mean square above which the update of a tensor is scaled down (d in section 6)."""

    weight_decay: float = Field(default=0.1, ge=0.0, allow_inf_nan=False)
    """Share of a matrix taken away per step, times the learning rate. Norms and biases are spared."""

    implementation: Literal["foreach", "plain"] = "plain"
    """A loop, or lists of tensors, which for a moment need as much memory as this rule was chosen to save."""

    def build(self, groups: Sequence[Mapping[str, Any]]) -> torch.optim.Adafactor:
        return torch.optim.Adafactor(
            [{**group, "weight_decay": self.weight_decay * group["decay_multiplier"]} for group in groups],
            lr=0.0,  # every step brings its own
            beta2_decay=self.square_decay,
            eps=(None, self.smallest),
            d=self.clip,
            foreach=self.implementation == "foreach",
        )

    def state_shape(self, what: str, shape: Sequence[int]) -> tuple[int, ...]:
        """A matrix [R, C] has the means of its rows [R, 1] and columns [1, C]; a vector its mean squares."""
        if what == "row_var":
            return (*shape[:-1], 1)
        return (*shape[:-2], 1, shape[-1]) if what == "col_var" else tuple(shape)
