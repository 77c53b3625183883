"""The answers of one rollout in their groups: what they earned, and what is told about them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from llmtrainer.core.protocols import Reward
from llmtrainer.core.rollout import Answer, Prompt, Rollout
from llmtrainer.generation.loop import Completion


@dataclass(frozen=True)
class Group:
    """The answers to one prompt."""

    prompt: Prompt
    written: tuple[Completion, ...]
    answers: tuple[Answer, ...]
    reward_G: NDArray[np.float64]
    """NaN where no reward could be worked out."""
    parts: Mapping[str, NDArray[np.float64]]
    """Each reward by its name, without its weight."""

    @property
    def teaches(self) -> bool:
        """Whether some answer earned more than another."""
        known = self.reward_G[~np.isnan(self.reward_G)]
        return len(known) > 1 and bool(known.max() > known.min())


def figures_of(groups: Sequence[Group]) -> dict[str, float]:
    """What a rollout came to: rewards, lengths, how answers ended."""
    reward_R = np.concatenate([group.reward_G for group in groups])
    written = [one for group in groups for one in group.written]
    known = reward_R[~np.isnan(reward_R)]
    figures = {
        "reward/mean": float(known.mean()) if len(known) else float("nan"),
        "reward/std": float(known.std()) if len(known) else float("nan"),
        "rollout/length": float(np.mean([len(one.tokens) for one in written])),
        "rollout/ended": float(np.mean([one.finish != "length" for one in written])),
        "rollout/flat_groups": float(np.mean([not group.teaches for group in groups])),
        "rollout/failed": float(np.isnan(reward_R).mean()),
    }
    for name in groups[0].parts:
        scores = np.concatenate([group.parts[name] for group in groups])
        if not np.isnan(scores).all():
            figures[f"reward/{name}"] = float(np.nanmean(scores))
    return figures


def samples_of(groups: Sequence[Group], most: int = 4) -> list[dict[str, Any]]:
    """An answer of the first few groups, for people."""
    return [
        {"prompt": [vars(message)["content"] for message in group.prompt.messages], "answer": group.answers[0].text,
         "reward": None if np.isnan(group.reward_G[0]) else float(group.reward_G[0]), "finish": group.answers[0].finish}
        for group in groups[:most]
    ]  # fmt: skip


def joined(groups: Sequence[Group], version: str) -> Rollout:
    flat = [(number, group, place) for number, group in enumerate(groups) for place in range(len(group.written))]
    answers = tuple(np.array(group.written[place].tokens, dtype=np.int64) for _, group, place in flat)
    return Rollout(
        prompts=tuple(np.array(group.prompt.tokens, dtype=np.int64) for _, group, _ in flat),
        answers=answers,
        weights=tuple(np.ones(len(answer), dtype=np.float32) for answer in answers),
        old_logp=tuple(
            np.array([one.model for one in group.written[place].logprobs or ()], dtype=np.float64)
            for _, group, place in flat
        ),
        group_R=np.array([number for number, _, _ in flat], dtype=np.int64),
        reward_R=np.concatenate([group.reward_G for group in groups]),
        ended_R=np.array([group.written[place].finish != "length" for _, group, place in flat]),
        version=version,
    )


def scored(reward: Reward, answers: Sequence[Answer]) -> NDArray[np.float64]:
    scores = reward.score(answers)
    assert len(scores) == len(answers), f"{type(reward).__name__} scored {len(scores)} of {len(answers)} answers"
    return np.array([np.nan if score is None else score for score in scores], dtype=np.float64)
