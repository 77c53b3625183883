"""The answers of one rollout in their groups: what they earned, and what is told about them."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from llmtrainer.core.protocols import Reward
from llmtrainer.core.rollout import Answer, Prompt, Rollout, Verdict
from llmtrainer.generation.sampler import Sampled


@dataclass(frozen=True)
class Group:
    """The answers to one prompt."""

    prompt: Prompt
    written: tuple[Sampled, ...]
    answers: tuple[Answer, ...]
    reward_G: NDArray[np.float64]
    """NaN where no reward could be worked out."""
    verdicts: Mapping[str, Sequence[Verdict]]
    """What each reward said of each answer, by the reward's name, without its weight."""

    @property
    def teaches(self) -> bool:
        """Whether some answer earned more than another."""
        known = self.reward_G[~np.isnan(self.reward_G)]
        return len(known) > 1 and bool(known.max() > known.min())


@dataclass(frozen=True)
class Scores:
    """What rewards say of some answers."""

    total_R: NDArray[np.float64]
    """The weighted sum; NaN where one of them could not be worked out."""
    verdicts: Mapping[str, Sequence[Verdict]]

    def of(self, part: slice) -> dict[str, Sequence[Verdict]]:
        """The verdicts of some of the answers."""
        return {name: verdicts[part] for name, verdicts in self.verdicts.items()}


def scored(rewards: Sequence[Reward], answers: Sequence[Answer]) -> Scores:
    """Each reward is asked once for all answers."""
    verdicts = {reward.title: reward.verdicts(answers) for reward in rewards}
    for name, found in verdicts.items():
        assert len(found) == len(answers), f"{name} scored {len(found)} of {len(answers)} answers"
    total_R = np.zeros(len(answers))
    for reward in rewards:
        total_R += reward.weight * _values(verdicts[reward.title])
    return Scores(total_R, verdicts)


def joined(groups: Sequence[Group]) -> Rollout:
    """The answers of all groups side by side. Their log-probabilities are those that sampling saw."""
    flat = [(number, group, one) for number, group in enumerate(groups) for one in group.written]
    answers = tuple(np.array(one.tokens, dtype=np.int64) for _, _, one in flat)
    return Rollout(
        prompts=tuple(np.array(group.prompt.tokens, dtype=np.int64) for _, group, _ in flat),
        answers=answers,
        weights=tuple(np.ones(len(answer), dtype=np.float32) for answer in answers),
        old_logp=tuple(one.sampled_logp for _, _, one in flat),
        group_R=np.array([number for number, _, _ in flat], dtype=np.int64),
        reward_R=np.concatenate([group.reward_G for group in groups]),
        ended_R=np.array([one.finish != "length" for _, _, one in flat]),
        version=flat[0][2].version,
    )


def figures_of(groups: Sequence[Group]) -> dict[str, float]:
    """What a rollout came to: rewards, lengths, how answers ended, and in which share of them a reward gave which
    reason."""
    reward_R = np.concatenate([group.reward_G for group in groups])
    written = [one for group in groups for one in group.written]
    known = reward_R[~np.isnan(reward_R)]
    figures = {
        "rollout/length": float(np.mean([len(one.tokens) for one in written])),
        "rollout/ended": float(np.mean([one.finish != "length" for one in written])),
    }
    if not groups[0].verdicts:
        return figures    # nobody said what an answer is worth
    figures |= {
        "rollout/flat_groups": float(np.mean([not group.teaches for group in groups])),
        "rollout/failed": float(np.isnan(reward_R).mean()),
    }
    if len(known):
        figures |= {"reward/mean": float(known.mean()), "reward/std": float(known.std())}
    for name in groups[0].verdicts:
        values = np.concatenate([_values(group.verdicts[name]) for group in groups])
        if not np.isnan(values).all():
            figures[f"reward/{name}"] = float(np.nanmean(values))
        reasons = Counter(verdict.reason for group in groups for verdict in group.verdicts[name] if verdict.reason)
        figures |= {f"reward/{name}/{reason}": reasons[reason] / len(values) for reason in sorted(reasons)}
    return figures


def examined_figures(figures: Mapping[str, float]) -> dict[str, float]:
    """Those of answers that only show what the policy can: `reward`, its parts, `length` and `ended`."""
    kept = {"reward/mean": "reward", "rollout/length": "length", "rollout/ended": "ended", "rollout/failed": "failed"}
    found = {new: figures[name] for name, new in kept.items() if name in figures}
    parts = {name: value for name, value in figures.items() if name.startswith("reward/")}
    return found | {name: value for name, value in parts.items() if name not in ("reward/mean", "reward/std")}


def samples_of(groups: Sequence[Group], most: int = 4) -> list[dict[str, Any]]:
    """An answer of the first few groups, for people."""
    return [
        {
            "prompt": [message.content for message in group.prompt.messages], "answer": group.answers[0].text,
            "reward": None if np.isnan(group.reward_G[0]) else float(group.reward_G[0]),
            "finish": group.answers[0].finish,
        }
        for group in groups[:most]
    ]


def _values(verdicts: Sequence[Verdict]) -> NDArray[np.float64]:
    return np.array([np.nan if verdict.value is None else verdict.value for verdict in verdicts], dtype=np.float64)
