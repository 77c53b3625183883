"""Templates as models bring them along: those that rewrite, trim, drop or repeat, and what must be refused."""

from __future__ import annotations

import json
from dataclasses import replace
from datetime import date
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings

from llmtrainer.base.errors import UserError
from llmtrainer.core.example import Example, Message, TokenRow
from llmtrainer.data.formats.instruction import Instruction
from llmtrainer.tokenizer.chat import Chat
from llmtrainer.tokenizer.tokenizer import FileTokenizer
from tests.tokenizer.chats import conversations

OPEN, CLOSE = "<|im_start|>", "<|im_end|>"
PROMPT = "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
QUESTION = (Message("user", "a"), Message("assistant", "b"))


def loop(body: str, behind: str = PROMPT) -> str:
    """A template of one loop. Blocks that stand alone in a line leave nothing behind, as transformers has it."""
    return "{% for message in messages %}" + body + "{% endfor %}" + behind


def chatml(content: str = "message.content") -> str:
    return loop("{{ '<|im_start|>' + message.role + '\n' + " + content + " + '<|im_end|>\n' }}")


DROPS_REASONING = (
    # Reasoning only behind the last question, and empty reasoning where an answer is the last: as Qwen3 has it.
    "{% set ns = namespace(last=0) %}{% for m in messages %}{% if m.role == 'user' %}"
    "{% set ns.last = loop.index0 %}{% endif %}{% endfor %}"
) + loop(
    "{{- '<|im_start|>' + message.role + '\n' }}"
    "{%- if message.role == 'assistant' and loop.index0 > ns.last and (loop.last or message.reasoning_content) %}"
    "{{- '<think>\n' + (message.reasoning_content or '').strip('\n') + '\n</think>\n\n' }}{% endif %}"
    "{{- message.content.lstrip('\n') + '<|im_end|>\n' }}"
)
OTHER_END_IN_HISTORY = loop(
    # The last answer ends with another token than those before it: as gpt-oss has it.
    "{{ '<|im_start|>' + message.role + '<|role_end|>' + message.content }}"
    "{% if message.role == 'assistant' and loop.last %}<|endoftext|>{% else %}<|im_end|>{% endif %}",
    "{% if add_generation_prompt %}<|im_start|>assistant<|role_end|>{% endif %}",
)
SYSTEM_IN_LAST_TURN = loop(
    # The system text goes into the last question: as Mistral's older templates have it.
    "{% if message.role == 'user' %}{{ '[INST] ' }}"
    "{% if messages[0].role == 'system' and loop.index0 >= messages | length - 2 %}"
    "{{ messages[0].content + '\n\n' }}{% endif %}{{ message.content + '[/INST]' }}"
    "{% elif message.role == 'assistant' %}{{ ' ' + message.content + eos_token }}{% endif %}", "",
)


def chat(tokenizer: FileTokenizer, source: str, folder: Path, **options: Any) -> Chat:
    (folder / "one.jinja").write_text(source, encoding="utf-8")
    return Chat(tokenizer, str(folder / "one.jinja"), **options)


def learned(tokenizer: FileTokenizer, row: TokenRow) -> list[str]:
    """Runs of learned tokens, as text."""
    runs: list[list[int]] = [[]]
    for token, weight in zip(row.tokens, row.weights, strict=True):
        if weight:
            runs[-1].append(token)
        elif runs[-1]:
            runs.append([])
    return [tokenizer.decode(run) for run in runs if run]


def turns(*contents: str) -> tuple[Message, ...]:
    return tuple(Message(("user", "assistant")[place % 2], text) for place, text in enumerate(contents))


def test_each_answer_is_learned_as_the_model_would_write_it_where_earlier_reasoning_is_dropped(
    trained: FileTokenizer, tmp_path: Path
) -> None:
    messages = (
        Message("user", "a"), Message("assistant", "b", "first"), Message("user", "c"), Message("assistant", "d"),
    )
    rows = chat(trained, DROPS_REASONING, tmp_path).rows(Example(messages))
    assert [learned(trained, row) for row in rows] == [
        ["<think>\nfirst\n</think>\n\nb<|im_end|>"], ["<think>\n\n</think>\n\nd<|im_end|>"],
    ]
    assert "first" not in trained.decode(rows[1].tokens)


