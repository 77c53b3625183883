"""What rewards need before a run begins: the models that they name, and whatever else must be there."""

from __future__ import annotations

from collections.abc import Sequence

from llmtrainer.core.protocols import Reward
from llmtrainer.core.reward import every
from llmtrainer.rewards.model import Model
from llmtrainer.training.scoring import Judge, open_judge


def ready(rewards: Sequence[Reward]) -> None:
    """Load every reward model, once where several rewards name the same, and ask each reward whether it can judge.
    UserError where one cannot: before the first answer is written, and not after hours."""
    judges: dict[tuple[str, str | None], Judge] = {}
    for reward in (part for whole in rewards for part in every(whole)):
        if isinstance(reward, Model):
            wanted = (reward.path, reward.template)
            if wanted not in judges:
                judges[wanted] = open_judge(reward.path, template=reward.template)
            reward.attach(judges[wanted])
        reward.require()
