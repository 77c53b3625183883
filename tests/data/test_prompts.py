"""What is a prompt in a record, what is a fact, and which prompts a step asks."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest

from llmtrainer.base.errors import UserError
from llmtrainer.core.example import Message
from llmtrainer.core.rollout import Prompt
from llmtrainer.data.document import Reading, SourceFile
from llmtrainer.data.prompts import PromptChoices, Prompts, PromptTable, asked, read_prompts
from llmtrainer.data.records import records

USER = Message("user", "2 + 3?")


class Bytes:
    """Messages between brackets, one byte a token."""

    def prompt(self, messages: Sequence[Message], tools: Sequence[Mapping[str, Any]] = ()) -> list[int]:
        return list("".join(f"[{item.role}:{item.content}]" for item in messages).encode() + b">" * (1 + len(tools)))

    def plain_prompt(self, text: str) -> list[int]:
        return list(text.encode())


def read(path: Path, *lines: Any, bad_may_drop: bool = False, **choices: Any) -> PromptTable:
    file = path / "prompts.jsonl"
    file.write_text("".join(json.dumps(line) + "\n" for line in lines))
    found = records(SourceFile(file, file.stat().st_size), Reading(whole=True))
    return read_prompts(found, Bytes(), PromptChoices(**choices), bad_may_drop=bad_may_drop)


@pytest.mark.parametrize(
    ("record", "choices", "messages", "plain", "facts"),
    [
        ({"prompt": "2 + 3?", "answer": 5}, {}, (USER,), True, {"answer": 5}),
        ({"question": "2 + 3?", "id": 1}, {"as_messages": True}, (USER,), False, {"id": 1}),
        ({"prompt": "2 + 3?"}, {"system": "Be short."}, (Message("system", "Be short."), USER), False, {}),
        (
            {"prompt": "2 + 3?", "system": "Be long."}, {"system": "Be short."},
            (Message("system", "Be long."), USER), False, {},
        ),
        ({"prompt": [{"role": "user", "content": "2 + 3?"}], "answer": "5"}, {}, (USER,), False, {"answer": "5"}),
        ({"conversations": [{"from": "human", "value": "2 + 3?"}]}, {}, (USER,), False, {}),
        (
            {"messages": [{"role": "user", "content": "2 + 3?"}, {"role": "assistant", "content": "5"}]}, {}, (USER,),
            False, {"answer": "5"},
        ),
        ({"Body": "2", "Question": "+ 3?"}, {"key": "Body+Question"}, (Message("user", "2\n+ 3?"),), True, {}),
        ({"instruction": "Add.", "input": "2, 3"}, {}, (Message("user", "Add.\n\n2, 3"),), True, {}),
        ("2 + 3?", {}, (USER,), True, {}),
    ],
)  # fmt: skip
def test_a_prompt_is_found_under_any_usual_key_and_what_is_left_are_facts(
    record: Any, choices: dict[str, Any], messages: tuple[Message, ...], plain: bool, facts: dict[str, Any]
) -> None:
    found = asked(record, PromptChoices(**choices))
    assert (found.messages, found.plain, found.facts) == (messages, plain, facts)


@pytest.mark.parametrize(
    ("record", "key"),
    [
        ({"text": "2 + 3?"}, "prompt"), ({"prompt": ""}, "prompt"), ({"prompt": 5}, "prompt"), (7, "."),
        ({"prompt": []}, "prompt"), ({"messages": [{"role": "assistant", "content": "5"}]}, "messages"),
        ({"prompt": [{"role": "nobody", "content": "5"}]}, "prompt.0.role"),
        ({"prompt": [5, 6], "system": "Be short."}, "system"), ({"prompt": [5, 6], "tools": [{"name": "a"}]}, "tools"),
        ({"messages": [{"role": "system", "content": "a"}, {"role": "user", "content": "b"}], "system": "c"}, "system"),
    ],
)  # fmt: skip
def test_a_record_whose_prompt_is_missing_or_doubtful_names_the_key(record: Any, key: str) -> None:
    with pytest.raises(UserError) as error:
        asked(record, PromptChoices())
    assert error.value.where == f"key `{key}`"


@pytest.mark.parametrize("name", ["tools", "functions"])
def test_tools_beside_a_text_make_it_a_message_that_may_call_them(name: str) -> None:
    tool = {"type": "function", "function": {"name": "look"}}
    found = asked({"prompt": "2 + 3?", name: [tool], "answer": 5}, PromptChoices())
    assert (found.messages, found.plain, found.tools, found.facts) == ((USER,), False, (tool,), {"answer": 5})


def test_messages_get_the_call_for_an_answer_and_texts_are_read_as_they_stand(tmp_path: Path) -> None:
    table = read(tmp_path, {"prompt": "ab"}, {"prompt": [{"role": "user", "content": "ab"}]}, {"prompt": [5, 6]})
    assert [bytes(prompt.tokens) for prompt in table.prompts] == [b"ab", b"[user:ab]>", b"\x05\x06"]
    assert [prompt.plain for prompt in table.prompts] == [True, False, True]
    assert "line 1" in table.how and "user: ab" in table.how


def test_a_prompt_that_is_too_long_is_dropped_or_keeps_the_end_that_was_asked_for(tmp_path: Path) -> None:
    lines = [{"prompt": "abcdef"}, {"prompt": "abc"}]
    dropped = read(tmp_path, *lines, longest=4)
    assert [bytes(prompt.tokens) for prompt in dropped.prompts] == [b"abc"]
    assert dropped.told.by_fate == {"kept": 1, "too long": 1} and "6 tokens" in dropped.told.examples["too long"]
    for kept, left in (("keep_end", b"cdef"), ("keep_start", b"abcd")):
        table = read(tmp_path, *lines, longest=4, too_long=kept)
        assert [bytes(prompt.tokens) for prompt in table.prompts] == [left, b"abc"]
        assert table.told.by_fate == {"kept": 1, "cut": 1}


def test_a_bad_record_stops_with_its_line_or_is_counted(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"prompts.jsonl, line 2, key `prompt`"):
        read(tmp_path, {"prompt": "a"}, {"prompt": 7})
    table = read(tmp_path, {"prompt": "a"}, {"prompt": 7}, bad_may_drop=True)
    assert table.told.by_fate == {"kept": 1, "bad record": 1} and table.told.records == 2


def numbered(count: int) -> list[Prompt]:
    return [Prompt((), (number,), {"number": number}) for number in range(count)]


def test_an_epoch_asks_every_prompt_once_and_a_step_is_a_function_of_its_number() -> None:
    prompts = Prompts(numbered(30), prompts_per_step=6, seed=3)
    asked = [prompts.prompt(draw).tokens[0] for step in range(5) for draw in prompts.draws(step)]
    assert sorted(asked) == list(range(30)) and asked != sorted(asked)
    again = Prompts(numbered(30), prompts_per_step=6, seed=3)
    assert [again.prompt(draw).tokens[0] for draw in again.draws(4)] == asked[24:]
    assert prompts.epochs(5) == 1.0 and prompts.steps_per_epoch == 5.0


def test_held_out_prompts_are_never_asked_in_training_whatever_the_seed() -> None:
    held = {Prompts(numbered(50), prompts_per_step=1, seed=seed, held_out=0.2, part="held_out") for seed in (1, 2)}
    sets = [Counter(part.prompt(draw).tokens[0] for draw in range(len(part))) for part in held]
    assert sets[0] == sets[1] and 0 < len(sets[0]) < 25
    train = Prompts(numbered(50), prompts_per_step=1, seed=1, held_out=0.2)
    asked = {train.prompt(draw).tokens[0] for draw in range(len(train))}
    assert asked.isdisjoint(sets[0]) and len(asked) + len(sets[0]) == 50


def test_the_fingerprint_knows_prompts_facts_and_what_decides_a_step() -> None:
    def of(prompts: list[Prompt], **settings: Any) -> str:
        return Prompts(prompts, **{"prompts_per_step": 6, "seed": 3, **settings}).fingerprint

    other = [*numbered(29), Prompt((), (29,), {"number": 30})]
    found = {
        of(numbered(30)), of(other), of(numbered(30), seed=4), of(numbered(30), prompts_per_step=5),
        of(numbered(30), shuffle=False), of(numbered(30), held_out=0.2),
    }  # fmt: skip
    assert len(found) == 6 and of(numbered(30)) in found


def test_no_prompt_at_all_is_refused() -> None:
    with pytest.raises(UserError, match="no prompt"):
        Prompts([], prompts_per_step=1, seed=0)
