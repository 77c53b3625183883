"""People putting answers in order, or grading them: what is asked, what a reply means, what is already known.

No terminal and no page: whatever shows it asks `waiting` what to show and hands `place` a reply.
"""

from __future__ import annotations

import json
import os
import re
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from llmtrainer.base.errors import UserError


@dataclass(frozen=True)
class Question:
    """Answers to one prompt, in no order."""

    prompt: Any
    """A text, or messages: written back as it was."""
    answers: tuple[Any, ...]

    @property
    def key(self) -> str:
        """The same question, in whichever order its answers stand."""
        return json.dumps([self.prompt, sorted(Counter(map(_text, self.answers)).items())], sort_keys=True)


class Ranking:
    """Questions, of which some are answered in a file; a reply is added to it at once, so nothing is lost."""

    def __init__(self, questions: Iterable[Question], path: Path) -> None:
        """Reads what the file already holds. UserError where it is none of ours."""
        self.path, self.questions = path, list(questions)
        known = Counter(map(_asked, read(path)))
        self._open: list[Question] = []
        for question in self.questions:
            if known[question.key]:
                known[question.key] -= 1
            else:
                self._open.append(question)

    @property
    def waiting(self) -> Question | None:
        """What to ask now; None where all is answered."""
        return self._open[0] if self._open else None

    @property
    def left(self) -> int:
        """How many questions are open."""
        return len(self._open)

    def place(self, order: Sequence[int]) -> dict[str, Any]:
        """Take a reply to `waiting`: places of its answers, the best first. Returns the record that was written,
        {"prompt", "answers": [the best, ..., the worst]}."""
        question = self._open[0]
        assert len(order) >= 2 and set(order) <= set(range(len(question.answers))) and len(set(order)) == len(order)
        record = {"prompt": question.prompt, "answers": [question.answers[place] for place in order]}
        if len(order) < len(question.answers):
            left_out = set(range(len(question.answers))) - set(order)
            record["left_out"] = [question.answers[place] for place in sorted(left_out)]
        append(self.path, record)
        self._open.pop(0)
        return record

    def skip(self) -> None:
        """Ask `waiting` another time: it stays open for the next session."""
        self._open.pop(0)


def order(reply: str, answers: int) -> list[int]:
    """Places, from 0, that a reply names, the best first: `2 1 4 3`, `2>1>4>3`, `2143`. Answers that it leaves out are
    not ranked; two at least must be. ValueError says in words what is wrong."""
    words = re.findall(r"\d+", reply)
    if len(words) == 1 and answers < 10:
        words = list(words[0])
    if not words or re.search(r"[^\d\s>,;]", reply):
        example = " ".join(str(place) for place in range(1, answers + 1))
        raise ValueError(f"write the numbers from the best to the worst, such as {example}")
    places = [int(word) - 1 for word in words]
    if outside := [place + 1 for place in places if not 0 <= place < answers]:
        raise ValueError(f"there is no answer {outside[0]}")
    if len(set(places)) < len(places):
        twice = next(place for place in places if places.count(place) > 1)
        raise ValueError(f"answer {twice + 1} is named twice")
    if len(places) < 2:
        raise ValueError("name at least two answers")
    return places


def grade(reply: str, least: float, most: float) -> float:
    """The number of a reply. ValueError says in words what is wrong."""
    try:
        value = float(reply.strip())
    except ValueError:
        raise ValueError(f"write a number from {least:g} to {most:g}") from None
    if not least <= value <= most:
        raise ValueError(f"{value:g} is not from {least:g} to {most:g}")
    return value


def read(path: Path) -> list[dict[str, Any]]:
    """The records of a file of replies; none where there is no file. A last line that breaks off, as after a crash, is
    not counted. UserError where a line is none."""
    if not path.exists():
        return []
    lines = path.read_bytes().split(b"\n")
    found = []
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        try:
            record = json.loads(line)
            if not isinstance(record, dict) or not {"prompt"} < set(record):
                raise ValueError("no `prompt`")
        except ValueError as error:
            if number == len(lines):     # behind the last line end
                continue
            raise UserError(
                "this file holds something else than replies", where=f"{path}, line {number:,}", why=str(error),
                fix="name another file to write to",
            ) from None
        found.append(record)
    return found


def append(path: Path, record: Mapping[str, Any]) -> None:
    """Add one line, on the disk before this returns. What a crash left of a line is removed first."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("a+b") as file:
        size = file.seek(0, os.SEEK_END)
        if size:
            file.seek(0)
            whole = file.read().rfind(b"\n") + 1
            if whole < size:
                file.truncate(whole)
        file.write(_line(record).encode() + b"\n")
        file.flush()
        os.fsync(file.fileno())


def _line(record: Mapping[str, Any]) -> str:
    text = json.dumps(record, ensure_ascii=False)
    # Half a pair of surrogates, which a model may write, is no UTF-8 and can only be told by its number.
    return json.dumps(record) if any("\ud800" <= letter <= "\udfff" for letter in text) else text


def _asked(record: Mapping[str, Any]) -> str:
    """The key of the question that a record answers."""
    answers = record.get("answers")
    if not isinstance(answers, list):
        raise UserError("this file holds no ranked answers", fix="name another file to write to")
    return Question(record["prompt"], (*answers, *record.get("left_out", ()))).key


def _text(value: Any) -> str:
    return value if isinstance(value, str) else json.dumps(value, sort_keys=True, ensure_ascii=False)
