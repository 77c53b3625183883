"""One answer, or one text, and the class that somebody graded it with."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

from llmtrainer.core.example import Comparison, Message
from llmtrainer.data.compared import NAMES, Turns, answer_of, first_key, has_one_answer, one_answer, told
from llmtrainer.data.format import (
    BESIDE,
    ComparisonFormat,
    identity,
    mapping,
    needed,
    others,
    refused,
    require_plain,
    tools,
)

GRADES = ("grade", "rating", "stars")
_TEXT: tuple[str, ...] = ("text",)
"""The key of a text that answers nothing."""


class Graded(ComparisonFormat):
    """`{"prompt", "completion", "grade"}`, or `{"text", "grade"}` for a text alone, where the grade is a whole number,
    or the first and the last of several that it may be: `[2, 3]`. Prompt and completion are texts, joined as they
    stand, or messages; or `{"messages", "grade"}`, whose last turn is graded. `response` and `answer` are names for the
    completion, `rating` and `stars` for the grade."""

    grade: str | None = None
    """The key of the grade. Left out: grade, rating or stars."""

    lowest: int = 0
    """The number that the file gives to its worst class: 1 for one to five stars. Classes of a model count from 0."""

    as_messages: bool = False
    """Whether the chat template stands around a prompt and a completion that are texts."""

    sample: ClassVar[tuple[Any, Comparison]] = (
        {"prompt": "2 + 3 = ", "completion": "6", "grade": 1},
        Comparison((Message("user", "2 + 3 = "),), ((Message("assistant", "6"),),), grade=(1, 2), plain=True),
    )

    def matches(self, record: object) -> bool:
        if not isinstance(record, dict) or not _is_grade(record.get(self._key(record))):
            return False
        return isinstance(record.get("text"), str) or has_one_answer(record)

    def example(self, record: object) -> Comparison:
        whole = mapping(record)
        key = self._key(whole)
        grade = self._classes(needed(whole, key), key)
        prompt: Turns = (Message("user", ""),)
        plain, used = True, _TEXT
        if "text" in whole:
            require_plain(whole, "a text alone")
            answer = answer_of(told(whole["text"], "text"), "text")
        else:
            prompt, answer, plain, used = one_answer(whole, as_messages=self.as_messages, what="grade")
        return Comparison(
            prompt, (answer,), grade=grade, tools=tools(whole), plain=plain, name=identity(whole, *NAMES),
            facts=others(whole, *used, key, *BESIDE, *NAMES),
        )

    def _key(self, record: Mapping[str, Any]) -> str:
        return self.grade or first_key(record, GRADES)

    def _classes(self, value: object, key: str) -> tuple[int, int]:
        """From which class to below which."""
        if not _is_grade(value):
            refused(f"`{key}` is {value!r} where a grade is wanted", key, "a whole number, or the first and the last")
        ends = [_whole(item) for item in (value if isinstance(value, list) else [value])]
        first, last = ends[0] - self.lowest, ends[-1] - self.lowest
        if not 0 <= first <= last:
            refused(
                f"`{key}` is {value!r}, and the worst grade is {self.lowest}", key,
                "a grade counts from the worst class on, and of two numbers the smaller comes first",
                "data.format.lowest=1 where grades begin at 1",
            )
        return first, last + 1


def _is_grade(value: object) -> bool:
    items = value if isinstance(value, list) and len(value) == 2 else [value]
    return all(_is_whole(item) for item in items)


def _is_whole(value: object) -> bool:
    if isinstance(value, str):
        return value.strip().lstrip("-").isdecimal()
    return not isinstance(value, bool) and isinstance(value, int | float) and float(value).is_integer()


def _whole(value: Any) -> int:
    return int(float(value)) if isinstance(value, int | float) else int(value.strip())
