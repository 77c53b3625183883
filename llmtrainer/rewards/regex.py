"""A pattern: whether the answer holds it, as often as wanted."""

from __future__ import annotations

import re
from typing import Literal, Self

from pydantic import Field, model_validator

from llmtrainer.base.errors import UserError
from llmtrainer.core.answer_text import final
from llmtrainer.core.reward import Rule
from llmtrainer.core.rollout import Answer, Verdict

LONGEST = 100_000
"""Characters that are searched; Python's patterns can take forever on long texts."""


class Regex(Rule):
    """1 where a pattern is found in an answer, 0 where it is not. For rules about how an answer is written; a right
    answer is better told by `numeric`, `maths` or `exact`."""

    pattern: str = Field(min_length=1)
    """A regular expression of Python's `re`; `(?i)` at its beginning passes over case."""

    match: Literal["anywhere", "whole"] = "anywhere"
    """Whether the pattern is to be somewhere in the answer, or to be all of it."""

    times: int | None = Field(default=None, ge=0)
    """How often it has to be there, without overlap. 0: never. None: at least once."""

    thinking: bool = True
    """Look into the thinking, too; otherwise only behind `</think>`."""

    @model_validator(mode="after")
    def _compiles(self) -> Self:
        try:
            re.compile(self.pattern)
        except re.error as error:
            raise UserError(
                f"`{self.pattern}` is no regular expression", why=str(error), fix="write a literal sign as `\\sign`"
            ) from None
        if self.match == "whole" and self.times is not None:
            raise UserError("match=whole and times exclude each other", fix="leave out `times`")
        return self

    def judge(self, answer: Answer) -> Verdict:
        text = answer.text if self.thinking else final(answer.text)
        if len(text) > LONGEST:
            return Verdict(None, "too long")
        if self.match == "whole":
            return Verdict(float(re.fullmatch(self.pattern, text) is not None))
        found = sum(1 for _ in re.finditer(self.pattern, text))
        return Verdict(float(found > 0 if self.times is None else found == self.times))
