"""One of several letters: whether the answer chooses the record's, and no other."""

from __future__ import annotations

import re
from collections.abc import Iterator
from functools import cache

from pydantic import Field

from llmtrainer.base.errors import UserError
from llmtrainer.core.answer_text import NO_ANSWER, answered, boxed, has_box, narrow
from llmtrainer.core.reward import Rule, fact, shown
from llmtrainer.core.rollout import Answer, Verdict

SEVERAL = "several choices"

# In Chinese: answer, option; should; choose, is, be.
_ANSWER = (
    r"(?:\u7b54\u6848|\u9009\u9879)(?:\u5e94\u8be5|\u5e94)?\s*(?:\u9009\u62e9?|\u662f|\u4e3a|:|=)+\s*"
    r"(?:\u9009\u9879)?\s*"
)
# Choose, but neither after a negation nor inside a word such as candidate, single choice, multiple choice.
_CHOOSE = r"(?<![\u4e0d\u522b\u6ca1\u9519\u672a\u52ff\u5019\u4efb\u5355\u591a])\u9009(?:\u62e9|\u9879|\u53d6)?\s*:?\s*"
_SAID = (
    r"(?:answer|option|choice)s?\s*(?:is|are|:|=|would be|must be|should be)\s*(?:option|choice)?\s*:?\s*",
    r"\b(?:i|we)\s+(?:choose|pick|select)\s+(?:option\s+|choice\s+)?",
    r"\b(?:wait|actually|correction)\b[,.:;! ]*(?:no\b[,.! ]*)?(?:it is|it's|it should be|i mean|make that)\s*",
)
_DENIED = re.compile(r"(?:not|never|n't|wrong|incorrect|\u4e0d|\u9519\u8bef\u7684?|\u5e76\u975e)\s*(?:the\s+)?\Z")
_ASKED = re.compile(r"[)\]\"'*\s]*\?")
_WORD = re.compile(r"\s+(?!(?:because|since|as|so|is|or|and|for)\b)[a-z]+")


class Choice(Rule):
    """1 where an answer chooses the right letter, 0 where it chooses another, several or none.

    Understood: a box; the letter alone, or before its text (`B. the sun`); `the answer is (B)`, `Answer: B`, and their
    Chinese counterparts. Where an answer names two different letters as its choice, it is wrong.
    """

    answer: str = "answer"
    """The key of the record that holds the right letter, or its number."""

    letters: str = Field(default="ABCDEFGHIJ", min_length=2, pattern="^[A-Z0-9]+$")
    """The letters that may be chosen; digits where choices are numbered, `ABCD1234` where they are either."""

    first: int = Field(default=0, ge=0, le=1)
    """The number of the first choice, where records hold a number in place of a letter."""

    def judge(self, answer: Answer) -> Verdict:
        right = self._right(answer)
        # Runs of blanks are one: a pattern tries each of them as the border between its parts.
        text = re.sub(r"[^\S\n]+", " ", narrow(answered(answer.text)))
        chosen = self._chosen(re.sub(r"\s*\n\s*", "\n", text).strip())
        if len(chosen) > 1:
            return Verdict(0.0, SEVERAL)
        return Verdict(float(chosen == {right}), None if chosen else NO_ANSWER)

    def _right(self, answer: Answer) -> str:
        given = fact(answer, self.answer, self.title)
        text, first = str(given).strip().strip("()").upper(), self.first
        if len(text) == 1 and text in self.letters:
            return text
        if text.isdecimal() and 0 <= int(text) - first < len(self.letters):
            return self.letters[int(text) - first]
        raise UserError(
            f"`{self.answer}` of a record is no choice", where=f"the record of {shown(answer)}",
            why=f"it is {str(given)[:60]!r}, and the choices are {self.letters}",
            fix="answer=KEY, of a letter or a number; or letters=ABCDE",
        )

    def _chosen(self, text: str) -> set[str]:
        """The letters that a text names as its choice."""
        if has_box(text):
            return self._alone(re.sub(r"\\(?:text|mathrm|mathbf|textbf)\s*\{([^{}]*)\}", r"\1", boxed(text) or ""))
        if alone := self._alone(text):
            return alone
        chosen = set[str]()
        for pattern in _patterns(self.letters):
            for match in pattern.finditer(text):
                behind = text[match.end() :]
                a_word = match[1] in "AI" and _WORD.match(behind)
                if a_word or _ASKED.match(behind) or _DENIED.search(text[: match.start()][-16:].lower()):
                    continue
                chosen |= {match[1], *self._also(behind)}
        return chosen

    def _alone(self, text: str) -> set[str]:
        """The letter that is all of a text, or its beginning as in `B. the sun`, unless others stand so too."""
        if whole := re.fullmatch(rf"[^\w?]*([{self.letters}{self.letters.lower()}])[^\w?]*", text):
            return {whole[1].upper()}
        begun = rf"^[^\w\n]*([{self.letters}])\s*[.):\u3001](?!\d)"
        if not re.match(begun, text) or re.search(r"(?i)answer|\u7b54\u6848|\u9009", text):
            return set()
        several = re.finditer(begun, text, re.MULTILINE)
        return {letter for match in several for letter in (match[1], *self._also(text[match.end() :]))}

    def _also(self, behind: str) -> Iterator[str]:
        """Letters that go on with a choice: `B or C`, `A, B`."""
        while match := _joined(self.letters).match(behind):
            yield match[1] or match[2]
            behind = behind[match.end() :]


def _letter(letters: str) -> str:
    return rf"[(\[\"'$*`\u3010 ]{{0,6}}(?-i:([{letters}]))(?![A-Za-z0-9']|\.\d)"


@cache
def _patterns(letters: str) -> tuple[re.Pattern[str], ...]:
    right = rf"(?i:(?:option|choice)\s+{_letter(letters)}[)\s\"'*]*\s+is\s+(?:the\s+)?(?:correct|right))"
    said = [f"(?i:{phrase}){_letter(letters)}" for phrase in (*_SAID, _ANSWER, _CHOOSE)]
    return tuple(map(re.compile, (*said, right)))


@cache
def _joined(letters: str) -> re.Pattern[str]:
    between = (
        r"(?:[,/&+|;(\u2013-]"
        r"|(?i:\b(?:or|and|maybe|perhaps|possibly|also|as well as|plus|to|through|it's|it is)\b)"
        r"|\u6216\u8005?|\u548c|\u3001|\uff0c|\u4e5f\u8bb8|\u6216\u8bb8)"
    )
    named = rf"[)\]\"'$*`\u3011.\s]*(?:{between}\s*)+(?:option\s+)?{_letter(letters)}"
    # One letter after the other, with nothing but blanks between; not `A I think`, where a word begins.
    listed = rf"[ ]+(?-i:([{letters}]))(?=[ ]*(?:$|[\n,.;|/)]|[ ][{letters}](?![A-Za-z0-9'])))"
    return re.compile(f"{named}|{listed}")
