"""A program: whether it passes the record's tests, run in a sandbox."""

from __future__ import annotations

import ast
import builtins
import json
import re
import sys
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, Literal

from pydantic import Field

from llmtrainer.base.errors import UserError
from llmtrainer.core.answer_text import NO_ANSWER, final
from llmtrainer.core.reward import Rule, fact, shown
from llmtrainer.core.rollout import Answer, Verdict
from llmtrainer.core.sandbox import Checks, Limits, Outcome, Sandbox

_FENCE = re.compile(r"^([ \t]*)```[ \t]*(\w*)[^\n]*\n(.*?)(?:^[ \t]*```|\Z)", re.MULTILINE | re.DOTALL)
_CASE = ("input", "output")


class Code(Rule):
    """1 where the Python in an answer passes the tests of its record, 0 where it does not.

    Checks are assertions (a text, or a list of them), functions `check(candidate)` as HumanEval has them, or inputs and
    the outputs they have to give (`[{"input", "output"}]`, or `{"inputs": [], "outputs": []}`). They run in another
    process than the answer, which is asked for plain values: it can neither read what is expected nor say that it
    passed. Answers have the standard library, one process, and no files but their own.

    The program in an answer is its last fence labelled as Python, else its last one without a label, else all of it.
    Tests may name modules of the standard library without importing them (`math.isclose`).
    """

    tests: str = "tests"
    """The key of the record that holds the tests: HumanEval's `test`, MBPP's `test_list`, APPS's `input_output`."""

    entry_point: str = "entry_point"
    """The key that holds the name of the function that `check(candidate)` is to be called with."""

    before: str | None = None
    """The key of the code that an answer goes on with, such as HumanEval's `prompt`. Answers in a ``` fence that define
    the whole function are right, too."""

    setup: str | None = None
    """The key of code that the tests need: imports and helpers, MBPP's `test_setup_code`."""

    partial: bool = False
    """Give the share of tests that are passed; otherwise only all of them count."""

    limits: Limits = Limits()
    """What each answer may use for all its tests; an input has this for itself."""

    isolation: Literal["required", "best_effort"] = "required"
    """required: refuse to run where the machine cannot keep code from harm. best_effort: run with what there is; for
    containers and machines that hold nothing you would miss."""

    workers: int = Field(default=2, ge=1)
    """Answers that are tested at a time."""

    def verdicts(self, answers: Sequence[Answer]) -> list[Verdict]:
        for answer in answers:
            self._tests(answer)     # what a record lacks is told before anything runs
        sandbox = self._sandbox()
        if answers:
            sandbox.require()
        with ThreadPoolExecutor(self.workers) as pool:
            return list(pool.map(lambda answer: self._safe(answer, sandbox), answers))

    def judge(self, answer: Answer) -> Verdict:
        return self.verdicts([answer])[0]

    def require(self) -> None:
        self._sandbox().require()

    def _sandbox(self) -> Sandbox:
        return Sandbox(self.limits, required=self.isolation == "required")

    def _safe(self, answer: Answer, sandbox: Sandbox) -> Verdict:
        try:
            return self._judged(answer, sandbox)
        except self.refuses:
            raise
        except Exception as error:
            return Verdict(None, type(error).__name__)

    def _judged(self, answer: Answer, sandbox: Sandbox) -> Verdict:
        source = code_in(final(answer.text))
        if not source.strip():
            return Verdict(0.0, NO_ANSWER)
        if self.before is not None:
            source = f"{fact(answer, self.before, self.title)}\n{source}"
        tests = self._tests(answer)
        if not isinstance(tests, Checks):
            return self._by_output(source, tests, sandbox)
        outcome = sandbox.check(source, tests)
        if outcome.ended == "sandbox":
            return Verdict(None, "sandbox")
        if outcome.ended != "done" or outcome.verdict is None:
            return Verdict(0.0, outcome.ended if outcome.ended != "done" else "died")
        return self._told(outcome.verdict)

    def _told(self, verdict: Mapping[str, Any]) -> Verdict:
        passed, of, why = int(verdict["passed"]), int(verdict["of"]), verdict["why"]
        if why is not None and str(why).startswith("tests do not run"):
            return Verdict(None, "tests do not run")
        if passed == of and not verdict["calls"]:
            return Verdict(None, "tests call nothing")
        if passed == of:
            return Verdict(1.0)
        return Verdict(passed / of if self.partial else 0.0, str(why))

    def _by_output(self, source: str, cases: Sequence[tuple[str, str]], sandbox: Sandbox) -> Verdict:
        passed, reason = 0, None
        for given, wanted in cases:
            outcome = sandbox.script(source, given)
            if outcome.ended == "sandbox":
                return Verdict(None, "sandbox")
            if _lines(outcome.output.decode("utf-8", "replace")) == _lines(wanted) and _finished(outcome):
                passed += 1
                continue
            reason = reason or ("wrong result" if _finished(outcome) else outcome.ended)
            if not self.partial:
                return Verdict(0.0, reason)
        return Verdict(passed / len(cases), reason)

    def _tests(self, answer: Answer) -> Checks | list[tuple[str, str]]:
        """The tests of a record. UserError where there are none, or nobody knows what they are."""
        given = _parsed(fact(answer, self.tests, self.title))
        if isinstance(given, Mapping) and given.get("fn_name"):
            raise UserError(
                f"`{self.tests}` of a record calls a function by arguments", where=f"the record of {shown(answer)}",
                why=f"`fn_name` is {str(given['fn_name'])[:60]!r}, and inputs are what a program reads",
                fix="write its tests as assertions, [\"assert f(1, 2) == 3\"], or leave the record out",
            )
        if isinstance(given, Mapping) and {"inputs", "outputs"} <= set(given):
            given = self._paired(answer, given["inputs"], given["outputs"])
        several = [given] if isinstance(given, str) else given
        if isinstance(several, list | tuple) and several:
            if all(isinstance(item, str) for item in several):
                return self._of_functions(answer, tuple(several))
            if all(isinstance(item, Mapping) and all(_is_text(item.get(key)) for key in _CASE) for item in several):
                return [(_lined(item["input"]), _lined(item["output"])) for item in several]
        raise UserError(
            f"`{self.tests}` of a record holds no tests", where=f"the record of {shown(answer)}",
            why=f"it is {str(given)[:60]!r}",
            fix='assertions as a text or a list of texts, or [{"input": "1 2", "output": "3"}]',
        )

    def _paired(self, answer: Answer, inputs: Any, outputs: Any) -> Any:
        if not (isinstance(inputs, list | tuple) and isinstance(outputs, list | tuple)):
            return {"inputs": inputs, "outputs": outputs}
        if len(inputs) != len(outputs):
            raise UserError(
                f"`{self.tests}` of a record has {len(inputs):,} inputs and {len(outputs):,} outputs",
                where=f"the record of {shown(answer)}", why="nobody can tell which belong together",
                fix="an output for each input, or leave the record out",
            )
        return [{"input": one, "output": other} for one, other in zip(inputs, outputs, strict=True)]

    def _of_functions(self, answer: Answer, tests: tuple[str, ...]) -> Checks:
        setup = [str(fact(answer, key, self.title)) for key in (self.setup, self.before) if key is not None]
        trusted = "\n".join(_whole(text) for text in setup)
        whole = "\n".join([trusted, *tests])
        entry = answer.facts.get(self.entry_point)
        defined, names = names_in(whole)
        in_tests, called = names_in("\n".join(tests))
        check = "check" if "check" in in_tests and "check" not in called else None
        if check is not None and not isinstance(entry, str):
            fact(answer, self.entry_point, self.title)
        wanted = {name for name in names if name not in defined and not hasattr(builtins, name)}
        # What is only asked for its attributes is a module: what an answer has here are functions alone.
        modules = wanted & only_of_attributes(whole)
        wanted = wanted - modules | ({entry} if isinstance(entry, str) else set())
        known = sorted(modules & sys.stdlib_module_names - wanted)
        trusted = "\n".join([trusted, *(f"import {name}" for name in known)])
        return Checks(tests, trusted, tuple(sorted(wanted)), check, entry if isinstance(entry, str) else None)


