"""A person at the terminal: grades each answer, or puts the answers to a prompt in order."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, ClassVar, Literal, Self

from pydantic import Field, PrivateAttr, model_validator

from llmtrainer.base.errors import UserError
from llmtrainer.core.protocols import Reward
from llmtrainer.core.ranking import append, grade, order, read
from llmtrainer.core.rollout import Answer, Verdict

Ask = Callable[[str], str]
"""Shows a text and returns what the person writes below it."""


class Human(Reward):
    """What a person says an answer is worth. Every reply is kept in a file, and what stands there is not asked again:
    a run that continues asks only what is new."""

    one_process: ClassVar[bool] = True

    path: Path
    """The file of grades, one JSON object a line: {"prompt", "answer", "grade"}."""

    how: Literal["grade", "rank"] = "grade"
    """grade: a number for each answer. rank: the answers to a prompt in order, which grades them in equal steps from
    `most` down to `least`."""

    least: float = -2.0
    """The worst grade."""

    most: float = 2.0
    """The best grade."""

    shown: int = Field(default=2000, ge=1)
    """Characters of a prompt or an answer that are shown, its last ones for a prompt."""

    _ask: Ask | None = PrivateAttr(default=None)

    @model_validator(mode="after")
    def _ordered(self) -> Self:
        if not self.least < self.most:
            raise UserError(f"least={self.least:g} is not below most={self.most:g}", fix="least=-2 most=2")
        return self

    def attach(self, ask: Ask) -> None:
        """Ask through something else than the terminal."""
        self._ask = ask

    def require(self) -> None:
        if self._ask is None and not sys.stdin.isatty():
            raise UserError(
                "answers wait for a person's grade, and nobody is at the terminal", where=str(self.path),
                why="the reward `human` asks on the terminal that the run was started from",
                fix="start the run in a terminal, or grade by another reward",
            )
        _grades(self.path)

    def score(self, answers: Sequence[Answer]) -> list[float | None]:
        return [verdict.value for verdict in self.verdicts(answers)]

    def verdicts(self, answers: Sequence[Answer]) -> list[Verdict]:
        known = {(_key(record["prompt"]), str(record["answer"])): record["grade"] for record in _grades(self.path)}
        asked: dict[str, list[Answer]] = {}
        for answer in answers:
            key = _key(_prompt(answer))
            if (key, answer.text) not in known and answer.text not in [other.text for other in asked.get(key, [])]:
                asked.setdefault(key, []).append(answer)
        for key, group in asked.items():
            for answer, value in zip(group, self._graded(group), strict=True):
                if value is not None:
                    append(self.path, {"prompt": _prompt(answer), "answer": answer.text, "grade": value})
                    known[key, answer.text] = value
        return [
            Verdict(None, "no grade") if (value := known.get((_key(_prompt(answer)), answer.text))) is None
            else Verdict(float(value))
            for answer in answers
        ]  # fmt: skip

    def _graded(self, group: Sequence[Answer]) -> list[float | None]:
        """The grades of new answers to one prompt; None for those that the person passes over."""
        prompt = "\n".join(f"{turn.role}: {turn.content}" for turn in group[0].prompt)[-self.shown :]
        if self.how == "grade" or len(group) == 1:
            return [self._one(f"{prompt}\n\n{answer.text[: self.shown]}\n") for answer in group]
        shown = [f"({place}) {answer.text[: self.shown]}" for place, answer in enumerate(group, start=1)]
        head = f"{prompt}\n\n" + "\n\n".join(shown) + "\n"
        head += "from the best to the worst, empty to pass: "
        places = self._reply(head, lambda reply: order(reply, len(group)))
        if places is None:
            return [None] * len(group)
        step = (self.most - self.least) / (len(places) - 1)
        grades: list[float | None] = [None] * len(group)
        for rank, place in enumerate(places):
            grades[place] = self.most - rank * step
        return grades

    def _one(self, head: str) -> float | None:
        least, most = self.least, self.most
        return self._reply(
            f"{head}grade from {least:g} to {most:g}, empty to pass: ", lambda reply: grade(reply, least, most)
        )

    def _reply(self, text: str, meant: Callable[[str], Any]) -> Any:
        """What the reply means; asked again until it means something, None where it is empty."""
        while True:
            reply = self._asked(text)
            if not reply.strip():
                return None
            try:
                return meant(reply)
            except ValueError as error:
                text = f"{error}: "

    def _asked(self, text: str) -> str:
        if self._ask is not None:
            return self._ask(text)
        self.require()
        print(text, end="", file=sys.stderr, flush=True)
        return sys.stdin.readline()


def _prompt(answer: Answer) -> list[dict[str, str]]:
    return [{"role": turn.role, "content": turn.content} for turn in answer.prompt]


def _key(prompt: Any) -> str:
    return json.dumps(prompt, sort_keys=True)


def _grades(path: Path) -> list[dict[str, Any]]:
    found = read(path)
    for number, record in enumerate(found, start=1):
        value = record.get("grade")
        if "answer" not in record or isinstance(value, bool) or not isinstance(value, int | float):
            raise UserError(
                "this file holds something else than grades", where=f"{path}, record {number:,}",
                fix="name another file: path=grades.jsonl",
            )
    return found