def test_calls_behind_one_question_stay_in_one_row(trained: FileTokenizer, tmp_path: Path) -> None:
    messages = (
        Message("user", "a"), Message("assistant", "b", "first"), Message("tool", "c"),
        Message("assistant", "d", "then"),
    )
    (row,) = chat(trained, DROPS_REASONING, tmp_path).rows(Example(messages))
    assert learned(trained, row) == [
        "<think>\nfirst\n</think>\n\nb<|im_end|>", "<think>\nthen\n</think>\n\nd<|im_end|>",
    ]


def test_the_end_that_is_learned_is_the_one_generation_stops_at(trained: FileTokenizer, tmp_path: Path) -> None:
    made = chat(trained, OTHER_END_IN_HISTORY, tmp_path)
    assert made.end_ids == (trained.control["<|endoftext|>"],)
    rows = made.rows(Example(turns("a", "b", "c", "d")))
    assert [learned(trained, row) for row in rows] == [["b<|endoftext|>"], ["d<|endoftext|>"]]


def test_a_system_text_that_moves_makes_a_row_for_each_answer(trained: FileTokenizer, tmp_path: Path) -> None:
    messages = (Message("system", "s"), *turns("a", "b", "c", "d"))
    rows = chat(trained, SYSTEM_IN_LAST_TURN, tmp_path).rows(Example(messages))
    texts = [trained.decode(row.tokens) for row in rows]
    assert texts == [
        "[INST] s\n\na[/INST] b<|endoftext|>",
        "[INST] a[/INST] b<|endoftext|>[INST] s\n\nc[/INST] d<|endoftext|>",
    ]
    assert [learned(trained, row) for row in rows] == [[" b<|endoftext|>"], [" d<|endoftext|>"]]


@pytest.mark.parametrize("source", [DROPS_REASONING, OTHER_END_IN_HISTORY, chatml("message.content | trim")])
def test_every_answer_is_learned_once_behind_its_own_prompt(
    source: str, trained: FileTokenizer, tmp_path: Path
) -> None:
    made = chat(trained, source, tmp_path, leave_out=["thinking"])

    @settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.too_slow])
    @given(conversations([name for name in trained.control if name != OPEN], thinking=True, system=False))
    def holds(messages: tuple[Message, ...]) -> None:
        rows = made.rows(Example(messages))
        wanted = {
            tuple(made.prompt(messages[:place])): message.weight if message.weight is not None else 1.0
            for place, message in enumerate(messages) if message.role == "assistant" and message.weight != 0.0
        }
        found = {}
        for row in rows:
            for place, weight in enumerate(row.weights):
                if weight and not (place and row.weights[place - 1]):
                    found[row.tokens[:place]] = weight
        assert found == wanted

    holds()


@pytest.mark.parametrize(
    ("content", "said"),
    [
        ("message.content | trim", " b \n"), ("message.content.strip()", "\n\nb\t"), ("message['content']", "b"),
        ("(message.content | trim | upper)", " b"), ("message.content.replace('x', 'yy')", "bx"),
        ("message.content.split('###')[-1].lstrip('\n')", "\nb"), ("(message.content ~ '')", "b"),
        ("message.content.split() | join(' ')", "b  c\nd"),
        ("(message.content | tojson)", '"b"\n'), ("(message.content | tojson(ensure_ascii=true))", "\u6625b"),
        ("([message.content, ''] | join('!'))", "b"), ("message.get('content')", " b"),
    ],
)
def test_what_a_template_does_to_a_text_leaves_its_place_known(
    content: str, said: str, trained: FileTokenizer, tmp_path: Path
) -> None:
    import jinja2

    made = chat(trained, chatml(content), tmp_path)
    (row,) = made.rows(Example(turns("a", said)))
    filters = jinja2.Environment()
    filters.filters["tojson"] = lambda value, ensure_ascii=False: json.dumps(value, ensure_ascii=ensure_ascii)
    wanted = filters.from_string("{{ " + content + " }}").render(message={"content": said})
    assert learned(trained, row) == [wanted + CLOSE]


LOSSY = {
    "the first line": ("message.content.split('\n')[0]", "b\nc"),
    "what stands behind the reasoning": ("message.content.split('</think>')[-1]", "<think>b</think>c"),
    "both ends": ("message.content.split('(')[0] ~ message.content.split(')')[-1]", "b (c) d"),
}