def _parsed(given: Any) -> Any:
    """Tests that stand in a record as the JSON text of a list or an object, as APPS has them; else as they are."""
    if isinstance(given, str) and given.lstrip()[:1] in ("{", "["):
        try:
            return json.loads(given)
        except (ValueError, RecursionError):
            return given
    return given


def _is_text(value: Any) -> bool:
    """Whether a value says what a program reads or prints: a text, a number, or lines in a list."""
    if isinstance(value, list | tuple):
        return all(isinstance(line, str) for line in value)
    return isinstance(value, str | int | float) and not isinstance(value, bool)


def _lined(value: Any) -> str:
    return "\n".join(value) if isinstance(value, list | tuple) else str(value)


def code_in(text: str) -> str:
    """The program in an answer: its last fence labelled as Python, else its last one without a label, which may hold
    what a program prints; closed or not. Without fences all."""
    fences = [
        (language.lower(), re.sub(rf"^[ \t]{{1,{len(indent)}}}", "", code, flags=re.MULTILINE) if indent else code)
        for indent, language, code in _FENCE.findall(text)
    ]
    for languages in (("python", "python3", "py"), ("",)):
        known = [code for language, code in fences if language in languages]
        if known:
            return str(known[-1])
    return "" if fences else text


def names_in(source: str) -> tuple[set[str], set[str]]:
    """Names that a source defines somewhere, and names that it uses; none of either where it is no Python."""
    try:
        tree = ast.parse(source)
    except (SyntaxError, ValueError, RecursionError, MemoryError):
        return set(), set()
    return set(_defined(tree)), {
        node.id for node in ast.walk(tree) if isinstance(node, ast.Name) and isinstance(node.ctx, ast.Load)
    }


def only_of_attributes(source: str) -> set[str]:
    """Names that a source uses for nothing but their attributes; none where it is no Python."""
    try:
        tree = ast.parse(source)
    except (SyntaxError, ValueError, RecursionError, MemoryError):
        return set()
    of_attributes = {
        node.value for node in ast.walk(tree) if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name)
    }
    alone = {node.id for node in ast.walk(tree) if isinstance(node, ast.Name) and node not in of_attributes}
    return {node.id for node in of_attributes} - alone


def _defined(tree: ast.AST) -> Iterator[str]:
    for node in ast.walk(tree):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
            yield node.name
        elif isinstance(node, ast.Name) and not isinstance(node.ctx, ast.Load):
            yield node.id
        elif isinstance(node, ast.arg):
            yield node.arg
        elif isinstance(node, ast.Import | ast.ImportFrom):
            yield from ((alias.asname or alias.name).partition(".")[0] for alias in node.names)
        elif isinstance(node, ast.ExceptHandler) and node.name:
            yield node.name


def _whole(source: str) -> str:
    """Code that ends where a function's body is to begin, with a body."""
    try:
        ast.parse(source)
    except SyntaxError:
        return f"{source}\n    pass\n"
    return source


def _finished(outcome: Outcome) -> bool:
    return outcome.ended == "done"


def _lines(text: str) -> list[str]:
    """What was printed, without blanks at the ends of lines and empty lines at the end."""
    return [line.rstrip() for line in text.rstrip().splitlines()]
