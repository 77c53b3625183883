"""Warm-up, a long time at the peak, and a short way down at the end."""

from __future__ import annotations

import math
from typing import Literal

from pydantic import Field

from llmtrainer.core.schedule import Schedule


class WarmupStableDecay(Schedule):
    """Hu 2024, arXiv:2404.06395, section 4.2. A checkpoint from before the way down can be trained further, with
    another length; only the way down must be made again."""

    final_ratio: float = Field(default=0.0, ge=0.0, le=1.0)
    """Last learning rate divided by `peak`. A ratio, so a change of `peak` keeps the shape."""

    cooldown_share: float = Field(default=0.2, gt=0.0, le=1.0)
    """Share of the length, at its end, that the way down takes."""

    cooldown: Literal["linear", "sqrt", "cosine"] = "sqrt"
    """The way down after a share x of it: 1 - x; 1 - sqrt(x), steep at first (Haegele 2024, arXiv:2405.18392,
    eq. 1); or half a cosine."""

    def shape(self, share: float, warm_share: float) -> float:
        x = min(max((share - (1.0 - self.cooldown_share)) / self.cooldown_share, 0.0), 1.0)
        left = {"linear": 1.0 - x, "sqrt": 1.0 - math.sqrt(x), "cosine": 0.5 * (1.0 + math.cos(math.pi * x))}
        return self.final_ratio + (1.0 - self.final_ratio) * left[self.cooldown]

    def room_for_warmup(self) -> float:
        return 1.0 - self.cooldown_share
