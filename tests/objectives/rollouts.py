"""Answers and what they earned, as objectives that learn from their own answers meet them."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from llmtrainer.core.rollout import Rollout


def rollout_of(
    rewards: Sequence[float], groups: Sequence[int], lengths: Sequence[int] | None = None, **more: object
) -> Rollout:
    """Answers of so many tokens each, two unless named, every token sampled."""
    sizes = [2] * len(rewards) if lengths is None else list(lengths)
    fields: dict[str, object] = {
        "prompts": tuple(np.zeros(3, dtype=np.int64) for _ in sizes),
        "answers": tuple(np.arange(size, dtype=np.int64) for size in sizes),
        "weights": tuple(np.ones(size, dtype=np.float32) for size in sizes),
        "old_logp": tuple(np.full(size, -1.0) for size in sizes),
        "group_R": np.array(groups, dtype=np.int64),
        "reward_R": np.array(rewards, dtype=np.float64),
        "ended_R": np.ones(len(sizes), dtype=np.bool_),
        "version": "0",
        **more,
    }
    return Rollout(**fields)  # type: ignore[arg-type]
