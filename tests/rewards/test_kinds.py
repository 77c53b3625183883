"""Rewards that are no verifiers: length, functions, models, people, and sums of several."""

from __future__ import annotations

import io
import json
import threading
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from llmtrainer.base.errors import UserError
from llmtrainer.core.protocols import Reward
from llmtrainer.core.reward import checked, every, figures
from llmtrainer.core.rollout import Answer, Verdict
from llmtrainer.rewards.function import Function
from llmtrainer.rewards.human import Human
from llmtrainer.rewards.length import Length
from llmtrainer.rewards.mix import Mix
from llmtrainer.rewards.model import Model
from llmtrainer.rewards.numeric import Numeric
from tests.rewards.corpora import answer

HERE = "tests.rewards.test_kinds"


def characters(one: Answer) -> float:
    return float(len(one.text))


def difficult(one: Answer) -> Any:
    match one.text:
        case "none":
            return None
        case "raise":
            raise KeyError("a fact")
        case "stop":
            raise UserError("the judge has no key", fix="give it one")
        case "word":
            return "good"
        case "nan":
            return float("nan")
        case "huge":
            return 10**400
        case "numpy":
            return np.float32(0.5)
        case "true":
            return True
        case "array":
            return np.zeros(2)
        case "exit":
            raise SystemExit(3)
    return 1


class Judge:
    """Counts its calls."""

    def __init__(self) -> None:
        self.calls = 0

    def __call__(self, answers: Sequence[Answer]) -> list[float]:
        self.calls += 1
        return [float(len(one.tokens)) for one in answers]


@pytest.mark.parametrize(("tokens", "penalty"), [
    (1, 0.0), (80, 0.0), (85, -0.25), (90, -0.5), (100, -1.0), (200, -1.0),
])
def test_overlong_answers_pay_as_dapo_says(tokens: int, penalty: float) -> None:
    # arXiv:2503.14476, eq. 13: 0, then (L_max - L_cache - |y|) / L_cache, then -1; L_max 100, L_cache 20.
    assert Length(most=100, slope=20).score([answer("", tokens=tokens)]) == [penalty]


@pytest.mark.parametrize(("tokens", "value"), [(50, 1.0), (45, 0.5), (55, 0.5), (40, 0.0), (60, 0.0), (1, 0.0)])
def test_a_wanted_length_earns_most_at_its_target(tokens: int, value: float) -> None:
    assert Length(rule="target", target=50, slope=10).score([answer("", tokens=tokens)]) == [value]


def test_length_counts_the_sampled_ids_and_not_the_text_or_its_padding() -> None:
    # The same text, written in 3 and in 9 ids (S16): a recount from the text would call them equal.
    rule = Length(rule="target", target=3, slope=10)
    assert rule.score([answer("nine letters", tokens=3), answer("nine letters", tokens=9)]) == [1.0, 0.4]


@pytest.mark.parametrize("settings", [
    {}, {"rule": "target"}, {"most": 5, "target": 5}, {"most": 10, "slope": 20}, {"rule": "target", "most": 5},
])
def test_a_length_rule_without_its_length_is_refused(settings: dict[str, Any]) -> None:
    with pytest.raises(ValueError):
        Length(**settings)


@pytest.mark.parametrize("workers", [1, 3])
def test_what_a_function_gives_or_raises_costs_no_other_answer(workers: int) -> None:
    texts = ["fine", "none", "raise", "word", "nan", "huge", "numpy", "true", "array", "fine"]
    reward = Function(function=f"{HERE}:difficult", workers=workers)
    found = reward.verdicts([answer(text) for text in texts])
    assert [one.value for one in found] == [1.0, None, None, None, None, None, 0.5, 1.0, None, 1.0]
    assert [one.reason for one in found] == [
        None, "gave None", "KeyError", "gave no number", "gave no finite number", "gave no finite number", None, None,
        "gave no number", None,
    ]  # fmt: skip
    told = figures(reward, found)
    assert told["reward/failed"] == 6 and told["reward/mean"] == (1 + 0.5 + 1 + 1) / 4 == told["reward/function"]
    assert told["reward/why/KeyError"] == 1 and told["reward/why/gave no finite number"] == 2
    assert "KeyError: 'a fact'" in str(reward.last_error) and "in difficult" in str(reward.last_error)


@pytest.mark.parametrize("workers", [1, 3])
@pytest.mark.parametrize(("text", "raised"), [("stop", UserError), ("exit", SystemExit)])
def test_what_only_a_person_can_mend_stops_the_run(text: str, raised: type[BaseException], workers: int) -> None:
    with pytest.raises(raised):
        Function(function=f"{HERE}:difficult", workers=workers).score([answer("fine"), answer(text)])


def test_a_function_in_hand_needs_no_name_and_is_called_once_for_a_batch() -> None:
    judge = Judge()
    reward = Function.given(judge, per="batch")
    assert reward.score([answer("a", tokens=2), answer("b", tokens=5)]) == [2.0, 5.0] and judge.calls == 1
    assert Function.given(lambda one: len(one.text)).score([answer("abc")]) == [3.0]
    assert reward.function == f"{HERE}:Judge" and Reward.model_validate(reward.plain()) == reward
    short = Function.given(lambda answers: [1.0], per="batch").verdicts([answer("a"), answer("b")])
    assert [one.reason for one in short] == ["gave too few or too many"] * 2
    none = Function.given(lambda answers: None, per="batch").verdicts([answer("a")])
    assert none == [Verdict(None, "gave no list")]


