"""Conversations of several turns: what is learned of them, when they end, and whose exception is told."""

from __future__ import annotations

import threading
import traceback
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from llmtrainer.base.errors import UserError
from llmtrainer.core.environment import Environment, Feedback
from llmtrainer.core.example import Message
from llmtrainer.core.rollout import Prompt
from llmtrainer.generation.sampler import alone
from llmtrainer.generation.samplers.own import Own
from llmtrainer.generation.sampling import Sampling
from llmtrainer.models.families.llama import Llama
from llmtrainer.training.environments.callback import Callback
from llmtrainer.training.environments.tools import Tools
from llmtrainer.training.recipe import Rollouts
from llmtrainer.training.turns import Conversation, converse
from tests.generation.test_loop import Tokens

HERE = "tests.training.test_turns"
OPEN, CLOSE, USER = 1, 2, 3


@dataclass(frozen=True)
class Written:
    tokens: tuple[int, ...]
    finish: str
    logp: NDArray[np.float64]


@dataclass
class Scripted:
    """Writes, as the turn number n to a row that begins with prompt id p, the two ids 100 p + n and `end`."""

    cut: frozenset[int] = frozenset()
    """Prompt ids whose turns never end."""
    asked: list[list[list[int]]] = field(default_factory=list)
    seeds: list[int] = field(default_factory=list)

    def sample(
        self, prompts: Sequence[Sequence[int]], each: int, sampling: Sampling, seed: int, *, rows: Sequence[int]
    ) -> list[Written]:
        assert each == 1
        self.asked.append([list(prompt) for prompt in prompts])
        self.seeds.append(seed)
        turn = len(self.asked)
        return [
            Written((100 * row[0] + turn, CLOSE), "length" if row[0] in self.cut else "end",
                    np.array([-0.25 * turn, -0.5]))
            for row in prompts
        ]  # fmt: skip


def spoken(before: Sequence[int], turn: Any) -> str:
    return str(turn.tokens[0])


def encoded(talk: Conversation, feedback: Feedback) -> list[int]:
    return [USER, 1000 + len(feedback.text), OPEN]


def prompts(*ids: int, **facts: Any) -> list[Prompt]:
    return [Prompt((Message("user", str(number)),), (number,), facts) for number in ids]


def talked(
    function: Any, given: Sequence[Prompt], sampler: Scripted | None = None, each: int = 1, **settings: Any
) -> list[Conversation]:
    environment = function if isinstance(function, Environment) else Callback.given(function)
    environment = environment.model_copy(update=settings)
    return converse(
        sampler or Scripted(), given, each, Sampling(max_new_tokens=2), 7, environment, spoken, encoded
    )  # fmt: skip


def until_three(text: str) -> tuple[bool, str]:
    """Done with the third turn; prompt 5 with its first."""
    return text.endswith("3") or text.startswith("5"), "go on"


class Guess:
    """Each conversation has its own: what it heard before decides."""

    def reset(self, facts: Mapping[str, Any]) -> None:
        self.wanted, self.heard = facts["turns"], 0

    def step(self, text: str) -> tuple[bool, str, float]:
        self.heard += 1
        return self.heard == self.wanted, "no", float(self.heard == self.wanted)


def test_three_turns_are_learned_and_what_the_environment_said_is_not() -> None:
    sampler = Scripted()
    four, five = talked(until_three, prompts(4, 5), sampler)
    said = [USER, 1005, OPEN]
    assert four.tokens == [401, CLOSE, *said, 402, CLOSE, *said, 403, CLOSE]
    assert four.weights == [1, 1, 0, 0, 0, 1, 1, 0, 0, 0, 1, 1]
    assert four.logp == [-0.25, -0.5, 0, 0, 0, -0.5, -0.5, 0, 0, 0, -0.75, -0.5]
    assert (four.end, four.said, four.finish, four.reward) == ("done", ["401", "402", "403"], "end", None)
    assert (five.tokens, five.end) == ([501, CLOSE], "done")
    # Those that are done are not sampled again; each of the others goes on from its own ids.
    assert sampler.asked == [[[4], [5]], [[4, 401, CLOSE, *said]], [[4, 401, CLOSE, *said, 402, CLOSE, *said]]]
    assert len(set(sampler.seeds)) == 3


def test_every_conversation_has_an_object_of_its_own_and_groups_stand_together() -> None:
    talks = talked(Guess, [*prompts(1, turns=1), *prompts(2, turns=3)], each=2)
    assert [(talk.prompt.tokens, len(talk.said), talk.reward) for talk in talks] == [
        ((1,), 1, 1.0), ((1,), 1, 1.0), ((2,), 3, 1.0), ((2,), 3, 1.0),
    ]


