"""Rewards that wait for something, or fail."""

from __future__ import annotations

import os
import select
import threading

from llmtrainer.base.errors import UserError
from llmtrainer.core.rollout import Answer

CALLS: list[int] = []
BOTH = threading.Barrier(2)


class Broken(Exception):
    """Cannot be made from a text alone."""

    def __init__(self, code: int, why: str) -> None:
        super().__init__(f"{code}: {why}")


def share_of_a(answers: list[Answer]) -> list[float | None]:
    """How much of an answer is the letter a; none where three divides its first id."""
    return [None if one.tokens[0] % 3 == 0 else one.text.count("a") / max(len(one.text), 1) for one in answers]


def behind_a_gate(answers: list[Answer]) -> list[float]:
    """From the second call on, waits until somebody has opened the gate."""
    CALLS.append(len(answers))
    if len(CALLS) == 2:
        ready, _, _ = select.select([os.open(os.environ["GATE"], os.O_RDWR)], [], [], 60)
        if not ready:
            raise UserError("nobody trains meanwhile")
    return [float(len(one.tokens)) for one in answers]


def two_together(answers: list[Answer]) -> list[float]:
    """Waits until a second call is there."""
    try:
        BOTH.wait(60)
    except threading.BrokenBarrierError:
        raise UserError("one rollout is scored at a time") from None
    return [float(len(one.tokens)) for one in answers]


def refuses(answer: Answer) -> float:
    raise UserError("the judge is not at home", where="a test", why="it is late", fix="come back tomorrow")


def breaks(text: str) -> tuple[bool, str]:
    raise Broken(7, "the environment is out of order")
