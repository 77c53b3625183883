"""rank: a person puts answers in order at the terminal, which gives training data for reward models and preferences."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

from pydantic import Field

from llmtrainer.base.config import Config
from llmtrainer.base.errors import UserError
from llmtrainer.base.result import Result
from llmtrainer.core.ranking import Question, Ranking, order
from llmtrainer.data.document import Reading
from llmtrainer.data.open import find
from llmtrainer.data.records import records

HELP = "the numbers from the best to the worst (2 1 4 3; leave out what you cannot place), s to skip, q to stop: "


class Rank(Config):
    """Which answers to put in order."""

    words: ClassVar[tuple[str, ...]] = ("source", "out")

    source: str
    """Records with a prompt and several answers, `{"prompt", "answers": [...]}`; or a text file, of which so many
    lines as `each` says are answers to one prompt."""

    out: str
    """The file to add to: JSON lines `{"prompt", "answers": [the best, ..., the worst]}`, which a recipe takes for
    ranked answers. What stands there already is not asked again."""

    each: int = Field(default=4, ge=2)
    """Lines of a text file that belong together."""

    prompt: str = ""
    """For a text file: what its lines answer."""

    answers: str = "answers"
    """The key of the answers in a record."""

    question: str = "prompt"
    """The key of the prompt in a record."""


@dataclass(frozen=True)
class Ranked(Result):
    """What is in the file now."""

    path: str
    ranked: int
    """Questions that were answered in this session."""
    left: int
    """Questions that nobody has answered yet."""


def rank(settings: Rank) -> Ranked:
    """Ask until nothing is left or the person stops. UserError where the source holds nothing to put in order."""
    ranking = Ranking(questions(settings), Path(settings.out))
    total = len(ranking.questions)
    answered = skipped = 0
    while (question := ranking.waiting) is not None:
        _show(question, total - ranking.left - skipped + 1, total)
        reply = _reply()
        if reply is None or reply in ("q", "quit"):
            break
        if reply in ("s", "skip"):
            ranking.skip()
            skipped += 1
            continue
        try:
            ranking.place(order(reply, len(question.answers)))
            answered += 1
        except ValueError as error:
            print(error, file=sys.stderr)
    return Ranked(settings.out, answered, ranking.left + skipped)


def questions(settings: Rank) -> list[Question]:
    """What a source asks. UserError names the record that has no several answers."""
    path = Path(settings.source)
    if path.suffix == ".txt":
        return list(_of_lines(path, settings))
    return list(_of_records(settings))


def _of_lines(path: Path, settings: Rank) -> Iterator[Question]:
    if not path.is_file():
        raise UserError(f"there is no file `{path}`", fix="check the path")
    lines = [line.strip() for line in path.read_text(encoding="utf-8").splitlines() if line.strip()]
    if not lines or len(lines) % settings.each:
        raise UserError(
            f"{len(lines):,} lines are no groups of {settings.each}", where=str(path),
            why="every group of lines is put in order", fix=f"each={len(lines)}" if len(lines) > 1 else None,
        )
    for start in range(0, len(lines), settings.each):
        yield Question(settings.prompt, tuple(lines[start : start + settings.each]))


def _of_records(settings: Rank) -> Iterator[Question]:
    key, asked = settings.answers, settings.question
    for file in find(settings.source):
        for record in records(file, Reading(whole=True)):
            value: Any = record.value
            where = f"{record.file}, record {record.number:,}"
            if not isinstance(value, dict) or asked not in value or not isinstance(value.get(key), list):
                has = ", ".join(f"`{name}`" for name in value) if isinstance(value, dict) else "no keys"
                raise UserError(
                    f"a record has no `{asked}` with a list of `{key}`", where=where, why=f"it has: {has}",
                    fix="question=KEY answers=KEY",
                )
            if len(value[key]) < 2:
                raise UserError("a record has only one answer", where=where, fix="leave it out")
            yield Question(value[asked], tuple(value[key]))


def _show(question: Question, number: int, total: int) -> None:
    lines = [f"\n[{number:,} of {total:,}] {_words(question.prompt)}"]
    lines += [f"  ({place}) {_words(answer)}" for place, answer in enumerate(question.answers, start=1)]
    print("\n".join(lines), file=sys.stderr)


def _reply() -> str | None:
    """A line of the person's; None at the end of the input."""
    print(HELP, end="", file=sys.stderr, flush=True)
    line = sys.stdin.readline()
    return line.strip() if line else None


def _words(value: Any) -> str:
    """A text, or the texts of messages."""
    if isinstance(value, list):
        return " / ".join(map(_words, value))
    return str(value.get("content", value)) if isinstance(value, dict) else str(value)
