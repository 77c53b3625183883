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
from llmtrainer.training.turns import Conversation


@dataclass(frozen=True)
class Group:
    """The answers to one prompt."""

    prompt: Prompt
    written: tuple[Sampled, ...]
    """What was sampled of each; of a conversation, all turns of the policy as one."""
    answers: tuple[Answer, ...]
    reward_G: NDArray[np.float64]
    """NaN where no reward could be worked out."""
    verdicts: Mapping[str, Sequence[Verdict]]
    """What each reward said of each answer, by the reward's name, without its weight."""
    talks: tuple[Conversation, ...] = ()
    """The conversations that the answers are, where an environment takes part."""

    @property
    def teaches(self) -> bool:
        """Whether some answer earned more than another."""
        known = self.reward_G[~np.isnan(self.reward_G)]
        return len(known) > 1 and bool(known.max() > known.min())

    @property
    def ended_G(self) -> NDArray[np.bool_]:
        """Whether each came to its end by itself: a conversation, where its environment said so."""
        whole = np.array([one.finish != "length" for one in self.written])
        return whole & np.array([talk.end == "done" for talk in self.talks]) if self.talks else whole

    def tokens(self, place: int) -> NDArray[np.int64]:
        """What follows the prompt, with what an environment said in between."""
        return np.array(self.talks[place].tokens if self.talks else self.written[place].tokens, dtype=np.int64)

    def weights(self, place: int) -> NDArray[np.float32]:
        """1 for each of these that was sampled, 0 for the others."""
        if self.talks:
            return np.array(self.talks[place].weights, dtype=np.float32)
        return np.ones(len(self.written[place].tokens), dtype=np.float32)

    def logp(self, place: int) -> NDArray[np.float64]:
        """What sampling saw of each of these that was sampled; 0 for the others."""
        if not self.talks:
            return self.written[place].sampled_logp
        drawn = self.weights(place) > 0
        found = np.zeros(len(drawn))
        found[drawn] = self.written[place].sampled_logp
        return found


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
    flat = [(number, group, place) for number, group in enumerate(groups) for place in range(len(group.written))]
    return Rollout(
        prompts=tuple(np.array(group.prompt.tokens, dtype=np.int64) for _, group, _ in flat),
        answers=tuple(group.tokens(place) for _, group, place in flat),
        weights=tuple(group.weights(place) for _, group, place in flat),
        old_logp=tuple(group.logp(place) for _, group, place in flat),
        group_R=np.array([number for number, _, _ in flat], dtype=np.int64),
        reward_R=np.concatenate([group.reward_G for group in groups]),
        ended_R=np.concatenate([group.ended_G for group in groups]),
        version=groups[0].written[0].version,
    )


def figures_of(groups: Sequence[Group]) -> dict[str, float]:
    """What a rollout came to: rewards, lengths, how answers ended, in which share of them a reward gave which reason;
    of conversations, how many turns they had, and how many of these the environment could not use."""
    reward_R = np.concatenate([group.reward_G for group in groups])
    written = [one for group in groups for one in group.written]
    known = reward_R[~np.isnan(reward_R)]
    figures = {
        "rollout/length": float(np.mean([len(one.tokens) for one in written])),
        "rollout/ended": float(np.concatenate([group.ended_G for group in groups]).mean()),
    }
    if talks := [talk for group in groups for talk in group.talks]:
        figures["rollout/turns"] = float(np.mean([len(talk.said) for talk in talks]))
        figures["rollout/errors"] = float(np.mean([sum(heard.error for heard in talk.heard) for talk in talks]))
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
            "prompt": [message.content for message in group.answers[0].prompt], "answer": group.answers[0].text,
            "reward": None if np.isnan(group.reward_G[0]) else float(group.reward_G[0]),
            "finish": group.answers[0].finish,
        }
        for group in groups[:most]
    ]


def _values(verdicts: Sequence[Verdict]) -> NDArray[np.float64]:
    return np.array([np.nan if verdict.value is None else verdict.value for verdict in verdicts], dtype=np.float64)
