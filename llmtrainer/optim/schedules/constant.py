"""Warm-up, then the peak for ever."""

from __future__ import annotations

from llmtrainer.core.schedule import Schedule


class Constant(Schedule):
    """The rate stays at `peak`: a run may be extended without asking how long it was meant to be."""

    def shape(self, share: float, warm_share: float) -> float:
        return 1.0
