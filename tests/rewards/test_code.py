"""Code against tests: which answers pass, in each of the forms that tests come in."""

from __future__ import annotations

import builtins
import json
from typing import Any

import pytest

from llmtrainer.base.errors import UserError
from llmtrainer.core.confined import known
from llmtrainer.core.rollout import Verdict
from llmtrainer.core.sandbox import Checks, Limits, Outcome, Sandbox
from llmtrainer.rewards.code import Code, code_in
from tests.confinement import require_confinement
from tests.rewards.corpora import answer

LIMITS = Limits(seconds=4.0, cpu_seconds=1, memory_mib=128, disk_mib=1)
SQUARES = ["assert square(3) == 9", "assert square(-2) == 4", "assert square(0) == 0"]


@pytest.fixture(autouse=True)
def confined() -> None:
    require_confinement()


def verdict(text: str, tests: Any, settings: dict[str, Any] | None = None, **facts: Any) -> Verdict:
    reward = Code(limits=LIMITS, **(settings or {}))
    return reward.verdicts([answer(text, tests=tests, **facts)])[0]


@pytest.mark.parametrize(("text", "value", "reason"), [
    ("def square(x):\n    return x * x\n", 1.0, None),
    ("Here it is:\n```python\ndef square(x):\n    return x ** 2\n```\nIt multiplies.", 1.0, None),
    ("```\ndef square(x):\n    return x ** 2\n", 1.0, None),
    ("<think>```python\nwrong\n```</think>```py\ndef square(x): return x * x\n```", 1.0, None),
    ("```python\ndef square(x): return 1\n```\nNo:\n```python\ndef square(x): return x * x\n```", 1.0, None),
    ("```bash\nrm -rf /\n```", 0.0, "no answer"),
    ("", 0.0, "no answer"),
    ("def square(x):\n    return x + x\n", 0.0, "wrong result"),
    ("def cube(x):\n    return x ** 3\n", 0.0, "raised AttributeError"),
    ("def square(x)\n    return x\n", 0.0, "raised SyntaxError"),
    ("def square(x):\n    while True: pass\n", 0.0, "time"),
    ("def square(x):\n    return [0] * 10 ** 10\n", 0.0, "raised MemoryError"),
    ("def square(x):\n    import os; os._exit(0)\n", 0.0, "died"),
    ("def square(x):\n    raise KeyError(x)\n", 0.0, "raised KeyError"),
    ("def square(x):\n    return iter([x])\n", 0.0, "raised TypeError"),
])
def test_an_answer_earns_what_its_tests_say(text: str, value: float, reason: str | None) -> None:
    assert verdict(text, SQUARES) == Verdict(value, reason)


@pytest.mark.parametrize(("text", "reason"), [
    ("import os\ndef square(x): os._exit(97)", "died"),
    ("class E(Exception): pass\nE.__name__ = 'tests do not run'\ndef square(x): raise E", "raised Exception"),
    ("class E(Exception): pass\nE.__name__ = 'x' * 100000\ndef square(x): raise E", "raised Exception"),
    ("class time(KeyError): pass\ndef square(x): raise time", "raised KeyError"),
])
def test_no_answer_chooses_that_it_is_not_judged_or_why(text: str, reason: str) -> None:
    assert verdict(text, SQUARES) == Verdict(0.0, reason)


def test_an_answer_that_leaves_deep_folders_is_judged_like_any_other() -> None:
    deep = "import os\nfor _ in range(1100):\n    os.mkdir('d'); os.chdir('d')\ndef square(x): return x * x"
    assert Code().verdicts([answer(deep, tests=SQUARES)]) == [Verdict(1.0)]


def test_no_program_chooses_that_it_is_not_judged() -> None:
    assert verdict("import sys; sys.exit(97)", [{"input": "1", "output": "2"}]) == Verdict(0.0, "died")


@pytest.mark.parametrize(("text", "reason"), [
    ("def square(x): raise ValueError", "raised ValueError"), ("import os\ndef square(x): os._exit(0)", "died"),
])
def test_a_test_that_stumbles_over_what_an_answer_did_counts_against_the_answer(text: str, reason: str) -> None:
    tests = "try:\n    found = square(3)\nexcept Exception:\n    pass\nassert found == 9"
    assert verdict(text, tests) == Verdict(0.0, reason)
    assert verdict("def square(x): return 9", tests).value == 1.0


def test_a_process_that_ended_while_every_test_forgave_it_died() -> None:
    tests = "try:\n    square(3)\nexcept Exception:\n    pass"
    assert verdict("import os\ndef square(x): os._exit(0)", tests) == Verdict(0.0, "died")


