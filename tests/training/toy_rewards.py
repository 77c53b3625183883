"""Rewards of tests."""

from __future__ import annotations

from llmtrainer.core.rollout import Answer

CALLS: list[int] = []
"""How many answers each call was about."""


def share_of_a(answer: Answer) -> float:
    """How much of an answer is the letter a."""
    return answer.text.count("a") / max(len(answer.text), 1)


def counted(answers: list[Answer]) -> list[float]:
    """As share_of_a, and remembers that it was asked."""
    CALLS.append(len(answers))
    return [share_of_a(answer) for answer in answers]


def sometimes(answer: Answer) -> float | None:
    """No reward for answers that begin with an odd id."""
    return None if answer.tokens[0] % 2 else share_of_a(answer)


def length(answer: Answer) -> float:
    """The number of tokens."""
    return float(len(answer.tokens))


def away(answers: list[Answer]) -> list[float | None]:
    """As share_of_a, but no reward for the answers of the second rollout that asks."""
    CALLS.append(len(answers))
    return [None if len(CALLS) == 2 else share_of_a(answer) for answer in answers]


def alike(answer: Answer) -> float:
    """The same for all."""
    return 1.0
