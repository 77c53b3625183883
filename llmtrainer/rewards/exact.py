"""A text: whether the answer says exactly what the record says."""

from __future__ import annotations

import unicodedata
from typing import Literal

from llmtrainer.base.errors import UserError
from llmtrainer.core.answer_text import NO_ANSWER, answered, final, narrow
from llmtrainer.core.reward import Rule, fact, shown
from llmtrainer.core.rollout import Answer, Verdict


class Exact(Rule):
    """1 where an answer is the record's text, 0 where it is another. What a model thought before is not compared."""

    answer: str = "answer"
    """The key of the record that holds the right text, or a list of several that are right."""

    after: str | None = None
    """Compare what stands behind the last of this: `####`, `Answer:`. An answer without it is wrong. None: the whole
    answer."""

    ignore: tuple[Literal["width", "space", "case", "punctuation"], ...] = ("width", "space")
    """Differences that do not count: full-width letters, spaces and line ends (several are one, none at the ends),
    large and small letters, signs."""

    def judge(self, answer: Answer) -> Verdict:
        given = fact(answer, self.answer, self.title)
        several = given if isinstance(given, list | tuple) else [given]
        if not several or not all(isinstance(item, str | int | float) for item in several):
            raise UserError(
                f"`{self.answer}` of a record is no text", where=f"the record of {shown(answer)}",
                why=f"it is {str(given)[:60]!r}", fix="name the key that holds a text or a list of texts",
            )
        text = answered(answer.text)
        if self.after is not None:
            _, mark, text = final(answer.text).rpartition(self.after)
            text = text.partition("</answer>")[0]
            if not mark:
                return Verdict(0.0, NO_ANSWER)
        said = self._plain(text)
        if not said:
            return Verdict(0.0, NO_ANSWER)
        return Verdict(float(said in {self._plain(str(item)) for item in several}))

    def _plain(self, text: str) -> str:
        if "width" in self.ignore:
            text = narrow(text)
        if "case" in self.ignore:
            text = text.casefold()
        if "punctuation" in self.ignore:
            text = "".join(letter for letter in text if not unicodedata.category(letter).startswith("P"))
        return " ".join(text.split()) if "space" in self.ignore else text