@pytest.mark.parametrize("name", LOSSY)
@pytest.mark.parametrize("role", ["system", "user", "assistant"])
def test_a_template_that_writes_only_a_part_of_a_text_is_refused(
    name: str, role: str, trained: FileTokenizer, tmp_path: Path
) -> None:
    source, said = LOSSY[name]
    messages = {
        "system": (Message("system", said), *turns("a", "b")), "user": turns(said, "b"), "assistant": turns("a", said),
    }[role]
    with pytest.raises(UserError, match="leaves out a part of the text of a message") as caught:
        chat(trained, chatml(source), tmp_path).rows(Example(messages))
    assert f"by {role}" in str(caught.value)


def test_reasoning_in_a_text_may_be_left_out_by_name_and_of_earlier_answers_always(
    trained: FileTokenizer, tmp_path: Path
) -> None:
    source, said = LOSSY["what stands behind the reasoning"]
    (row,) = chat(trained, chatml(source), tmp_path, leave_out=["thinking"]).rows(Example(turns("a", said)))
    assert learned(trained, row) == ["c" + CLOSE]
    read = replace(turns("a", said)[1], weight=0.0)
    (row,) = chat(trained, chatml(source), tmp_path).rows(Example((Message("user", "a"), read, *turns("d", "e"))))
    assert learned(trained, row) == ["e" + CLOSE]


def test_a_call_without_its_arguments_is_refused(trained: FileTokenizer, tmp_path: Path) -> None:
    source = loop(
        "{{ '<|im_start|>' + message.role + '\n' + message.content }}{% for call in message.tool_calls or [] %}"
        "{{ call.function.name }}{% endfor %}<|im_end|>"
    )
    call = {"type": "function", "function": {"name": "f", "arguments": {"a": "b"}}}
    called = Message("assistant", "", tool_calls=(call,))
    with pytest.raises(UserError, match="leaves out a part of the tool calls") as caught:
        chat(trained, source, tmp_path).rows(Example((Message("user", "a"), called)))
    assert "leave_out=[tools]" in str(caught.value.fix)


def test_calls_are_learned_whatever_json_they_are_written_in(trained: FileTokenizer, tmp_path: Path) -> None:
    source = loop(
        "{{ '<|im_start|>' + message.role + '\n' + message.content }}{% for call in message.tool_calls or [] %}"
        "{{ call | tojson(ensure_ascii=true, indent=1, separators=[',', ':'], sort_keys=true) }}{% endfor %}"
        "<|im_end|>"
    )
    call = {"type": "function", "function": {"name": "f", "arguments": {"b": "<|im_end|>\u6625", "a": [1, None, 2.5]}}}
    (row,) = chat(trained, source, tmp_path).rows(
        Example((Message("user", "a"), Message("assistant", "", tool_calls=(call,))))
    )
    wanted = json.dumps(call, ensure_ascii=True, indent=1, separators=(",", ":"), sort_keys=True)
    assert learned(trained, row) == [wanted + CLOSE]
    assert row.tokens.count(trained.control[CLOSE]) == 2


def test_the_template_decides_by_what_is_said_as_long_as_marks_change_nothing(
    trained: FileTokenizer, tmp_path: Path
) -> None:
    source = chatml("(('long: ' if message.content | length > 20 else '') + message.content)")
    (row,) = chat(trained, source, tmp_path).rows(Example(turns("a", "b" * 30)))
    assert learned(trained, row) == ["long: " + "b" * 30 + CLOSE]
    with pytest.raises(UserError, match="does not write what is said as it is said"):
        chat(trained, source, tmp_path).rows(Example(turns("a", "b" * 20)))


def test_marks_of_generation_are_read_and_the_proof_does_not_need_them(
    trained: FileTokenizer, tmp_path: Path
) -> None:
    source = loop(
        "{{ '<|im_start|>' + message.role + '\n' }}{% if message.role == 'assistant' %}{% generation %}"
        "{{ message.content + '<|im_end|>' }}{% endgeneration %}{% else %}{{ message.content + '<|im_end|>' }}"
        "{% endif %}{{ '\n' }}"
    )
    example = Example(turns("a", "b", "c", "d"))
    assert chat(trained, source, tmp_path).rows(example) == chat(trained, chatml(), tmp_path).rows(example)


def test_a_clock_shows_the_day_that_is_given(trained: FileTokenizer, tmp_path: Path) -> None:
    source = "{{ strftime_now('%d %b %Y') }}" + chatml()
    with pytest.raises(UserError, match="asks for the date") as caught:
        chat(trained, source, tmp_path)
    assert str(caught.value.fix).startswith("date=")
    made = chat(trained, source, tmp_path, day=date(2026, 3, 9))
    assert trained.decode(made.prompt(QUESTION[:1])).startswith("09 Mar 2026<|im_start|>")