@pytest.mark.parametrize(("settings", "end", "turns"), [
    ({"max_turns": 2}, "turns", 2), ({"max_turns": 1}, "turns", 1), ({"max_tokens": 8}, "length", 2),
    ({"max_tokens": 7}, "length", 2), ({"max_tokens": 6}, "length", 1), ({"max_tokens": 12}, "length", 3),
])
def test_a_conversation_without_end_is_ended_by_its_limits(settings: dict[str, int], end: str, turns: int) -> None:
    (talk,) = talked(lambda text: (False, "go on"), prompts(1), **settings)
    assert (talk.end, len(talk.said)) == (end, turns)
    assert talk.weights[-2:] == [1, 1] and len(talk.tokens) == len(talk.weights) == len(talk.logp)
    assert len(talk.tokens) <= settings.get("max_tokens", 99)


@pytest.mark.parametrize(("context", "turns"), [(8, 1), (9, 2), (12, 2), (14, 3)])
def test_no_turn_is_begun_that_the_context_might_cut(context: int, turns: int) -> None:
    given = [Prompt((Message("user", "1"),), (1, 5))]
    (talk,) = converse(Scripted(), given, 1, Sampling(max_new_tokens=2), 7, Callback.given(lambda text: (False, "")),
                       spoken, encoded, context)
    assert (talk.end, len(talk.said)) == ("length", turns) and 2 + len(talk.tokens) <= context


def test_a_turn_that_was_cut_ends_the_conversation_after_it_was_judged() -> None:
    cut, whole = talked(lambda text: (False, "go on", 0.5), prompts(1, 2), Scripted(frozenset([1])), max_turns=2)
    assert (cut.end, cut.finish, cut.reward, len(cut.said)) == ("length", "length", 0.5, 1)
    assert (whole.end, whole.reward) == ("turns", 1.0)


def test_errors_in_a_row_end_a_conversation_and_a_good_turn_forgives_them() -> None:
    def moody(text: str) -> Feedback:
        return Feedback(done=False, text="?", error=text in ("101", "103", "104", "105"))

    (talk,) = talked(moody, prompts(1), max_errors=2, max_turns=8)
    assert (talk.end, talk.said, talk.errors) == ("errors", ["101", "102", "103", "104"], 2)


def broken_move(text: str) -> tuple[bool, str]:
    if text.startswith("2"):
        raise ZeroDivisionError("the board has no fields")
    if text.startswith("3"):
        raise KeyError("later")
    return True, ""


def test_an_exception_in_a_thread_surfaces_with_its_own_traceback_once_all_have_ended() -> None:
    ended: list[str] = []

    def step(text: str) -> tuple[bool, str]:
        try:
            return broken_move(text)
        finally:
            ended.append(text)

    with pytest.raises(ZeroDivisionError, match="the board has no fields") as raised:
        talked(step, prompts(1, 2, 3, 4), workers=3)
    frames = traceback.extract_tb(raised.tb)
    assert any(frame.name == "broken_move" and frame.line == 'raise ZeroDivisionError("the board has no fields")'
               for frame in frames)  # fmt: skip
    assert sorted(ended) == ["101", "201", "301", "401"]
    assert not [thread for thread in threading.enumerate() if thread.name.startswith("environment")]


def test_an_exception_may_cost_its_conversation_alone_but_never_hides_what_a_person_must_mend() -> None:
    talks = talked(broken_move, prompts(1, 2, 3), exceptions="fail")
    assert [(talk.end, talk.error, talk.reward) for talk in talks] == [
        ("done", None, None), ("failed", "ZeroDivisionError", None), ("failed", "KeyError", None),
    ]
    for function in (lambda text: "yes", lambda text: (1, "x"), lambda text: (True, 3)):
        with pytest.raises(UserError, match=r"wanted|gave"):
            talked(function, prompts(1), exceptions="fail")


def test_episodes_are_closed_whatever_happens() -> None:
    closed: list[int] = []

    class Board:
        def step(self, text: str) -> tuple[bool, str]:
            return broken_move(text)

        def close(self) -> None:
            closed.append(1)

    with pytest.raises(ZeroDivisionError):
        talked(Board, prompts(1, 2))
    assert len(closed) == 2


@pytest.mark.parametrize("workers", [1, 4])
def test_the_number_of_threads_changes_nothing(workers: int) -> None:
    talks = talked(until_three, prompts(4, 5, 6, 7), each=2, workers=workers)
    alone = [talked(until_three, prompts(number))[0] for number in (4, 4, 5, 5, 6, 6, 7, 7)]
    assert [(talk.tokens, talk.weights, talk.logp) for talk in talks] == [
        (talk.tokens, talk.weights, talk.logp) for talk in alone
    ]


