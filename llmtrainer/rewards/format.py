"""The form of an answer: its sections, each exactly once, in order, with something in them."""

from __future__ import annotations

import re
from typing import Self

from pydantic import Field, model_validator

from llmtrainer.base.errors import UserError
from llmtrainer.core.reward import Rule
from llmtrainer.core.rollout import Answer, Verdict


class Format(Rule):
    """1 where an answer is made of the wanted sections and nothing else: `<think>...</think><answer>...</answer>`."""

    tags: tuple[str, ...] = ("think", "answer")
    """Names of the sections in order. Each is there once, closed, and not empty."""

    opened: bool = False
    """The prompt's template has already opened the first section, so that answers begin inside it."""

    open_end: bool = False
    """What follows the last section is the answer itself: `tags=[think] open_end=true`. It must not be empty."""

    partial: float = Field(default=0.0, ge=0.0, le=1.0, allow_inf_nan=False)
    """What an answer earns, at most, that has some of the tags right: this times their share. 0: all or nothing."""

    @model_validator(mode="after")
    def _possible(self) -> Self:
        if not self.tags or len(set(self.tags)) < len(self.tags):
            raise UserError("`tags` names no section, or one twice", fix="tags=[think,answer]")
        if bad := [tag for tag in self.tags if not re.fullmatch(r"[A-Za-z_][\w.-]*", tag)]:
            raise UserError(f"`{bad[0]}` is no name of a tag", fix="write `think` for <think>...</think>")
        return self

    def judge(self, answer: Answer) -> Verdict:
        marks = [mark for tag in self.tags for mark in (f"<{tag}>", f"</{tag}>")][1 if self.opened else 0 :]
        text = answer.text
        once = [text.count(mark) == 1 for mark in marks]
        if self.opened:
            once.append(f"<{self.tags[0]}>" not in text)
        if all(once) and self._in_order(text, marks):
            return Verdict(1.0)
        return Verdict(self.partial * sum(once) / len(once), "other form")

    def _in_order(self, text: str, marks: list[str]) -> bool:
        """Whether the marks divide the text into sections with something in them, and nothing between them."""
        pieces = []
        for mark in marks:
            piece, found, text = text.partition(mark)
            if not found:
                return False
            pieces.append(piece.strip())
        inside = 0 if self.opened else 1
        sections, between = pieces[inside::2], pieces[1 - inside :: 2]
        return all(sections) and not any(between) and bool(text.strip()) == self.open_end
