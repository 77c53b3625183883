"""Rewards are made ready before a run: models are loaded once, and what is missing is told in time."""

from __future__ import annotations

import io
from pathlib import Path

import numpy as np
import pytest

from llmtrainer.base.errors import UserError
from llmtrainer.core.example import Message
from llmtrainer.core.rollout import Answer, Prompt
from llmtrainer.core.sandbox import Sandbox
from llmtrainer.generation.sampler import Sampled
from llmtrainer.models.weights import save_weights
from llmtrainer.rewards.code import Code
from llmtrainer.rewards.function import Function
from llmtrainer.rewards.human import Human
from llmtrainer.rewards.length import Length
from llmtrainer.rewards.mix import Mix
from llmtrainer.rewards.model import Model
from llmtrainer.tokenizer.tokenizer import load_tokenizer
from llmtrainer.training import ready_rewards
from llmtrainer.training.answers import Group, figures_of, scored
from llmtrainer.training.ready_rewards import ready
from llmtrainer.training.scoring import Judge, open_judge
from tests.worlds import tiny_model


def test_models_are_loaded_once_however_deep_they_stand_and_score(
    world: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    save_weights(tiny_model(head={"kind": "score", "std": 1.0}, context_length=512), tmp_path)
    load_tokenizer(world / "tokenizer").save(tmp_path)
    opened: list[Judge] = []

    def opening(path: str, template: str | None) -> Judge:
        opened.append(open_judge(path, template=template))
        return opened[-1]

    monkeypatch.setattr(ready_rewards, "open_judge", opening)
    plain = Model(path=str(tmp_path), template=None)
    doubled = Model(path=str(tmp_path), template=None, scale=2.0, name="doubled")
    ready([plain, Mix(of=(doubled, Length(most=9, slope=4)))])
    answers = [Answer((Message("user", "abc"),), text, (1,), "end") for text in ("def", "xyz")]
    assert len(opened) == 1
    scores = opened[0](answers)
    assert plain.score(answers) == scores and scores[0] != scores[1]
    assert doubled.score(answers) == [2.0 * score for score in scores]
    assert Mix(of=(plain, doubled)).score(answers) == pytest.approx([3.0 * score for score in scores])


def test_a_rollout_tells_in_which_share_of_its_answers_a_reward_gave_a_reason() -> None:
    judge = Function.given(lambda one: {"good": 1.0, "bad": 0.0}[one.text], name="mine")
    answers = tuple(Answer((), text, (1,), "end") for text in ("good", "odd", "bad", "odd"))
    nothing = np.zeros(1)
    written = Sampled((1,), "end", nothing, nothing, 1.0, never=nothing.astype(np.int64), kept=None, version="v")
    scores = scored([judge], answers)
    told = figures_of([Group(Prompt((), (1,)), (written,) * 4, answers, scores.total_R, scores.verdicts)])
    assert told["reward/mine/KeyError"] == 0.5 == told["rollout/failed"] == told["reward/mine"]


def test_a_model_without_scores_is_refused_before_the_run(world: Path, tmp_path: Path) -> None:
    save_weights(tiny_model(), tmp_path)
    load_tokenizer(world / "tokenizer").save(tmp_path)
    with pytest.raises(UserError, match="gives no score"):
        ready([Model(path=str(tmp_path))])


def test_what_a_reward_lacks_is_told_before_the_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Sandbox, "missing", lambda self: ("reach the network",))
    with pytest.raises(UserError, match="reach the network"):
        ready([Mix(of=(Code(), Length(most=9, slope=4)))])
    ready([Code(isolation="best_effort")])
    with pytest.raises(UserError, match="no module `nowhere`"):
        ready([Function(function="nowhere:judge")])
    monkeypatch.setattr("sys.stdin", io.StringIO())
    with pytest.raises(UserError, match="nobody is at the terminal"):
        ready([Human(path=tmp_path / "grades.jsonl")])