def test_a_callback_by_name_may_want_the_facts_and_is_part_of_a_recipe() -> None:
    settings = Rollouts.model_validate({"environment": {"function": f"{HERE}:with_facts", "max_turns": 3}})
    assert settings.environment is not None and settings.environment.max_turns == 3
    (talk,) = talked(settings.environment, prompts(1, right="yes"))
    assert talk.heard == [Feedback(True, "yes", reward=2.0)]
    assert Rollouts.model_validate(settings.plain()) == settings
    with pytest.raises(UserError, match="did you mean `with_facts`"):
        Callback(function=f"{HERE}:with_factz").begin(prompts(1)[0])


def test_log_probabilities_of_three_real_turns_are_those_of_the_whole_conversation() -> None:
    family = Llama.model_validate(
        {"hidden_size": 32, "layers": 2, "heads": 4, "kv_heads": 2, "context_length": 96, "init_std": 0.3}
    )
    policy = family.build(60, torch.float64)
    policy.initialise(0)
    sampler = Own(max_rows=2, block=4).open(policy, Tokens(vocabulary=60), policy)
    given = [Prompt((), (7, 8, 9)), Prompt((), (5,)), Prompt((), (30, 31))]
    environment = Callback.given(lambda text: (False, "x" * 20), max_turns=3, workers=2)
    sampling = Sampling(max_new_tokens=6, stop_ids=(11, 12, 13, 14, 15, 16, 17, 18))
    talks = converse(
        sampler, given, 2, sampling, 3, environment, spoken,
        lambda talk, feedback: [3, 20 + len(talk.said), 1],
    )  # fmt: skip
    assert {talk.end for talk in talks} == {"turns", "length"} and max(len(talk.said) for talk in talks) == 3
    for talk in talks:
        assert [talk.tokens[at : at + len(turn.tokens)] for at, turn in talk.written] == [
            list(turn.tokens) for _, turn in talk.written
        ]
        batch = alone(talk.prompt.tokens, talk.tokens)
        logp_BT = policy(batch, ("logp",)).logp_BT
        assert logp_BT is not None
        found = logp_BT[0, len(talk.prompt.tokens) - 1 :].detach().numpy() * np.array(talk.weights)
        assert np.abs(found - talk.logp).max() < 1e-12


def with_facts(text: str, facts: Mapping[str, Any]) -> tuple[bool, str, int]:
    return True, facts["right"], 2


def add(a: int, b: int) -> int:
    return a + b


def test_calls_are_answered_and_an_answer_without_one_ends_the_conversation() -> None:
    episode = Tools(functions={"add": f"{HERE}:add"}).begin(prompts(1)[0])
    call = '<tool_call>{"name": "add", "arguments": {"a": 2, "b": 3}}</tool_call>'
    assert episode.step(call) == Feedback(False, "5", "tool")
    assert episode.step(f"{call}\n{call}").text == "5\n5"
    assert episode.step('<tool_call>{"name": "add", "arguments": "{\\"a\\": 1, \\"b\\": 1}"}</tool_call>').text == "2"
    assert episode.step("The sum is 5.") == Feedback(True)
    assert episode.step(f"<think>{call}</think>The sum is 5.") == Feedback(True)


@pytest.mark.parametrize("text", [
    "<tool_call>", "<tool_call>{}</tool_call>", "<tool_call>add(1, 2)</tool_call>", "<tool_call>[1]</tool_call>",
    '<tool_call>{"name": "remove"}</tool_call>', '<tool_call>{"name": "add", "arguments": [1, 2]}</tool_call>',
    '<tool_call>{"name": "add", "arguments": {"a": 1}}</tool_call>',
    '<tool_call>{"name": "add", "arguments": {"a": 1, "b": "x"}}</tool_call>',
    '<tool_call>{"name": ["add"], "arguments": {}}</tool_call>',
])
def test_a_call_that_cannot_be_made_is_told_to_the_policy_as_an_error(text: str) -> None:
    feedback = Tools.given(add).begin(prompts(1)[0]).step(text)
    assert feedback.error and not feedback.done and feedback.role == "tool" and "error" in feedback.text


def test_what_a_tool_gives_is_shown_up_to_a_length() -> None:
    def long() -> list[str]:
        return ["x" * 100]

    tools = Tools.given(long, longest=10, opening="[[", closing="]]")
    feedback = tools.begin(prompts(1)[0]).step('[[{"name": "long"}]]')
    assert feedback.text == '["xxxxxxxx'
