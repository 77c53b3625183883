"""Warm-up, then a straight line down to a share of the peak, then that share for ever."""

from __future__ import annotations

from pydantic import Field

from llmtrainer.core.schedule import Schedule


class Linear(Schedule):
    """A straight line from `peak` to `final_ratio * peak`."""

    final_ratio: float = Field(default=0.0, ge=0.0, le=1.0)
    """Last learning rate divided by `peak`. A ratio, so a change of `peak` keeps the shape."""

    decay_share: float = Field(default=1.0, gt=0.0, le=1.0)
    """Share of the length at which the last rate is reached; constant afterwards."""

    def shape(self, share: float, warm_share: float) -> float:
        if max(share, warm_share) >= self.decay_share:
            return self.final_ratio
        passed = (share - warm_share) / (self.decay_share - warm_share)
        return self.final_ratio + (1.0 - self.final_ratio) * (1.0 - passed)

    def room_for_warmup(self) -> float:
        return self.decay_share