def test_a_call_that_takes_too_long_costs_its_answer() -> None:
    never = threading.Event()
    reward = Function.given(lambda one: never.wait() if one.text == "slow" else 1.0, timeout=0.2)
    try:
        assert reward.verdicts([answer("slow"), answer("fast")]) == [Verdict(None, "time"), Verdict(1.0)]
    finally:
        never.set()


@pytest.mark.parametrize(("name", "what"), [
    ("no_such_package.module:f", "no module"), (f"{HERE}:characterz", "has no `characterz`"),
    (f"{HERE}:HERE", "called"),
])
def test_a_name_that_leads_nowhere_is_refused_with_what_is_near(name: str, what: str) -> None:
    with pytest.raises(UserError, match=what) as refused:
        Function(function=name).score([answer("a")])
    assert "characterz" not in name or refused.value.fix == "did you mean `characters`?"


def test_a_mix_is_the_weighted_sum_and_tells_each_mean_under_its_own_name() -> None:
    mix = Mix(of=(
        Numeric(weight=2.0), Function(function=f"{HERE}:characters", weight=-0.5, name="short"),
    ))  # fmt: skip
    found = mix.verdicts([answer("7", answer="7"), answer("1234", answer="7")])
    assert [one.value for one in found] == [2.0 - 0.5, 0.0 - 2.0]
    assert [dict(one.parts) for one in found] == [{"numeric": 1.0, "short": 1.0}, {"numeric": 0.0, "short": 4.0}]
    assert figures(mix, found) == {
        "reward/mean": -0.25, "reward/numeric": 0.5, "reward/short": 2.5, "reward/failed": 0.0,
    }  # fmt: skip
    assert [one.title for one in every(mix)] == ["mix", "numeric", "short"]


@pytest.mark.parametrize(("failed", "values"), [("answer", [1.0, None]), ("part", [1.0, 0.0])])
def test_a_part_that_fails_costs_the_answer_or_counts_nothing(failed: str, values: list[float | None]) -> None:
    parts = [{"kind": "function", "function": f"{HERE}:difficult", "weight": 0.5}, {"kind": "numeric", "weight": 0.5}]
    mix = Reward.model_validate({"kind": "mix", "of": parts, "failed": failed})
    right = [answer("7", answer="7"), answer("raise", answer="8")]
    found = mix.verdicts(right)
    assert [one.value for one in found] == values and found[1].reason == "function: KeyError"


def test_two_parts_of_one_name_and_a_mix_of_nothing_are_refused() -> None:
    with pytest.raises(ValueError, match="two rewards of a mix are called `numeric`"):
        Mix(of=(Numeric(), Numeric()))
    with pytest.raises(ValueError, match="no rewards"):
        Mix(of=())


def test_a_model_scores_through_what_was_attached_to_it_within_its_bounds() -> None:
    model = Model(path="runs/judge", scale=2.0, shift=-1.0, least=0.0, most=8.0)
    model.attach(lambda answers: [0.25, 3.0, 50.0, float("nan")])
    found = model.verdicts([answer(text) for text in "abcd"])
    assert found == [Verdict(0.0), Verdict(5.0), Verdict(8.0), Verdict(None, "gave no finite number")]


def test_a_person_is_asked_once_and_again_only_where_the_reply_means_nothing(tmp_path: Path) -> None:
    replies = iter(["much", "9", "1.5", "", "-2"])
    shown: list[str] = []
    human = Human(path=tmp_path / "grades.jsonl")
    human.attach(lambda text: (shown.append(text), next(replies))[1])
    first = [answer("good"), answer("pass over"), answer("bad"), answer("good")]
    assert human.score(first) == [1.5, None, -2.0, 1.5]
    assert "How many?" in shown[0] and "good" in shown[0] and "from -2 to 2" in shown[1] and "9 is not" in shown[2]
    again = Human(path=tmp_path / "grades.jsonl")
    again.attach(lambda text: pytest.fail("asked twice"))
    assert again.score([answer("bad"), answer("good")]) == [-2.0, 1.5]
    # Another prompt is another question.
    again.attach(lambda text: "0")
    assert again.score([answer("bad", asked="Why?")]) == [0.0]


def test_an_order_is_graded_in_equal_steps(tmp_path: Path) -> None:
    human = Human(path=tmp_path / "grades.jsonl", how="rank")
    human.attach(lambda text: "3 1 2")
    assert human.score([answer("a"), answer("b"), answer("c")]) == [0.0, -2.0, 2.0]


def test_without_a_person_a_run_that_needs_one_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sys.stdin", io.StringIO("1\n"))
    with pytest.raises(UserError, match="nobody is at the terminal"):
        Human(path=tmp_path / "grades.jsonl").score([answer("a")])


def test_a_file_of_something_else_is_no_file_of_grades(tmp_path: Path) -> None:
    path = tmp_path / "grades.jsonl"
    path.write_text(json.dumps({"prompt": "a", "answers": ["b"]}) + "\n")
    with pytest.raises(UserError, match="something else than grades"):
        Human(path=path).score([answer("a")])


@pytest.mark.parametrize("value", [1, 0.5, True, np.float64(2.0), np.int64(3)])
def test_numbers_of_every_library_count(value: object) -> None:
    assert checked(value) == Verdict(float(value))     # type: ignore[arg-type]