def test_partial_credit_is_the_share_of_tests_that_pass() -> None:
    assert verdict("def square(x): return abs(x) ** 2 if x else 7", SQUARES, {"partial": True}).value == 2 / 3
    assert verdict("def square(x): return abs(x) ** 2 if x else 7", SQUARES).value == 0.0


def test_a_function_that_tests_define_is_called_with_the_entry_point_and_answers_may_go_on_with_the_prompt() -> None:
    tests = "def check(candidate):\n    assert candidate([3, 1]) == twice([1, 3])[:2]\n"
    prompt = "def twice(x):\n    return x * 2\n\ndef ordered(x):\n    '''Sorted.'''\n"
    settings = {"before": "prompt"}
    held = {"prompt": prompt, "entry_point": "ordered"}
    assert verdict("    return sorted(x)\n", tests, settings, **held).value == 1.0
    assert verdict("```python\ndef ordered(x):\n    return sorted(x)\n```", tests, settings, **held).value == 1.0
    assert verdict("    return x\n", tests, settings, **held).value == 0.0
    # A helper that the answer replaces is still the record's own where the test calls it.
    assert verdict("    return []\ndef twice(x):\n    return []\n", tests, settings, **held).value == 0.0
    with pytest.raises(UserError, match="no `entry_point`"):
        verdict("    return x\n", tests, settings, prompt=prompt)


def test_inputs_and_outputs_are_compared_by_whoever_started_the_program() -> None:
    cases = [{"input": "1 2\n", "output": "3\n"}, {"input": "5 5\n", "output": "10"}]
    right = "a, b = map(int, input().split())\nprint(a + b)"
    assert verdict(right, cases).value == 1.0
    assert verdict(right, {"inputs": ["1 2", "5 5"], "outputs": ["3", "10"]}).value == 1.0
    assert verdict("print(3)", cases) == Verdict(0.0, "wrong result")
    assert verdict("print(3)", cases, {"partial": True}).value == 0.5
    assert verdict(right + "\nraise SystemExit(1)", cases).reason == "died"
    assert verdict("if __name__ == '__main__':\n    print(sum(map(int, input().split())))", cases).value == 1.0
    assert verdict("while True: print('3')", cases).reason == "output"
    assert verdict(right + "\nexit()", cases).value == 1.0
    assert verdict(right + "\nquit(0)", cases).value == 1.0


@pytest.mark.parametrize(("tests", "reason"), [
    ("assert undefined_thing", "tests call nothing"), ("this is no Python", "tests do not run"),
    ("x = 1", "tests call nothing"), ("import no_such_module", "tests do not run"),
])
def test_tests_that_test_nothing_cost_the_answer_and_give_it_no_point(tests: str, reason: str) -> None:
    assert verdict("def square(x): return x * x", tests) == Verdict(None, reason)


def test_tests_may_name_modules_without_importing_them() -> None:
    right = "def square(x): return x * x"
    assert verdict(right, "assert math.isclose(square(3), 9.0001, rel_tol=1e-3)") == Verdict(1.0)
    assert verdict(right, "assert np.allclose(square(3), 9)") == Verdict(None, "tests do not run")
    # A function of the answer that is called like a module is still the answer's.
    assert verdict("def bisect(x): return x / 2", "assert bisect(3) == 1.5") == Verdict(1.0)
    assert verdict("def bisect(x): return x / 2", "assert bisect.bisect([1], bisect(2)) == 1").value == 0.0


@pytest.mark.parametrize(("raised", "expected"), [
    ("class MyE(ValueError): pass\ndef square(x): raise MyE('no')", "ValueError"),
    ("import json\ndef square(x): return json.loads('{')", "ValueError"),
    ("def square(x): return b'\\xff'.decode()", "ValueError"),
    ("class MyE(LookupError, ArithmeticError): pass\ndef square(x): raise MyE", "LookupError"),
    ("class MyE(Exception): pass\ndef square(x): raise MyE", "Exception"),
    ("def square(x): raise DeprecationWarning", "DeprecationWarning"),
])
def test_an_exception_of_the_answers_own_is_what_it_derives_from(raised: str, expected: str) -> None:
    tests = f"try:\n    square(3)\nexcept {expected}:\n    pass\nelse:\n    raise AssertionError"
    assert verdict(raised, tests) == Verdict(1.0)
    assert verdict("class MyE(KeyError): pass\ndef square(x): raise MyE", SQUARES) == Verdict(0.0, "raised KeyError")


