"""What every kind of reward must do, whatever it looks at."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from llmtrainer.base.config import forget_reads, schema, unread
from llmtrainer.base.errors import UserError
from llmtrainer.base.kinds import find_kind, kinds_in
from llmtrainer.core.protocols import Reward
from llmtrainer.core.reward import every, figures
from llmtrainer.core.rollout import Answer
from llmtrainer.core.sandbox import Limits, Sandbox
from llmtrainer.rewards.human import Human
from llmtrainer.rewards.model import Model
from llmtrainer.training.recipe import Rollouts
from tests.rewards.corpora import answer

KINDS = kinds_in(Reward.folder)
NUMBERS: dict[str, dict[str, Any]] = {
    "exact": {"answer": "right", "after": "#", "ignore": ["case", "space"]},
    "numeric": {"answer": "right", "where": "last", "tolerance": 0.25},
    "choice": {"answer": "letter", "letters": "ABC", "first": 1},
    "maths": {"answer": "right", "where": "boxed", "digits": 6, "seconds": 4, "memory_mib": 900,
              "isolation": "best_effort"},
    "regex": {"pattern": "7", "times": 2, "thinking": False},
    "format": {"tags": ["why"], "opened": True, "open_end": True, "partial": 0.5},
    "length": {"most": 9, "slope": 7},
    "code": {"tests": "checks", "entry_point": "name", "before": "head", "setup": "help", "partial": True,
             "limits": {"seconds": 5.0}, "isolation": "best_effort", "workers": 3},
    "function": {"function": "tests.conformance.test_rewards:tokens", "per": "batch", "timeout": 9.0, "workers": 2},
    "model": {"path": "runs/judge", "template": "chatml", "scale": 2.0, "shift": 1.0, "least": -3.0, "most": 9.0},
    "mix": {"of": [{"kind": "numeric", "answer": "right", "weight": 0.5}, {"kind": "length", "most": 8, "slope": 2}],
            "failed": "part"},
    "human": {"path": "grades.jsonl", "how": "rank", "least": -1.0, "most": 1.0, "shown": 50},
}  # fmt: skip
"""Settings of every kind, something else than the default wherever a field has one."""
NOT_TOGETHER = {"regex": {"match"}, "length": {"rule", "target"}}
"""Fields that exclude those above."""
SLOW = ("code", "maths")
"""Start processes: they see fewer answers."""
ELSEWHERE = {"function": {"workers"}, "model": {"template"}}
"""Fields that one of the others makes meaningless (`per=batch` is one call), or that whoever loads the model reads."""


def tokens(answers: Sequence[Answer]) -> list[float]:
    return [float(len(one.tokens)) for one in answers]


def facts() -> dict[str, Any]:
    return {
        "right": "7", "letter": "B", "checks": ["assert f(2) == 7 - z"], "head": "z = 1", "help": "import math",
        "name": "f", "id": "q7",
    }  # fmt: skip


def answers() -> list[Answer]:
    texts = [
        "B", "# 7", "7 7", r"\boxed{7}", r"\boxed{8}", "why </why> 7", "```python\ndef f(x):\n    return 3 * x\n```",
        "def f(x):\n    return 0\n", "", "\ud800 \x00", "<think>", "x" * 5000,
        # Patterns that try every border between blanks would take hours over these.
        "the answer is:" + " " * 20_000 + "?", "\u7b54\u6848\u662f" + "\t\n" * 20_000, "7" + " " * 20_000 + "-",
        "<" * 20_000,
        "1," * 20_000, "\\boxed{" * 5_000, "```\n" * 5_000,
    ]
    return [answer(text, tokens=2 * place + 1, **facts()) for place, text in enumerate(texts)]


def made(kind: str, folder: Path) -> Reward:
    settings = NUMBERS[kind] | ({"path": str(folder / "grades.jsonl")} if kind == "human" else {})
    reward = Reward.model_validate({"kind": kind, "weight": 3.0, "name": "mine", **settings})
    forget_reads(reward)
    if isinstance(reward, Model):
        reward.attach(tokens)
    if isinstance(reward, Human):
        reward.attach(lambda text: " ".join(map(str, range(1, 20))) if text.endswith("pass: ") else pytest.fail(text))
    if kind == "maths":
        pytest.importorskip("math_verify", reason="the extra `maths` is not installed")
    return reward


def test_every_kind_has_settings_here() -> None:
    assert sorted(NUMBERS) == KINDS


@pytest.mark.parametrize("kind", KINDS)
def test_a_reward_gives_one_finite_number_or_none_for_each_answer_in_order_and_reads_its_settings(
    kind: str, tmp_path: Path
) -> None:
    reward = made(kind, tmp_path)
    given = answers()[: 8 if kind in SLOW else None]
    verdicts = reward.verdicts(given)
    scores = [verdict.value for verdict in verdicts]
    assert len(scores) == len(given) and len({str(score) for score in scores}) > 1
    assert all(score is None or (isinstance(score, float) and math.isfinite(score)) for score in scores)
    assert reward.title == "mine" and reward.weight == 3.0
    fields = set(type(reward).model_fields)
    assert set(NUMBERS[kind]) | {"weight", "name"} | NOT_TOGETHER.get(kind, set()) == fields, "a field needs a line"
    assert {name for name in unread(reward) if name.partition(".")[0] not in ELSEWHERE.get(kind, set())} <= {
        "of.0.weight"
    } - ({"of.0.weight"} if kind == "mix" else set())
    assert all(value == value for value in figures(reward, verdicts).values())
    # Which answers it is asked about together changes nothing, nor does the order. A person ranks them against each
    # other, once: what was said is kept.
    assert reward.score(given[::-1]) == scores[::-1]
    if kind not in ("human", *SLOW):
        assert [reward.score([one])[0] for one in given] == scores


@pytest.mark.parametrize("kind", KINDS)
def test_no_answers_have_no_scores_and_no_kind_is_without_an_explanation(kind: str, tmp_path: Path) -> None:
    reward = made(kind, tmp_path)
    assert reward.score([]) == [] and reward.verdicts([]) == []
    assert find_kind(Reward, Reward.folder, kind).__doc__
    assert reward in every(reward)


@pytest.mark.parametrize(("kind", "key"), [
    ("exact", "right"), ("numeric", "right"), ("choice", "letter"), ("maths", "right"), ("code", "checks"),
    ("code", "head"), ("code", "help"), ("mix", "right"),
])
def test_a_record_without_what_a_reward_needs_is_told_by_key_and_record(kind: str, key: str, tmp_path: Path) -> None:
    held = {name: value for name, value in facts().items() if name != key}
    poor = answer("7", asked="What is three plus four?", **held)
    with pytest.raises(UserError) as refused:
        made(kind, tmp_path).score([*answers()[:1], poor])
    assert f"`{key}`" in refused.value.what
    assert refused.value.where is not None and "q7" in refused.value.where and "three plus four" in refused.value.where


@pytest.mark.parametrize("kind", KINDS)
def test_a_recipe_with_a_reward_loads_back_equal(kind: str, tmp_path: Path) -> None:
    reward = made(kind, tmp_path)
    assert Reward.model_validate(reward.plain()) == reward and reward.kind == kind


def test_what_this_machine_confines_is_said_and_not_assumed() -> None:
    assert all(isinstance(one, str) for one in Sandbox(Limits()).missing())


def test_the_schema_of_a_sum_refers_to_the_rewards_that_it_may_hold() -> None:
    found = schema(Rollouts)
    rewards = found["$defs"]["Reward"]["oneOf"]
    (mix,) = [item for item in rewards if item.get("properties", {}).get("kind", {}).get("const") == "mix"]
    assert mix["properties"]["of"]["items"] == {"$ref": "#/$defs/Reward"}
    assert len(rewards) == len(KINDS) + 1, "and one of the user's own"
