"""Warm-up, then half a cosine down to a share of the peak, then that share for ever."""

from __future__ import annotations

import math

from pydantic import Field

from llmtrainer.core.schedule import Schedule


class Cosine(Schedule):
    """Half a cosine from `peak` to `final_ratio * peak` (Loshchilov and Hutter 2017, arXiv:1608.03983, eq. 5,
    one period)."""

    final_ratio: float = Field(default=0.1, ge=0.0, le=1.0)
    """Last learning rate divided by `peak`. A ratio, so a change of `peak` keeps the shape."""

    decay_share: float = Field(default=1.0, gt=0.0, le=1.0)
    """Share of the length at which the last rate is reached; constant afterwards."""

    def shape(self, share: float, warm_share: float) -> float:
        if max(share, warm_share) >= self.decay_share:
            return self.final_ratio
        passed = (share - warm_share) / (self.decay_share - warm_share)
        return self.final_ratio + (1.0 - self.final_ratio) * 0.5 * (1.0 + math.cos(math.pi * passed))

    def room_for_warmup(self) -> float:
        return self.decay_share