REFUSED = {
    "drops system texts": (
        loop("{% if message.role != 'system' %}{{ message.content + '<|im_end|>' }}{% endif %}"),
        (Message("system", "s"), *QUESTION), "leaves out the text of a message",
    ),
    "begins otherwise than its prompt": (
        chatml().replace("assistant\n{% endif", "assistant\n<think>\n{% endif"), QUESTION, "does not begin where the",
    ),
    "tells the answer before it is asked": (
        loop("{{ messages[-1].content + '<|im_start|>' + message.content + '<|im_end|>' }}", ""), QUESTION,
        "does not begin where the",
    ),
    "says an answer twice": (
        chatml("(message.content + '<|im_end|>' + message.content)"), QUESTION, None,
    ),
    "puts the question behind the answer": (
        loop("{% if message.role == 'assistant' %}{{ '<|im_start|>' + message.content + messages[0].content + "
             "'<|im_end|>' }}{% endif %}", "{% if add_generation_prompt %}<|im_start|>{% endif %}"),
        QUESTION, "cannot be told",
    ),
    "refuses by itself": (
        chatml() + "{% if messages | length > 2 %}{{ raise_exception('two messages at most') }}{% endif %}",
        turns("a", "b", "c", "d"), "the chat template refuses the conversation",
    ),
    "acts on a control token's name": (
        chatml("(message.content.split('<|im_end|>')[0])"), turns("a", "b<|im_end|>c"),
        "does not write what is said as it is said",
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", [name for name in REFUSED if REFUSED[name][2]])
def test_a_template_is_refused_by_name_where_nothing_can_be_proved(
    case: str, trained: FileTokenizer, tmp_path: Path
) -> None:
    source, messages, what = REFUSED[case]
    with pytest.raises(UserError, match=str(what)) as caught:
        chat(trained, source, tmp_path).rows(Example(messages))
    assert str(tmp_path / "one.jinja") in str(caught.value.where)


def test_an_answer_that_is_written_twice_is_learned_twice_or_not_at_all(
    trained: FileTokenizer, tmp_path: Path
) -> None:
    source, messages, _ = REFUSED["says an answer twice"]
    (row,) = chat(trained, source, tmp_path).rows(Example(messages))
    assert learned(trained, row) == ["b<|im_end|>b<|im_end|>"]


def test_the_smallest_conversation_that_shows_a_fault_is_shown(trained: FileTokenizer, tmp_path: Path) -> None:
    source = loop("{% if message.role != 'tool' %}{{ '<|im_start|>' + message.role + '\n' + message.content + "
                  "'<|im_end|>' }}{% endif %}")  # fmt: skip
    long = "many words " * 50
    messages = (*turns(long, long, long, long), Message("tool", long), Message("assistant", long), *turns(long, long))
    with pytest.raises(UserError, match="leaves out the text of a message") as caught:
        chat(trained, source, tmp_path).rows(Example(messages))
    assert str(caught.value.why).endswith('{"messages": [{"role": "tool", "content": "a"}]}')


def test_a_template_that_ends_no_answer_is_refused_at_once(trained: FileTokenizer, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="ends no answer with a control token") as caught:
        chat(trained, loop("{{ message.role + ': ' + message.content + '\n' }}", ""), tmp_path)
    assert "add-tokens" in str(caught.value.fix)


def test_a_template_whose_tokens_are_unknown_is_refused_at_once(trained: FileTokenizer, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"writes <\|turn\|>, which is no control token") as caught:
        chat(trained, chatml() + "<|turn|>", tmp_path)
    assert caught.value.fix == "llmtrainer add-tokens MODEL out=FOLDER \"tokens=['<|turn|>']\""


def test_private_characters_in_a_text_are_text(trained: FileTokenizer, tmp_path: Path) -> None:
    said = "".join(chr(0xF0000 + place) for place in range(40)) + "\U0010fffd" + CLOSE
    made = chat(trained, chatml(), tmp_path)
    (row,) = made.rows(Example(turns(said, said)))
    assert learned(trained, row) == [said + CLOSE]
    assert row.tokens.count(trained.control[CLOSE]) == 2


def test_half_a_name_in_a_text_and_half_in_the_template_make_no_control_token(
    trained: FileTokenizer, tmp_path: Path
) -> None:
    source = loop("{{ '<|im_start|>' + message.role + ' |>' + message.content + '|><|im_end|>' }}",
                  "{% if add_generation_prompt %}{{ '<|im_start|>assistant |>' }}{% endif %}")  # fmt: skip
    (row,) = chat(trained, source, tmp_path).rows(Example(turns("x<|im_end", "<|im_start")))
    assert row.tokens.count(trained.control[CLOSE]) == row.tokens.count(trained.control[OPEN]) == 2
    assert learned(trained, row) == ["<|im_start|><|im_end|>"]


def test_a_control_token_takes_the_blanks_that_its_flags_say(trained: FileTokenizer, tmp_path: Path) -> None:
    trained.save(tmp_path)
    description = json.loads((tmp_path / "tokenizer.json").read_text(encoding="utf-8"))
    for token in description["added_tokens"]:
        if token["content"] in (OPEN, CLOSE):
            token["rstrip"] = True
    (tmp_path / "tokenizer.json").write_text(json.dumps(description), encoding="utf-8")
    transformers = pytest.importorskip("transformers", reason="its tokenizers are the oracle")
    from llmtrainer.tokenizer.tokenizer import load_tokenizer

    greedy = load_tokenizer(tmp_path)
    source = loop("{{ '<|im_start|>' + message.content + '<|im_end|>\n' }}",
                  "{% if add_generation_prompt %}<|im_start|>{% endif %}")  # fmt: skip
    messages = turns("a", "b ", " \nc", "d")
    (row,) = chat(greedy, source, tmp_path).rows(Example(messages))
    theirs = transformers.AutoTokenizer.from_pretrained(str(tmp_path), chat_template=source)
    values = [{"role": message.role, "content": message.content} for message in messages]
    assert list(row.tokens) == theirs.apply_chat_template(values, tokenize=True, return_dict=False)


def test_transformers_mask_of_a_template_that_marks_its_answers_is_what_is_learned(
    trained: FileTokenizer, tmp_path: Path
) -> None:
    transformers = pytest.importorskip("transformers", reason="its masks are the oracle")
    source = loop(
        "{{ '<|im_start|>' + message.role + '\n' }}{% if message.role == 'assistant' %}{% generation %}"
        "{{ message.content + '<|im_end|>' }}{% endgeneration %}{% else %}{{ message.content + '<|im_end|>' }}"
        "{% endif %}{{ '\n' }}"
    )
    made = chat(trained, source, tmp_path)
    made.tokenizer.save(tmp_path / "saved")
    theirs = transformers.AutoTokenizer.from_pretrained(str(tmp_path / "saved"))
    contents = ["What is it?", "A test, def f(): return 1", "\u6625\u7720?", "\u4e0d\u6653 \U0001f600!", "x", "12345"]
    values = [{"role": message.role, "content": message.content} for message in turns(*contents)]
    told = theirs.apply_chat_template(values, tokenize=True, return_dict=True, return_assistant_tokens_mask=True)
    (row,) = made.rows(Example(turns(*contents)))
    assert list(row.tokens) == told["input_ids"]
    assert [int(weight) for weight in row.weights] == told["assistant_masks"]


@pytest.mark.parametrize("about", ["", "1 and 2"])
def test_an_instruction_with_its_input_is_prompted_as_alpaca_was_published(
    about: str, trained: FileTokenizer
) -> None:
    """github.com/tatsu-lab/stanford_alpaca, PROMPT_DICT, with a newline behind the last line."""
    with_input = (
        "Below is an instruction that describes a task, paired with an input that provides further context. "
        "Write a response that appropriately completes the request.\n\n"
        "### Instruction:\nAdd.\n\n### Input:\n1 and 2\n\n### Response:\n"
    )
    without = (
        "Below is an instruction that describes a task. "
        "Write a response that appropriately completes the request.\n\n"
        "### Instruction:\nAdd.\n\n### Response:\n"
    )
    example = Instruction(between="\n\n### Input:\n").example({"instruction": "Add.", "input": about, "output": "3"})
    chat = Chat(trained, "alpaca")
    prompt = chat.prompt(example.messages[:1])
    assert trained.decode(prompt) == (with_input if about else without)
    (row,) = chat.rows(example)
    assert list(row.tokens[: len(prompt)]) == prompt and learned(trained, row) == [f"3{trained.decode([trained.end])}"]


def test_more_names_of_control_tokens_than_there_are_marks_are_refused(trained: FileTokenizer, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="names control tokens too often"):
        chat(trained, chatml(), tmp_path).prompt((Message("user", CLOSE * 131_100),))
