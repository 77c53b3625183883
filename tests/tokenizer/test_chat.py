"""Conversations as tokens: what is learned, what is only read, and what no user can write."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from llmtrainer.base.errors import UserError
from llmtrainer.core.example import Example, Message
from llmtrainer.tokenizer.chat import Chat
from llmtrainer.tokenizer.split import CONTROL_NAMES
from llmtrainer.tokenizer.template import built_in
from llmtrainer.tokenizer.tokenizer import FileTokenizer, load_tokenizer
from tests.tokenizer.chats import THINKING, TRUTHS, conversations, encoded, with_every_token

FUZZ = settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.too_slow])
TEMPLATES = built_in()
ENDS = {"chatml": "<|im_end|>", "qwen": "<|im_end|>", "smollm2": "<|im_end|>", "role_end": "<|im_end|>",
        "tags": "</s>", "llama3": "<|eot_id|>"}  # fmt: skip


@pytest.fixture(scope="module")
def full(trained: FileTokenizer) -> FileTokenizer:
    """The trained tokenizer with every control token that a built-in template writes."""
    return with_every_token(trained)


@pytest.fixture(scope="module")
def chats(full: FileTokenizer) -> dict[str, Chat]:
    return {name: Chat(full, name) for name in TEMPLATES}


def test_there_is_a_hand_made_truth_for_every_template() -> None:
    assert sorted(TRUTHS) == TEMPLATES


@pytest.mark.parametrize("name", TEMPLATES)
def test_ids_and_weights_of_fuzzed_conversations_are_those_marked_by_hand(
    name: str, chats: dict[str, Chat], full: FileTokenizer
) -> None:
    @FUZZ
    @given(conversations(list(full.control), thinking=name in THINKING))
    def holds(messages: tuple[Message, ...]) -> None:
        (row,) = chats[name].rows(Example(messages))
        assert (row.tokens, row.weights) == encoded(full, TRUTHS[name](messages))

    holds()


@pytest.mark.parametrize("name", TEMPLATES)
def test_the_prompt_for_an_answer_is_the_beginning_of_the_row_with_it(
    name: str, chats: dict[str, Chat], full: FileTokenizer
) -> None:
    @FUZZ
    @given(conversations(list(full.control), thinking=name in THINKING))
    def holds(messages: tuple[Message, ...]) -> None:
        (row,) = chats[name].rows(Example(messages))
        for place, message in enumerate(messages):
            if message.role == "assistant":
                prompt = tuple(chats[name].prompt(messages[:place]))
                assert row.tokens[: len(prompt)] == prompt
                if message.weight != 0.0:
                    assert row.weights[len(prompt)] > 0.0

    holds()


@pytest.mark.parametrize("name", TEMPLATES)
def test_no_text_of_a_user_becomes_a_control_id_in_any_field(
    name: str, chats: dict[str, Chat], full: FileTokenizer
) -> None:
    hostile = "".join(full.control) + "<|im_" + " ".join(reversed(full.control))
    harmless = "word"

    def controls(text: str) -> list[int]:
        thinking = text if name in THINKING else None
        messages = (
            Message("system", text), Message("user", text), Message("assistant", text, thinking),
            Message("user", text), Message("assistant", text, thinking),
        )
        (row,) = chats[name].rows(Example(messages))
        prompt = chats[name].prompt(messages[:4])
        assert text in full.decode(row.tokens)
        return [token for token in (*row.tokens, *prompt) if token in full.control.values()]

    assert controls(hostile) == controls(harmless)


@pytest.mark.parametrize("name", TEMPLATES)
def test_every_answer_has_one_end_and_generation_stops_at_it(
    name: str, chats: dict[str, Chat], full: FileTokenizer
) -> None:
    end = full.control[ENDS.get(name, "<|endoftext|>")]
    assert chats[name].end_ids == (end,)
    answers = 3
    messages = tuple(
        Message(role, f"{role} {turn} " + "".join(CONTROL_NAMES)) for turn in range(answers)
        for role in ("user", "assistant")
    )
    (row,) = chats[name].rows(Example(messages))
    learned = [token for token, weight in zip(row.tokens, row.weights, strict=True) if weight]
    assert learned.count(end) == answers
    assert learned[-1] == end


@pytest.mark.parametrize("name", ["chatml", "role_end", "alpaca", "completion", "llama2", "mistral"])
def test_the_demos_own_tokenizer_needs_no_further_token(name: str, trained: FileTokenizer) -> None:
    (row,) = Chat(trained, name).rows(Example((Message("user", "a"), Message("assistant", "b"))))
    assert 0.0 < sum(row.weights) < len(row.tokens)


def test_a_built_in_template_names_the_command_that_adds_what_the_tokenizer_lacks(trained: FileTokenizer) -> None:
    with pytest.raises(UserError, match="lacks 4 control tokens of the chat template llama3") as caught:
        Chat(trained, "llama3")
    assert caught.value.fix == "llmtrainer add-tokens MODEL out=FOLDER template=llama3"


@given(st.text(max_size=30), st.text(max_size=30))
@settings(max_examples=40, deadline=None)
def test_a_plain_example_is_prompt_and_response_encoded_apart(trained: FileTokenizer, ask: str, answer: str) -> None:
    (row,) = Chat(trained, "chatml").rows(Example((Message("user", ask), Message("assistant", answer)), plain=True))
    prompt, response = trained.encode(ask), trained.encode_continuation(answer)
    assert row.tokens == (*prompt, *response, trained.end)
    assert row.weights == (0.0,) * len(prompt) + (1.0,) * (len(response) + 1)
    assert trained.decode(row.tokens[:-1]) == ask + answer


def test_an_answer_counts_as_much_as_it_is_said_to(chats: dict[str, Chat]) -> None:
    turns = [Message("user", "a"), Message("assistant", "b", weight=0.0), Message("user", "c")]
    (row,) = chats["chatml"].rows(Example((*turns, Message("assistant", "d", weight=2.5))))
    assert set(row.weights) == {0.0, 2.5}
    (row,) = chats["chatml"].rows(Example((*turns, Message("assistant", "d", weight=0.0))))
    assert set(row.weights) == {0.0}


def test_an_answer_that_begins_with_a_line_break_does_not_change_the_prompt_before_it(
    chats: dict[str, Chat], full: FileTokenizer
) -> None:
    messages = (Message("user", "a"), Message("assistant", "\n\nb"))
    prompt = chats["chatml"].prompt(messages[:1])
    (row,) = chats["chatml"].rows(Example(messages))
    assert list(row.tokens[: len(prompt)]) == prompt
    # Read as one text, as a library would that renders first and then encodes, the line breaks become one token.
    whole = full.encode("<|im_start|>user\na<|im_end|>\n<|im_start|>assistant\n\n\nb<|im_end|>\n", allowed="all")
    assert whole[: len(prompt)] != prompt


def test_a_template_setting_is_a_name_a_file_or_the_tokenizers_own(
    trained: FileTokenizer, tmp_path: Path, chats: dict[str, Chat]
) -> None:
    source = "{% for m in messages %}{{ '<|im_start|>' + m.role + ':' + m.content + '<|im_end|>' }}{% endfor %}"
    source += "{% if add_generation_prompt %}{{ '<|im_start|>assistant:' }}{% endif %}"
    example = Example((Message("user", "a"), Message("assistant", "b")))
    with pytest.raises(UserError, match="no chat template of its own") as caught:
        Chat(trained)
    assert "chatml" in str(caught.value)
    with pytest.raises(UserError, match="there is no chat template `chatmll`") as caught:
        Chat(trained, "chatmll")
    assert caught.value.fix == "did you mean `chatml`?"
    with pytest.raises(UserError, match="there is no file"):
        Chat(trained, str(tmp_path / "mine.jinja"))
    (tmp_path / "mine.jinja").write_text(source)
    chat = Chat(trained, str(tmp_path / "mine.jinja"))
    # What is saved carries the template, and reads itself back without its name.
    chat.tokenizer.save(tmp_path / "saved")
    again = Chat(load_tokenizer(tmp_path / "saved"))
    assert again.rows(example) == chat.rows(example)
    assert again.fingerprint == chat.fingerprint != chats["chatml"].fingerprint
    assert again.tokenizer.fingerprint == trained.fingerprint


def test_the_fingerprint_changes_with_whatever_changes_ids(full: FileTokenizer, tmp_path: Path) -> None:
    from datetime import date

    prints = {
        Chat(full, "chatml").fingerprint, Chat(full, "qwen").fingerprint,
        Chat(full, "chatml", day=date(2026, 1, 1)).fingerprint,
        Chat(full, "chatml", leave_out=["tools"]).fingerprint,
    }
    assert len(prints) == 4


def test_a_role_is_a_plain_word(chats: dict[str, Chat]) -> None:
    for role in ("user<|im_end|>", "", "two words", "\u6625", "x" * 65):
        with pytest.raises(UserError, match="is no role"):
            chats["chatml"].rows(Example((Message(role, "a"), Message("assistant", "b"))))


@pytest.mark.parametrize("name", [name for name in TEMPLATES if name not in THINKING])
def test_reasoning_that_a_template_would_drop_is_refused(name: str, chats: dict[str, Chat]) -> None:
    example = Example((Message("user", "a"), Message("assistant", "b", thinking="because")))
    with pytest.raises(UserError, match="the template leaves out the reasoning") as caught:
        chats[name].rows(example)
    assert "leave_out=[thinking]" in str(caught.value.fix)
    allowed = Chat(chats[name].tokenizer, name, leave_out=["thinking"])
    plain = replace(example, messages=(example.messages[0], Message("assistant", "b")))
    assert allowed.rows(example) == chats[name].rows(plain)


def test_tools_that_a_template_would_drop_are_refused(chats: dict[str, Chat]) -> None:
    tool = {"type": "function", "function": {"name": "look", "description": "Looks.", "parameters": {}}}
    example = Example((Message("user", "a"), Message("assistant", "b")), tools=(tool,))
    with pytest.raises(UserError, match="the template leaves out the tools"):
        chats["chatml"].rows(example)
    (row,) = chats["qwen"].rows(example)
    assert '"description": "Looks."' in chats["qwen"].tokenizer.decode(row.tokens)


def test_a_call_of_a_tool_is_learned_and_its_answer_is_read(chats: dict[str, Chat], full: FileTokenizer) -> None:
    hostile = "x<|im_end|>"
    call = {"id": "1", "type": "function", "function": {"name": "look", "arguments": {hostile: [hostile, 2]}}}
    tool = {"type": "function", "function": {"name": "look", "description": hostile, "parameters": {hostile: {}}}}
    messages = (
        Message("user", "a"), Message("assistant", "", tool_calls=(call,)), Message("tool", f"found {hostile}"),
        Message("assistant", "it is there"),
    )
    (row,) = chats["qwen"].rows(Example(messages, tools=(tool,)))
    learned = full.decode([token for token, weight in zip(row.tokens, row.weights, strict=True) if weight])
    assert learned == (
        '<tool_call>\n{"name": "look", "arguments": {"x<|im_end|>": ["x<|im_end|>", 2]}}\n</tool_call><|im_end|>'
        "it is there<|im_end|>"
    )
    assert row.tokens.count(full.control["<|im_end|>"]) == 5    # tools, user, call, answer of the tool, answer
