"""What rewards share: one answer at a time, what its record must hold, and the figures of many verdicts."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from typing import Any, ClassVar

from llmtrainer.base.errors import UserError
from llmtrainer.base.text import did_you_mean
from llmtrainer.core.protocols import Reward
from llmtrainer.core.rollout import Answer, Verdict

Scorer = Callable[[Sequence[Answer]], Sequence[float]]
"""Answers -> what a trained model says each is worth."""


class Rule(Reward):
    """A reward that looks at one answer at a time, so that what goes wrong with one costs no other."""

    refuses: ClassVar[tuple[type[Exception], ...]] = (UserError,)
    """What stops a run; any other exception costs the one answer."""

    def judge(self, answer: Answer) -> Verdict:
        """What one answer earned."""
        raise NotImplementedError

    def verdicts(self, answers: Sequence[Answer]) -> list[Verdict]:
        return [self._safely(answer) for answer in answers]

    def score(self, answers: Sequence[Answer]) -> list[float | None]:
        return [verdict.value for verdict in self.verdicts(answers)]

    def _safely(self, answer: Answer) -> Verdict:
        try:
            return self.judge(answer)
        except self.refuses:
            raise
        except Exception as error:      # whatever a parser says of what a model wrote
            return Verdict(None, type(error).__name__)


def fact(answer: Answer, key: str, needed_by: str) -> Any:
    """What the prompt's record holds under `key`. UserError names the key and the record where it holds nothing."""
    value = answer.facts.get(key)
    if value is None:
        has = ", ".join(f"`{name}`" for name in answer.facts) or "nothing beside the prompt"
        raise UserError(
            f"a record has no `{key}`, which the reward `{needed_by}` needs", where=f"the record of {shown(answer)}",
            why=f"it has: {has}",
            fix=did_you_mean(key, answer.facts) or "name the key that your records have, or add it to them",
        )  # fmt: skip
    return value


def shown(answer: Answer) -> str:
    """The prompt of an answer in one line, for people."""
    name = next((f"{answer.facts[key]}: " for key in ("id", "name", "task_id") if key in answer.facts), "")
    text = " ".join((answer.prompt[-1].content if answer.prompt else "a prompt of tokens").split())
    return f"{name}`{text if len(text) <= 80 else text[:77] + '...'}`"


def checked(value: object) -> Verdict:
    """The verdict of a number that somebody else worked out: only a finite number counts."""
    if value is None:
        return Verdict(None, "gave None")
    if hasattr(value, "item") and getattr(value, "ndim", 0) == 0:      # a scalar of numpy or torch
        value = value.item()
    if not isinstance(value, bool | int | float):
        return Verdict(None, "gave no number")
    try:
        number = float(value)
    except OverflowError:
        return Verdict(None, "gave no finite number")
    return Verdict(number) if math.isfinite(number) else Verdict(None, "gave no finite number")


def every(reward: Reward) -> Iterator[Reward]:
    """A reward and, however deep, all that it is made of."""
    yield reward
    for part in reward.parts:
        yield from every(part)


def figures(reward: Reward, verdicts: Sequence[Verdict]) -> dict[str, float]:
    """What is reported of many verdicts: the mean of those that have a value, the mean of each part by its name, how
    many answers could not be judged, and how often each reason was given."""
    found = {"reward/mean": _mean([verdict.value for verdict in verdicts])}
    if not any(verdict.parts for verdict in verdicts):
        found[f"reward/{reward.title}"] = found["reward/mean"]
    for name in sorted({name for verdict in verdicts for name in verdict.parts}):
        found[f"reward/{name}"] = _mean([verdict.parts.get(name) for verdict in verdicts])
    found["reward/failed"] = float(sum(verdict.value is None for verdict in verdicts))
    reasons = Counter(verdict.reason for verdict in verdicts if verdict.reason is not None)
    found |= {f"reward/why/{reason}": float(reasons[reason]) for reason in sorted(reasons)}
    return {name: value for name, value in found.items() if not math.isnan(value)}


def _mean(values: Sequence[float | None]) -> float:
    known = [value for value in values if value is not None]
    return math.fsum(known) / len(known) if known else math.nan
