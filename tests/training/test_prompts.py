"""Prompts for a run: read, rendered by the template, and counted."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from pydantic import ValidationError

from llmtrainer.base.errors import UserError
from llmtrainer.core.example import Message
from llmtrainer.parallel.engines.single import Single
from llmtrainer.tokenizer.chat import Chat
from llmtrainer.tokenizer.tokenizer import load_tokenizer
from llmtrainer.training.dataset import Dataset, Setting
from llmtrainer.training.datasets.prompts import PromptFiles


def files(path: Path, **settings: Any) -> PromptFiles:
    found = Dataset.model_validate(
        {"kind": "prompts", "train": str(path / "p.jsonl"), "template": "chatml", "workers": 1, **settings}
    )
    assert isinstance(found, PromptFiles)
    return found


@pytest.fixture
def setting(world: Path, tmp_path: Path) -> Setting:
    lines = [{"question": f"what is {number}", "answer": str(number)} for number in range(20)]
    (tmp_path / "p.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    (tmp_path / "dev.jsonl").write_text(json.dumps({"prompt": "abc"}) + "\n")
    folder = world / "tokenizer"
    return Setting(folder, load_tokenizer(folder), Single(device="cpu").start("float32"), tmp_path, 0, 3)


def test_prompts_are_what_generation_reads_and_facts_come_along(setting: Setting, tmp_path: Path) -> None:
    found = files(tmp_path, as_messages=True, evaluate={"dev": str(tmp_path / "dev.jsonl")}).opened(setting)
    assert found.train is None and found.prompts is not None and found.chat is not None
    prompt = found.prompts.prompt(0)
    number = prompt.facts["answer"]
    assert prompt.messages == (Message("user", f"what is {number}"),)
    assert list(prompt.tokens) == Chat(setting.tokenizer, "chatml").prompt(prompt.messages)
    assert found.prompts.prompts_per_step == 16 and len(found.prompts) == 20 and len(found.asked["dev"]) == 1
    assert found.facts == {"template_fingerprint": found.chat.fingerprint}


def test_a_plain_prompt_is_the_text_alone(setting: Setting, tmp_path: Path) -> None:
    prompts = files(tmp_path).opened(setting).prompts
    assert prompts is not None
    prompt = prompts.prompt(5)
    assert list(prompt.tokens) == setting.tokenizer.encode(prompt.messages[0].content)


def test_the_held_out_prompts_are_one_step_of_at_most_so_many(setting: Setting, tmp_path: Path) -> None:
    found = files(tmp_path, held_out=0.4).opened(setting)
    held = found.asked["held_out"]
    assert found.prompts is not None and held.prompts_per_step == 3 and len(found.prompts) + len(held) == 20


def test_what_is_found_is_said_and_too_many_losses_stop(
    setting: Setting, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    files(tmp_path).opened(setting)
    told = capsys.readouterr().err
    assert "line 1, is asked as:" in told and "20  records in all, which became 20 rows" in told
    with pytest.raises(UserError, match="no prompt to answer"):
        files(tmp_path, max_prompt_length=1).opened(setting)


def test_other_knobs_of_a_step_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ValidationError, match="tokens_per_step is for rows that are there before"):
        files(tmp_path, tokens_per_step=100)
