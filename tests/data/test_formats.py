"""Formats of conversations: one dialogue in every form, tools, reasoning, and what is refused by name."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from llmtrainer.base.errors import UserError
from llmtrainer.core.example import Example, Message
from llmtrainer.data.detect import detect, placed, shown
from llmtrainer.data.document import Reading
from llmtrainer.data.format import Format
from llmtrainer.data.formats.conversations import Conversations
from llmtrainer.data.formats.dialog import Dialog
from llmtrainer.data.formats.instruction import Instruction
from llmtrainer.data.formats.messages import Messages
from llmtrainer.data.formats.prompt_completion import PromptCompletion
from llmtrainer.data.formats.prompt_response import PromptResponse
from llmtrainer.data.formats.roles import Roles
from llmtrainer.data.formats.turns import Turns
from llmtrainer.data.records import Record, records
from tests.data.chats import write_lines

ASKED, ANSWERED = "How hot is it\nin \u5317\u4eac?", "17 degrees."
ONE = (Message("user", ASKED), Message("assistant", ANSWERED))
SPOKEN = [{"role": "user", "content": ASKED}, {"role": "assistant", "content": ANSWERED}]
FORMS: dict[str, tuple[Format, Any]] = {
    "messages": (Messages(), {"messages": SPOKEN}),
    "conversations": (
        Conversations(), {"conversations": [{"from": "human", "value": ASKED}, {"from": "gpt", "value": ANSWERED}]}
    ),
    "instruction": (Instruction(), {"instruction": ASKED, "input": "", "output": ANSWERED}),
    "instances": (Instruction(), {"instruction": ASKED, "instances": [{"input": "", "output": ANSWERED}]}),
    "prompt_completion": (PromptCompletion(), {"prompt": SPOKEN[:1], "completion": SPOKEN[1:]}),
    "dialog": (Dialog(), {"dialog": SPOKEN}),
    "user and assistant": (Dialog(), {"user": ASKED, "assistant": ANSWERED}),
    "roles": (Roles(), SPOKEN),
    "turns": (Turns(), [ASKED, ANSWERED]),
}


def unread(example: Example) -> tuple[Message, ...]:
    """The messages without the weight that only says what is so anyway."""
    return tuple(Message(item.role, item.content, item.thinking, item.tool_calls) for item in example.messages)


@pytest.mark.parametrize("name", FORMS)
def test_one_dialogue_is_the_same_example_in_every_form(name: str) -> None:
    format, record = FORMS[name]
    assert format.matches(record)
    example = format.example(record)
    assert unread(example) == ONE and not example.plain


@pytest.mark.parametrize(
    ("format", "record"),
    [
        (PromptResponse(), {"prompt_id": "a", "prompt": ASKED, "response": ANSWERED}),
        (PromptCompletion(), {"prompt": ASKED, "completion": ANSWERED}),
        (Dialog(), {"context": ASKED, "target": ANSWERED}),
    ],
)
def test_a_prompt_and_what_follows_it_take_no_template(format: Format, record: Any) -> None:
    example = format.example(record)
    assert example.plain and example.messages == ONE and example.name == record.get("prompt_id")


def test_a_call_is_the_same_whether_its_arguments_are_an_object_or_their_text() -> None:
    arguments = {"place": "\u5317\u4eac", "days": [1, 2]}
    tool = {"name": "weather", "parameters": {"type": "object"}}
    call = {"type": "function", "function": {"name": "weather", "arguments": arguments}}
    as_text = {"id": "c1", "type": "function", "function": {"name": "weather", "arguments": json.dumps(arguments)}}
    messages = [
        SPOKEN[0], {"role": "assistant", "content": None, "tool_calls": [as_text]},
        {"role": "tool", "content": "17", "tool_call_id": "c1"}, SPOKEN[1],
    ]  # fmt: skip
    example = Messages().example({"messages": messages, "tools": json.dumps([tool])})
    assert example.tools == ({"type": "function", "function": tool},)
    assert example.messages[1] == Message("assistant", "", tool_calls=({"id": "c1", **call},))
    assert example.messages[2] == Message("tool", "17", tool_call_id="c1")
    turns = [
        {"from": "human", "value": ASKED},
        {"from": "function_call", "value": json.dumps({"name": "weather", "arguments": arguments})},
        {"from": "observation", "value": "17"}, {"from": "gpt", "value": ANSWERED},
    ]  # fmt: skip
    same = Conversations().example({"conversations": turns, "system": "Be kind.", "tools": [tool]})
    assert same.tools == example.tools and same.messages[0] == Message("system", "Be kind.")
    assert same.messages[2] == Message("assistant", "", tool_calls=(call,))
    assert same.messages[3] == Message("tool", "17")


@pytest.mark.parametrize("key", ["thinking", "reasoning", "reasoning_content", "think"])
def test_what_an_assistant_thought_is_found_under_each_of_its_names(key: str) -> None:
    example = Roles().example([SPOKEN[0], {**SPOKEN[1], key: "Look outside."}])
    assert example.messages[1].thinking == "Look outside."


def test_parts_of_a_content_are_sorted_into_text_reasoning_and_calls() -> None:
    call = json.dumps({"name": "weather", "arguments": {}})
    content = [
        {"type": "reasoning", "value": "Hm."}, {"type": "text", "text": "I will "}, {"type": "text", "value": "look."},
        {"type": "tool_call", "value": call},
    ]  # fmt: skip
    made = Messages().example({"messages": [SPOKEN[0], {"role": "assistant", "content": content}]}).messages[1]
    assert (made.content, made.thinking) == ("I will look.", "Hm.")
    assert made.tool_calls == ({"type": "function", "function": {"name": "weather", "arguments": {}}},)


def test_weights_of_messages_and_earlier_turns_are_taken() -> None:
    messages = [{**SPOKEN[0], "train": True}, {**SPOKEN[1], "weight": 0.5}]
    assert [item.weight for item in Messages().example({"messages": messages}).messages] == [1.0, 0.5]
    record = {"instruction": "Add.", "input": "1", "output": "2", "history": [["a", "b"]], "system": "s"}
    assert [item.content for item in Instruction().example(record).messages] == ["s", "a", "b", "Add.\n\n1", "2"]
    earlier = {"prompt": [*SPOKEN, SPOKEN[0]], "completion": SPOKEN[1:]}
    assert [item.weight for item in PromptCompletion().example(earlier).messages] == [0.0, 0.0, 0.0, None]


def test_a_turn_of_sharegpt_has_weight_reasoning_and_calls_like_a_message() -> None:
    call = {"name": "weather", "arguments": {}}
    turns = [
        {"from": "human", "value": "a"},
        {"from": "gpt", "value": "b", "weight": 0, "reasoning": "Hm.", "tool_calls": [call]},
        {"from": "gpt", "value": "c", "train": False},
    ]
    made = Conversations().example({"conversations": turns}).messages
    assert [item.weight for item in made] == [None, 0.0, 0.0]
    assert made[1].thinking == "Hm." and made[1].tool_calls == ({"type": "function", "function": call},)


def test_the_older_form_of_a_call_is_a_call() -> None:
    called = {"role": "assistant", "content": None, "function_call": {"name": "look", "arguments": '{"at": "b"}'}}
    record = {"messages": [SPOKEN[0], called, {"role": "function", "name": "look", "content": "17"}]}
    assert Messages().matches(record) and Messages().matches({"messages": [SPOKEN[0], {**called, "content": "x"}]})
    made = Messages().example(record).messages
    assert made[1].tool_calls == ({"type": "function", "function": {"name": "look", "arguments": {"at": "b"}}},)
    assert [item.role for item in made] == ["user", "assistant", "tool"]


TOLD = {"type": "function", "function": {"name": "look"}}


@pytest.mark.parametrize(
    ("format", "record"),
    [
        (Messages(), {"messages": SPOKEN}), (Dialog(), {"dialog": SPOKEN}), (Dialog(), {"user": "a", "assistant": "b"}),
        (PromptCompletion(), {"prompt": SPOKEN[:1], "completion": SPOKEN[1:]}),
        (Instruction(), {"instruction": "a", "output": "b"}),
        (Conversations(), {"conversations": [{"from": "human", "value": "a"}, {"from": "gpt", "value": "b"}]}),
    ],
)
def test_a_system_text_and_tools_beside_a_conversation_belong_to_it(format: Format, record: dict[str, Any]) -> None:
    plain = format.example(record)
    for key in ("tools", "functions"):
        made = format.example({**record, "system": "Be brief.", key: [{"name": "look"}]})
        assert made.messages == (Message("system", "Be brief."), *plain.messages) and made.tools == (TOLD,)
        assert "system" not in made.facts and key not in made.facts
    assert format.example({**record, "system": "", "tools": None}).messages == plain.messages


def test_a_second_system_text_and_one_beside_texts_without_a_template_are_refused() -> None:
    first = {"role": "system", "content": "Be brief."}
    with pytest.raises(UserError, match="two system texts"):
        Messages().example({"messages": [first, *SPOKEN], "system": "Be long."})
    assert len(Messages().example({"messages": [first, *SPOKEN], "system": "Be brief."}).messages) == 1 + len(SPOKEN)
    for format, record in (
        (PromptResponse(), {"prompt": "a", "response": "b"}), (PromptCompletion(), {"prompt": "a", "completion": "b"}),
        (Dialog(), {"context": "a", "target": "b"}),
    ):
        for key in ("system", "tools"):
            with pytest.raises(UserError, match=f"a record has `{key}`, and") as error:
                format.example({**record, key: "x"})
            assert error.value.where == f"key `{key}`"


def test_reasoning_under_two_names_is_taken_where_it_is_one_and_refused_where_it_is_two() -> None:
    spoken = {**SPOKEN[1], "thinking": "Hm.", "reasoning_content": "Hm."}
    assert Messages().example({"messages": [spoken]}).messages[0].thinking == "Hm."
    parts = [{"type": "thinking", "thinking": "Hm."}, {"type": "text", "text": "x"}]
    for wrong in ({**spoken, "reasoning_content": "Ah."}, {**SPOKEN[1], "content": parts, "think": "Ah."}):
        with pytest.raises(UserError, match="they differ") as error:
            Messages().example({"messages": [wrong]})
        assert error.value.where == "key `messages.0`"


def test_keys_of_another_name_may_be_given() -> None:
    format = Format.model_validate({"kind": "instruction", "input": "context", "output": "response"})
    example = format.example({"instruction": "Add.", "context": "1 and 2", "response": "3"})
    assert [item.content for item in example.messages] == ["Add.\n\n1 and 2", "3"]
    format = Format.model_validate({"kind": "instruction", "between": "\n\n### Input:\n"})
    for about, asked in (("1 and 2", "Add.\n\n### Input:\n1 and 2"), ("", "Add.")):
        example = format.example({"instruction": "Add.", "input": about, "output": "3"})
        assert [item.content for item in example.messages] == [asked, "3"]


@pytest.mark.parametrize(
    ("format", "record", "what", "key"),
    [
        (Messages(), {"messages": [{"role": "wizard", "content": "x"}]}, "nobody is called", "messages.0.role"),
        (Messages(), {"messages": [{"role": "user"}]}, "no `content`", "messages.0.content"),
        (Messages(), {"messages": [{"role": "user", "content": 3}]}, "a number", "messages.0.content"),
        (Messages(), {"messages": [{"role": "user", "content": [{"type": "image", "text": "x"}]}]}, "image",
         "messages.0.content.0.type"),
        (Messages(), {"messages": [{**SPOKEN[1], "weight": -1}]}, "-1", "messages.0.weight"),
        (Messages(), {"messages": [{**SPOKEN[1], "weight": float("nan")}]}, "nan", "messages.0.weight"),
        (Messages(), {"messages": [{**SPOKEN[1], "weight": 1e300}]}, "1e\\+300", "messages.0.weight"),
        (Messages(), {"messages": [{**SPOKEN[1], "weight": 10**400}]}, "is 1000", "messages.0.weight"),
        (Messages(), {"messages": SPOKEN, "tools": "{"}, "no JSON", "tools"),
        (Conversations(), {"conversations": [{"from": "cat", "value": "x"}]}, "nobody is called",
         "conversations.0.from"),
        (Conversations(), {"conversations": [{"from": "function_call", "value": "look"}]}, "no JSON",
         "conversations.0.value"),
        (Instruction(), {"instruction": "x", "instances": [{}, {}]}, "2 instances", "instances"),
        (PromptCompletion(), {"prompt": "x", "completion": SPOKEN}, "not of one kind", "completion"),
        (Turns(), ["alone"], "1 turns", "."),
    ],
)  # fmt: skip
def test_what_is_wrong_is_named_by_its_key(format: Format, record: Any, what: str, key: str) -> None:
    with pytest.raises(UserError, match=what) as error:
        format.example(record)
    assert error.value.where == f"key `{key}`"


def found(path: Path, lines: list[Any]) -> list[Record]:
    return list(records(write_lines(path, lines), Reading(whole=True)))


def test_a_record_that_is_wrong_is_told_with_file_line_and_key(tmp_path: Path) -> None:
    lines = found(tmp_path / "chats.jsonl", [{"messages": SPOKEN}, {"messages": [{"role": "user"}]}])
    with pytest.raises(UserError) as error:
        placed(Messages(), lines[1])
    assert error.value.where == f"{tmp_path / 'chats.jsonl'}, line 2, key `messages.0.content`"


@pytest.mark.parametrize("name", FORMS)
def test_a_file_is_known_by_its_records_and_the_first_example_is_shown(tmp_path: Path, name: str) -> None:
    format, record = FORMS[name]
    told = detect(Format.model_validate("auto"), found(tmp_path / "chats.jsonl", [record, record]))
    assert told is not None and told.format == format
    assert f"format {format.kind} (known by" in told.how and f"assistant: {ANSWERED}" in told.how
    assert "How hot is it\\nin \u5317\u4eac?" in told.how


def test_a_file_that_fits_no_format_or_several_is_refused_with_their_names(tmp_path: Path) -> None:
    others = [{"messages": SPOKEN}, {"user": "x", "assistant": "y"}, {"text": "x"}]
    with pytest.raises(UserError, match="no format fits") as error:
        detect(Format.model_validate("auto"), found(tmp_path / "a.jsonl", others))
    assert error.value.where == f"{tmp_path / 'a.jsonl'}, line 3" and "`text`" in str(error.value)
    both = {"messages": SPOKEN, "conversations": [{"from": "human", "value": "x"}]}
    with pytest.raises(UserError, match="2 formats fit") as error:
        detect(Format.model_validate("auto"), found(tmp_path / "b.jsonl", [both]))
    assert "format=conversations or format=messages" in str(error.value.fix)
    mixed = [{"messages": SPOKEN}, {"conversations": [{"from": "human", "value": "x"}]}]
    with pytest.raises(UserError, match="of different formats") as error:
        detect(Format.model_validate("auto"), found(tmp_path / "c.jsonl", mixed))
    assert error.value.where == f"{tmp_path / 'c.jsonl'}, line 2" and "line 1 is messages" in str(error.value.why)
    assert detect(Format.model_validate("auto"), []) is None
    named = detect(Messages(), found(tmp_path / "b.jsonl", [both]))
    assert named is not None and named.format == Messages()


@pytest.mark.parametrize(
    ("lines", "line", "key", "what"),
    [
        ([{"messages": SPOKEN}] * 3 + [{"text": "x"}], 4, "messages", "no `messages`"),
        ([{"messages": SPOKEN}, {"messages": [{"role": "user"}]}], 2, "messages.0.content", "no `content`"),
        ([{"messages": [{"role": "user"}]}], 1, "messages.0.content", "no `content`"),
        ([{"instruction": "x", "answer": "y"}], 1, "output", "no `output`"),
        ([FORMS["conversations"][1], {"conversations": []}], 2, "conversations", "no message"),
        ([SPOKEN, [SPOKEN[0], {"role": "assistant"}]], 2, "1.content", "no `content`"),
    ],
)
def test_a_bad_record_among_the_first_is_told_with_file_line_and_key(
    tmp_path: Path, lines: list[Any], line: int, key: str, what: str
) -> None:
    with pytest.raises(UserError, match=what) as error:
        detect(Format.model_validate("auto"), found(tmp_path / "chats.jsonl", lines))
    assert error.value.where == f"{tmp_path / 'chats.jsonl'}, line {line}, key `{key}`"


def test_what_is_shown_of_an_example_is_short_and_obeys_no_terminal() -> None:
    told = shown(Example((Message("user", "\x1b[2J" + "x" * 500),)))
    assert "\x1b" not in told and "(504 characters)" in told and len(told) < 250
