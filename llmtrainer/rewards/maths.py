"""A formula: whether the answer is mathematically the record's, however it is written."""

from __future__ import annotations

import importlib.util
import json
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

from pydantic import Field

from llmtrainer.base.errors import UserError
from llmtrainer.core import equivalence
from llmtrainer.core.answer_text import NO_ANSWER, answered, boxed, has_box
from llmtrainer.core.protocols import Reward
from llmtrainer.core.reward import fact, shown
from llmtrainer.core.rollout import Answer, Verdict
from llmtrainer.core.sandbox import Limits, Sandbox

_NEEDED = ("math_verify", "latex2sympy2_extended", "sympy", "mpmath", "antlr4", "regex", "gmpy2")
LONGEST = 2000
"""Characters of a formula, or of the end of an answer without a box."""
STARTING = 30
"""Seconds that the libraries may take to load, beside those of the answers."""

_WIDE = {0xFF01 + place: 0x21 + place for place in range(94)}
"""Full-width letters, digits and signs as ASCII."""
_BASE = re.compile(r"\d\s*_\s*\{?\s*\d")
_DENIED = re.compile(
    r"(?:(?i:\bnot|\bnever|n't)\s+(?:(?i:equal(?:\s+to)?)\s+)?|\u4e0d\u662f|\u4e0d\u7b49\u4e8e|\u5e76\u975e)\s*\$?[^\s$]+\$?[\s.\u3002]*\Z"
)


class Maths(Reward):
    r"""1 where an answer's last \boxed{} is equivalent to the record's, 0 where it is not: `\frac12`, `0.5` and `1/2`,
    `(x-1)(x+1)` and `x^2-1`, sets, intervals, matrices, equations. By the library math-verify, which runs in a
    sandbox with a time limit, because a formula can be a bomb.

    Several answers in one box are one set, so nobody can try his luck twice; `5=2` is no way to say 2.
    """

    answer: str = "answer"
    r"""The key of the record that holds the right formula, or a text with a box (MATH's `solution`)."""

    where: Literal["auto", "boxed"] = "auto"
    """boxed: an answer without a box is wrong. auto: then the formula that the end of the answer comes to counts."""

    digits: int = Field(default=12, ge=1, le=15)
    """Decimals to which numbers are compared, where one side is a decimal fraction."""

    seconds: int = Field(default=5, ge=1, le=60)
    """Time for one answer; what takes longer has no reward."""

    memory_mib: int = Field(default=1024, ge=256)
    """Memory of the process that compares."""

    isolation: Literal["required", "best_effort"] = "required"
    """required: refuse to run where the machine cannot confine the process. best_effort: run with what there is."""

    def score(self, answers: Sequence[Answer]) -> list[float | None]:
        return [verdict.value for verdict in self.verdicts(answers)]

    def verdicts(self, answers: Sequence[Answer]) -> list[Verdict]:
        found: list[Verdict | None] = []
        asked: list[tuple[int, str, str]] = []
        for place, answer in enumerate(answers):
            right, said = self._right(answer), self._said(answer)
            found.append(self._at_once(right, said))
            if found[-1] is None:
                asked.append((place, right, said or ""))
        sandbox = self._sandbox()
        if answers:
            sandbox.require()
        while asked:
            verdicts = self._compared(sandbox, asked)
            for (place, _, _), verdict in zip(asked, verdicts, strict=False):
                found[place] = verdict
            asked = asked[len(verdicts) :]
        return [verdict for verdict in found if verdict is not None]

    def require(self) -> None:
        self._sandbox().require()

    def _sandbox(self) -> Sandbox:
        limits = Limits(seconds=STARTING + self.seconds, cpu_seconds=3600, memory_mib=self.memory_mib)
        return Sandbox(limits, required=self.isolation == "required", readable=_paths())

    def _right(self, answer: Answer) -> str:
        given = str(fact(answer, self.answer, self.title))
        given = given.translate(_WIDE)
        right = boxed(given) if has_box(given) else given.strip().strip("$")
        if not right or len(right) > LONGEST:
            raise UserError(
                f"`{self.answer}` of a record holds no formula", where=f"the record of {shown(answer)}",
                why=f"it is {given[:60]!r}", fix="name the key that holds a formula, or leave the record out",
            )
        return right

    def _said(self, answer: Answer) -> str | None:
        """What an answer comes to, as a box or as the text that may hold it; None where there is nothing."""
        text = answered(answer.text).translate(_WIDE)
        if not has_box(text):
            return text[-LONGEST:] if self.where == "auto" and text.strip() and answer.finish != "length" else None
        inside = boxed(text)
        return None if inside is None or not inside.strip() or len(inside) > LONGEST else rf"\boxed{{{inside}}}"

    def _at_once(self, right: str, said: str | None) -> Verdict | None:
        """What needs no library."""
        if said is None:
            return Verdict(0.0, NO_ANSWER)
        inside = boxed(said)
        if inside is not None and _plain(inside) == _plain(right):
            return Verdict(1.0)
        if _BASE.search(right) or _BASE.search(said if inside is None else inside):
            return Verdict(0.0)     # the library reads a number without its base
        if inside is None and _DENIED.search(said):
            return Verdict(0.0, NO_ANSWER)
        # The library takes the right side of any equation for the answer, that of `5=2` as well.
        if inside is not None and re.match(r"[^A-Za-z\\=<>]*=", inside) and "=" not in right:
            return Verdict(0.0, "no definition")
        return None

    def _compared(self, sandbox: Sandbox, asked: Sequence[tuple[int, str, str]]) -> list[Verdict]:
        """The verdicts of the first pairs: of all, or up to the one that broke the process."""
        task: dict[str, Any] = {
            "paths": list(sandbox.readable), "digits": self.digits, "seconds": self.seconds,
            "pairs": [[right, said] for _, right, said in asked],
        }
        program = Path(equivalence.__file__).read_text(encoding="utf-8")
        allowed = sandbox.limits.model_copy(update={"seconds": STARTING + 2.0 * self.seconds * len(asked)})
        quiet = STARTING + 3.0 * self.seconds
        outcome = sandbox.with_limits(allowed, quiet).script(program, json.dumps(task))
        verdicts = []
        for line in outcome.output.decode("utf-8", "replace").splitlines():
            told = json.loads(line)
            verdicts.append(Verdict(float(told)) if isinstance(told, int) else Verdict(None, str(told)))
        if len(verdicts) < len(asked):
            reason = "sandbox" if outcome.ended in ("done", "died") and not verdicts else outcome.ended
            verdicts.append(Verdict(None, reason))
        return verdicts


def _plain(formula: str) -> str:
    """A formula without what changes only how it looks."""
    formula = re.sub(r"_\{(\d+)\}", r"_\1", formula)
    formula = re.sub(r"\\left|\\right|\\displaystyle|\\[,;:! ]|\s|\$|\.\Z", "", formula)
    return re.sub(r"\\[dtc]frac", r"\\frac", formula)


def _paths() -> list[str]:
    """Where the libraries are, for a process that has no site-packages of its own."""
    if importlib.util.find_spec("math_verify") is None:
        raise UserError(
            "the reward `maths` needs the library math-verify, which is not installed",
            fix="pip install 'llmtrainer[maths]'",
        )
    specs = [spec for name in _NEEDED if (spec := importlib.util.find_spec(name)) is not None]
    return sorted({str(Path(spec.origin).parent.parent) for spec in specs if spec.origin is not None})
