"""The factor that keeps float16 gradients inside float16's range."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from llmtrainer.base.errors import UserError

LARGEST = 2.0**24
GROW_AFTER = 2_000


@dataclass
class LossScale:
    """A power of two that the loss is multiplied with, and the gradients divided by.

    Halved when a gradient is not finite, doubled after `GROW_AFTER` updates without that (Micikevicius 2018,
    arXiv:1710.03740, section 3.2). A power of two changes exponents only, so scaling itself never rounds.
    """

    scale: float = 2.0**16
    good_updates: int = 0
    """Updates since the scale last changed."""

    def updated(self) -> None:
        self.good_updates += 1
        if self.good_updates >= GROW_AFTER:
            self.scale, self.good_updates = min(self.scale * 2.0, LARGEST), 0

    def overflowed(self) -> None:
        """Halve. Raises UserError at a scale of 1: the range of float16 is then not the reason."""
        if self.scale <= 1.0:
            raise UserError(
                "the gradients are not finite, even with a loss scale of 1",
                why="a smaller scale cannot help: the loss itself overflows float16, or is not a number",
                fix="precision=bfloat16, or a lower optim.schedule.peak",
            )
        self.scale, self.good_updates = self.scale / 2.0, 0

    def state(self) -> dict[str, Tensor]:
        return {
            "engine.loss_scale": torch.tensor(self.scale, dtype=torch.float64),
            "engine.good_updates": torch.tensor(self.good_updates, dtype=torch.int64),
        }

    def load_state(self, state: Mapping[str, Tensor]) -> None:
        self.scale = float(state["engine.loss_scale"])
        self.good_updates = int(state["engine.good_updates"])