@pytest.mark.parametrize("told", [
    None, 7, "ValueError", [], [7, None, []], ["tests do not run"], ["\ud800"], ["print", "object", "__doc__"],
    ["SystemExit"], ["UnicodeDecodeError"], ["BaseExceptionGroup"],
])
def test_whatever_an_answer_tells_of_an_exception_is_one_that_can_be_raised(told: Any) -> None:
    name, error = known(told)
    assert issubclass(getattr(builtins, name), BaseException) and type(error) is RuntimeError


@pytest.mark.parametrize("tests", [
    {"inputs": ["1 2\n", "5 5\n"], "outputs": ["3\n", "10\n"]}, [{"input": "1 2", "output": "3"}],
    {"inputs": [["1 2"]], "outputs": [["3"]]}, [{"input": "1 2", "output": 3}],
])
def test_inputs_and_outputs_may_be_the_text_of_their_json_and_lists_of_lines(tests: Any) -> None:
    right, wrong = "a, b = map(int, input().split())\nprint(a + b)", "print(0)"
    for given in (tests, json.dumps(tests)):
        assert verdict(right, given).value == 1.0
        assert verdict(wrong, given) == Verdict(0.0, "wrong result")


def test_assertions_may_be_the_text_of_a_list() -> None:
    tests = json.dumps(["assert square(2) == 4", "assert square(3) == 9"])
    assert verdict("def square(x): return x * x", tests).value == 1.0
    assert verdict("def square(x): return 4", tests).value == 0.0


def test_calls_by_arguments_are_refused_and_not_judged_as_what_a_program_reads() -> None:
    tests = {"fn_name": "add", "inputs": [[1, 2]], "outputs": [3]}
    for given in (tests, json.dumps(tests)):
        with pytest.raises(UserError, match="calls a function by arguments"):
            verdict("def add(a, b): return a + b", given)


def test_inputs_without_their_outputs_are_refused() -> None:
    with pytest.raises(UserError, match="2 inputs and 1 outputs"):
        verdict("print(3)", {"inputs": ["1 2", "5 6"], "outputs": ["3"]})


@pytest.mark.parametrize("tests", [
    [], [1], [{"input": "", "output": [3]}], [{"input": None, "output": "3"}], "[]",
    {"inputs": [1]}, 7, [{"input": "x"}], {"inputs": "12", "outputs": "34"}, {"inputs": None, "outputs": None},
])
def test_what_is_no_test_is_refused_before_anything_runs(tests: Any) -> None:
    with pytest.raises(UserError, match="holds no tests"):
        verdict("x = 1", tests)


def test_where_nothing_confines_the_code_it_is_refused_unless_that_was_allowed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Sandbox, "missing", lambda self: ("reach the network",))
    with pytest.raises(UserError, match="reach the network"):
        verdict("def square(x): return x * x", SQUARES)
    assert verdict("def square(x): return x * x", SQUARES, {"isolation": "best_effort"}).value == 1.0


def test_a_sandbox_that_breaks_costs_one_answer_and_never_counts_as_passed(monkeypatch: pytest.MonkeyPatch) -> None:
    reward = Code(limits=LIMITS, workers=1)
    right = answer("def square(x): return x * x", tests=SQUARES)
    real = Sandbox.check

    def broken(self: Sandbox, source: str, tests: Checks) -> Outcome:
        if "broken" in source:
            raise OSError("no process can be started")
        return Outcome("sandbox") if "refused" in source else real(self, source, tests)

    monkeypatch.setattr(Sandbox, "check", broken)
    found = reward.verdicts([right, answer("broken", tests=SQUARES), answer("refused", tests=SQUARES), right])
    assert [one.value for one in found] == [1.0, None, None, 1.0]
    assert [one.reason for one in found] == [None, "OSError", "sandbox", None]


def test_the_program_in_an_answer_is_its_last_fence_of_python() -> None:
    assert code_in("x = 1") == "x = 1"
    listed = "1. So:\n   ```python\n   def f(x):\n       return x\n   ```\n"
    assert code_in(listed) == "def f(x):\n    return x\n"
    assert code_in("a\n```python\nx = 1\n```\nb\n```text\nout\n```\n") == "x = 1\n"
    assert code_in("```js\n1\n```") == ""
    assert code_in("```python\nx = 1\n```\nOutput:\n```\n1\n```\n") == "x = 1\n"
    assert code_in("```\nx = 0\n```\nor\n```\nx = 1\n```\n") == "x = 1\n"
