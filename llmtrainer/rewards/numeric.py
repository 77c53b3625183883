"""A number: whether the answer ends in the one that the record names."""

from __future__ import annotations

import re
from fractions import Fraction
from typing import Literal

from pydantic import Field

from llmtrainer.base.errors import UserError
from llmtrainer.core.answer_text import NO_ANSWER, answered, boxed, final, has_box
from llmtrainer.core.numbers import Number, chinese_number, cleaned, last_number, only_number
from llmtrainer.core.reward import Rule, fact, shown
from llmtrainer.core.rollout import Answer, Verdict

_HASHES = re.compile(r"####[ \t]*([^\n]*)")
_SAID = re.compile(r"(?:\u7b54\u6848?|\u7ed3\u679c)\s*(?:\u662f|\u4e3a|[:\uff1a])+\s*([^\n\u3002]*)")


class Numeric(Rule):
    """1 where the number that an answer comes to is the record's, 0 where it is another or there is none.

    Compared exactly, as fractions: `0.5`, `1/2` and `50%` are one number, `1,000` and `1000` too; currencies and units
    are passed over. Two different numbers where one is wanted are wrong, and so is a number that the length limit may
    have cut.
    """

    answer: str = "answer"
    """The key of the record that holds the right number, or a text that comes to it (GSM8K's whole solution)."""

    where: Literal["auto", "hashes", "boxed", "last"] = "auto"
    """Where an answer states its number: behind the last `####`, in the last box, or the last number there is. auto:
    the first of these that there is."""

    tolerance: float = Field(default=0.0, ge=0.0, lt=1.0)
    """Difference that is still right, as a share of the right number. 0: exactly that number."""

    def judge(self, answer: Answer) -> Verdict:
        right = self._right(answer)
        text = answered(answer.text)
        found = self._found(text, answer.finish == "length")
        if self.where == "auto" and text != final(answer.text) and not has_box(text) and not _HASHES.search(text):
            found = found and only_number(text)     # what stands in <answer> states one number, as behind ####
        if found is None:
            return Verdict(0.0, NO_ANSWER)
        return Verdict(float(any(self._near(value, right.value) for value in _meant(found, right))))

    def _right(self, answer: Answer) -> Number:
        given = fact(answer, self.answer, self.title)
        if isinstance(given, bool | int | float):
            given = repr(given)
        found = None if not isinstance(given, str) else self._found(given, False, reference=True)
        if found is None:
            raise UserError(
                f"`{self.answer}` of a record is no number", where=f"the record of {shown(answer)}",
                why=f"it is {str(given)[:60]!r}", fix="name the key that holds a number, or leave the record out",
            )
        return found

    def _found(self, text: str, cut: bool, reference: bool = False) -> Number | None:
        where = "auto" if reference else self.where
        hashes = _HASHES.findall(text)
        if where == "hashes" or (where == "auto" and hashes):
            return only_number(hashes[-1]) if hashes and not (cut and text.endswith(hashes[-1])) else None
        if where == "boxed" or (where == "auto" and has_box(text)):
            box = boxed(text)
            return None if box is None else only_number(box)
        if reference and (alone := only_number(text)) is not None:
            return alone
        found = last_number(text)
        if found is None and (alone := chinese_number(text)) is not None:
            return None if cut else alone
        if found is None and where == "auto" and (said := _SAID.findall(text)):
            return None if cut and text.endswith(said[-1]) else only_number(said[-1])
        # Of a text that was cut inside a number, nobody knows which it would have been.
        touches = found is not None and found.end >= len(cleaned(text).rstrip())
        return None if cut and touches else found

    def _near(self, value: Fraction, right: Fraction) -> bool:
        return abs(value - right) <= Fraction(self.tolerance) * abs(right)


def _meant(found: Number, right: Number) -> list[Fraction]:
    """What the number may mean beside the right one, in the right one's terms. `12%` is 0.12; where 12 is right it was
    asked for in percent."""
    if found.percent == right.percent:
        return [found.value]
    if right.percent:
        return [found.value, found.value * 100]
    return [found.value / 100, *([found.value] if abs(right.value) > 1 else [])]
