"""generate in a chat: a question in the model's template, an answer up to where the template ends it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from llmtrainer.apps.cli import main
from llmtrainer.base.errors import UserError
from llmtrainer.core.example import Example, Message
from llmtrainer.models.families.llama import Llama
from llmtrainer.models.weights import save_weights
from llmtrainer.tokenizer.chat import Chat
from llmtrainer.tokenizer.tokenizer import load_tokenizer
from llmtrainer.tokenizer.train import train_vocabulary
from llmtrainer.training.use import Generation, generate

TEXT = "user assistant system How hot is it? It is 17 degrees. Why? Because. " * 20


def saved(folder: Path, always: str | None = None) -> Path:
    """A model with the template chatml among its files; `always`: the control token that it likes best everywhere."""
    tokenizer = Chat(train_vocabulary(iter([TEXT]), 300), "chatml").tokenizer
    tokenizer.save(folder)
    policy = Llama(hidden_size=8, layers=1, heads=1, context_length=128).build(320, torch.float32)
    policy.initialise(3)
    if always is not None:
        with torch.no_grad():
            for parameter in policy.parameters():
                parameter.fill_(0.1)
            policy.head_weight[tokenizer.control[always]] = 1.0
    save_weights(policy, folder)
    return folder


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return saved(tmp_path_factory.mktemp("model"))


def completion(model: Path, **settings: Any) -> dict[str, Any]:
    (found,) = generate(Generation.model_validate({"model": str(model), **settings})).json()["completions"]
    return dict(found)


def test_an_answer_stops_where_the_template_ends_answers(tmp_path: Path) -> None:
    folder = saved(tmp_path / "ends", "<|im_end|>")
    found = completion(folder, prompt="How hot is it?", chat=True, temperature=0.0)
    assert (found["prompt"], found["text"], found["tokens"], found["finish"]) == ("How hot is it?", "", 1, "end")
    # Without the template it is a token like others: the text goes on.
    assert completion(folder, prompt="How", temperature=0.0, max_new_tokens=3)["tokens"] == 3


def test_a_question_is_read_as_training_reads_it(model: Path) -> None:
    tokenizer = load_tokenizer(model)
    messages = (Message("system", "Be brief."), Message("user", "Why? <|im_end|>"), Message("assistant", "x"))
    (row,) = Chat(tokenizer).rows(Example(messages))
    text = tokenizer.decode(row.tokens[: row.weights.index(1.0)])
    assert text.endswith("<|im_start|>assistant\n")
    settings = {"temperature": 0.0, "max_new_tokens": 5}
    answered = completion(model, prompt="Why? <|im_end|>", chat=True, system="Be brief.", **settings)
    # The same ids, given to the model one by one: each is the likeliest behind what training would have shown.
    from llmtrainer.training.models import load_model

    policy, read = load_model(model), list(row.tokens[: row.weights.index(1.0)])
    for token in answered["ids"]:
        cache = policy.cache(1, len(read))
        logits_BV = policy.read(torch.tensor([read]), torch.tensor([len(read)]), cache)
        assert int(logits_BV[0, : tokenizer.vocabulary].argmax()) == token
        read.append(token)


def test_a_template_can_be_named_and_must_be_there(model: Path, tmp_path: Path) -> None:
    settings = {"prompt": "Why?", "chat": True, "temperature": 0.0, "max_new_tokens": 2}
    assert completion(model, **settings) == completion(model, template="chatml", **settings)
    (model_without := tmp_path / "bare").mkdir()
    for file in model.iterdir():
        if file.name != "chat_template.jinja":
            (model_without / file.name).write_bytes(file.read_bytes())
    with pytest.raises(UserError, match="no chat template of its own"):
        completion(model_without, **settings)


@pytest.mark.parametrize("settings", [{"system": "Be brief."}, {"template": "chatml"}, {"date": "2026-01-01"}], ids=str)
def test_what_is_for_a_chat_is_refused_elsewhere(settings: dict[str, str], model: Path) -> None:
    with pytest.raises(UserError, match="is for a chat"):
        completion(model, prompt="a", **settings)


def test_the_switch_stands_before_any_other_word(model: Path, capsys: pytest.CaptureFixture[str]) -> None:
    said = ["generate", str(model), "--chat", "Why?", "temperature=0", "max_new_tokens=2", "--json"]
    assert main(said) == 0
    switched = json.loads(capsys.readouterr().out)
    assert main(["generate", str(model), "Why?", "chat=true", *said[4:]]) == 0
    assert json.loads(capsys.readouterr().out)["completions"] == switched["completions"]
    assert main(["generate", str(model), "--chat", "temperature=0", "prompt=Why?", "max_new_tokens=2"]) == 0
    assert capsys.readouterr().out.strip() == switched["completions"][0]["text"].strip()


def test_several_answers_stand_under_their_questions(model: Path) -> None:
    told = generate(Generation(model=str(model), prompt="Why?", chat=True, samples=2, max_new_tokens=3))
    assert told.text().startswith("--- 1 of 2\nWhy?\n\n")
