"""inspect of conversations: which tokens are learned, as training has them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from llmtrainer.apps.cli import main
from llmtrainer.apps.inspect import LEARNED, READ_ONLY, Inspection, inspect
from llmtrainer.base.errors import UserError
from llmtrainer.core.example import Example, Message
from llmtrainer.tokenizer.chat import Chat
from llmtrainer.tokenizer.tokenizer import FileTokenizer, load_tokenizer
from llmtrainer.tokenizer.train import train_vocabulary

TURNS = ["How hot is it?", "17 degrees.", "Why? <|im_end|>", "It is\nMay. \U0001f600"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("chats")
    train_vocabulary(iter([" ".join(TURNS) * 20]), 300).save(folder / "tokenizer")
    messages = [{"role": ("user", "assistant")[place % 2], "content": text} for place, text in enumerate(TURNS)]
    other = [{"from": ("human", "gpt")[place % 2], "value": text} for place, text in enumerate(TURNS)]
    thought = [*messages[:1], {"role": "assistant", "content": "a", "reasoning_content": "b"}]
    for name, record in {
        "messages": {"messages": messages}, "sharegpt": {"conversations": other}, "thought": {"messages": thought},
    }.items():
        (folder / f"{name}.jsonl").write_text(json.dumps(record) + "\n" + json.dumps(record) + "\n")
    return folder


@pytest.fixture(scope="module")
def tokenizer(folder: Path) -> FileTokenizer:
    return load_tokenizer(folder / "tokenizer")


def settings(folder: Path, name: str, **others: Any) -> Inspection:
    return Inspection(source=str(folder / name), tokenizer=str(folder / "tokenizer"), **others)


@pytest.mark.parametrize("name", ["messages.jsonl", "sharegpt.jsonl"])
@pytest.mark.parametrize("template", ["chatml", "role_end", "alpaca", "llama2"])
def test_a_conversation_is_shown_with_the_weights_of_training(
    name: str, template: str, folder: Path, tokenizer: FileTokenizer
) -> None:
    example = Example(tuple(Message(("user", "assistant")[place % 2], text) for place, text in enumerate(TURNS)))
    (row,) = Chat(tokenizer, template).rows(example)
    shown = inspect(settings(folder, name, template=template)).json()["rows"]
    assert [(tuple(item["tokens"]), tuple(item["weights"])) for item in shown] == [(row.tokens, row.weights)] * 2
    assert "".join(shown[0]["pieces"]) == tokenizer.decode(row.tokens)
    learned = "".join(piece for piece, weight in zip(shown[0]["pieces"], shown[0]["weights"], strict=True) if weight)
    assert all(text in learned for text in TURNS[1::2]) and not any(text in learned for text in TURNS[::2])


def test_colours_mark_what_is_learned_and_numbers_where_there_are_none(folder: Path) -> None:
    told = inspect(settings(folder, "messages.jsonl", template="chatml", color="always", rows=1)).text()
    assert f"{LEARNED}17 degrees.<|im_end|>" in told
    assert f"{READ_ONLY}<|im_start|>user" in told
    plain = inspect(settings(folder, "messages.jsonl", template="chatml", color="never", rows=1)).text()
    assert "     1 | 17 degrees.<|im_end|>\n     0 | \n" in plain
    assert "     1 | It is\n       | May. \U0001f600<|im_end|>" in plain


def test_conversations_need_no_word_that_they_are_and_a_template(folder: Path) -> None:
    with pytest.raises(UserError, match="no chat template of its own"):
        inspect(settings(folder, "messages.jsonl"))
    (folder / "own").mkdir(exist_ok=True)
    Chat(load_tokenizer(folder / "tokenizer"), "chatml").tokenizer.save(folder / "own")
    own = inspect(Inspection(source=str(folder / "messages.jsonl"), tokenizer=str(folder / "own"))).json()
    assert own["rows"] == inspect(settings(folder, "messages.jsonl", template="chatml")).json()["rows"]


def test_a_conversation_that_the_template_cannot_hold_is_refused_with_its_line(folder: Path) -> None:
    with pytest.raises(UserError, match="leaves out the reasoning") as caught:
        inspect(settings(folder, "thought.jsonl", template="chatml", step=0, rows=1))
    assert "thought.jsonl, line 1" in str(caught.value.where)
    allowed = inspect(settings(folder, "thought.jsonl", template="chatml", rows=1, leave_out=["thinking"]))
    assert sum(allowed.rows[0].weights) == 2.0


def test_the_command_gives_the_rows_as_json(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = ["inspect", str(folder / "messages.jsonl"), f"tokenizer={folder / 'tokenizer'}", "template=chatml"]
    assert main([*words, "--json"]) == 0
    (row, _) = json.loads(capsys.readouterr().out)["rows"]
    assert set(row) == {"tokens", "pieces", "weights", "positions", "document"}
    assert len({len(value) for value in row.values()}) == 1
