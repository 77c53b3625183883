"""add-tokens: a model with more control tokens, and everything else as it was."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from llmtrainer.apps.add_tokens import TokenAddition, add_tokens
from llmtrainer.apps.cli import main
from llmtrainer.base.errors import UserError
from llmtrainer.models.families.llama import Llama
from llmtrainer.models.weights import load_policy, save_weights
from llmtrainer.tokenizer.tokenizer import FileTokenizer, load_tokenizer
from llmtrainer.tokenizer.train import train_vocabulary

NAMES = ("<|user|>", "<|assistant|>", "<|im_end|>")
TEXTS = ["hello there", "<|user|>hello<|assistant|>", "\u4e2d\u6587 <|im_end|>", " <|user|", ""]


@pytest.fixture(scope="module")
def tokenizer() -> FileTokenizer:
    return train_vocabulary(["hello there, hello world, where is the world? " * 20], 300)


def model(folder: Path, tokenizer: FileTokenizer, *, tied: bool, rows: int, dtype: torch.dtype) -> Path:
    shape = {"hidden_size": 16, "layers": 1, "heads": 2, "intermediate_size": 32, "tied_head": tied}
    decoder = Llama.model_validate(shape).build(rows)
    decoder.initialise(1)
    save_weights(decoder, folder, end=tokenizer.end, pad=tokenizer.pad, dtype=dtype)
    tokenizer.save(folder)
    (folder / "generation_config.json").write_text('{"eos_token_id": 3}\n')
    return folder


def settings(source: Path, out: Path, tokens: tuple[str, ...] = NAMES) -> TokenAddition:
    return TokenAddition(model=str(source), out=str(out), tokens=tokens)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("tied", [True, False], ids=["tied", "untied"])
def test_old_rows_keep_their_bits_and_new_ones_are_the_mean_of_the_old(
    tied: bool, dtype: torch.dtype, tokenizer: FileTokenizer, tmp_path: Path
) -> None:
    had = tokenizer.vocabulary
    source = model(tmp_path / "base", tokenizer, tied=tied, rows=had, dtype=dtype)
    told = add_tokens(settings(source, tmp_path / "out"))
    assert told.added == {"<|user|>": had, "<|assistant|>": had + 1}
    assert told.kept == {"<|im_end|>": tokenizer.control["<|im_end|>"]}
    before, after = load_file(source / "model.safetensors"), load_file(tmp_path / "out" / "model.safetensors")
    tables = ["model.embed_tokens.weight", *([] if tied else ["lm_head.weight"])]
    assert before.keys() == after.keys() >= set(tables)
    for name, value in after.items():
        if name not in tables:
            assert torch.equal(value, before[name])
            continue
        assert value.dtype == dtype and len(value) == told.rows == 320
        assert torch.equal(value[:had], before[name])
        mean = before[name].double().mean(dim=0).to(dtype)
        assert all(torch.equal(row, mean) for row in value[had:])
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert config == {**json.loads((source / "config.json").read_text()), "vocab_size": 320}
    assert (tmp_path / "out" / "generation_config.json").read_text() == '{"eos_token_id": 3}\n'


def test_text_keeps_its_ids_and_no_text_becomes_a_new_one(tokenizer: FileTokenizer, tmp_path: Path) -> None:
    source = model(tmp_path / "base", tokenizer, tied=True, rows=320, dtype=torch.float32)
    add_tokens(settings(source, tmp_path / "out"))
    new = load_tokenizer(tmp_path / "out")
    assert [new.encode(text) for text in TEXTS] == [tokenizer.encode(text) for text in TEXTS]
    assert new.encode("<|user|>hi", allowed="all") == [new.control["<|user|>"], *tokenizer.encode("hi")]
    transformers = pytest.importorskip("transformers")
    theirs = transformers.AutoTokenizer.from_pretrained(str(tmp_path / "out"))
    for name in NAMES:
        assert theirs.encode(name, add_special_tokens=False) == [new.control[name]]


def test_rows_that_only_pad_the_model_are_taken_first(tokenizer: FileTokenizer, tmp_path: Path) -> None:
    had = tokenizer.vocabulary
    source = model(tmp_path / "base", tokenizer, tied=False, rows=320, dtype=torch.float32)
    assert had + 2 < 320
    assert add_tokens(settings(source, tmp_path / "out")).rows == 320
    before, after = load_file(source / "model.safetensors"), load_file(tmp_path / "out" / "model.safetensors")
    for name in ("model.embed_tokens.weight", "lm_head.weight"):
        assert torch.equal(after[name][had + 2 :], before[name][had + 2 :])
        assert torch.equal(after[name][had + 1], before[name][:had].double().mean(dim=0).float())


def test_running_twice_adds_nothing(tokenizer: FileTokenizer, tmp_path: Path) -> None:
    source = model(tmp_path / "base", tokenizer, tied=True, rows=320, dtype=torch.float32)
    once = add_tokens(settings(source, tmp_path / "once"))
    written = {file.name: file.read_bytes() for file in (tmp_path / "once").iterdir()}
    again = add_tokens(settings(source, tmp_path / "once"))
    assert again.added == {} and again.kept == {**once.added, **once.kept}
    twice = add_tokens(settings(tmp_path / "once", tmp_path / "twice"))
    assert twice.added == {}
    for folder in ("once", "twice"):
        assert {file.name: file.read_bytes() for file in (tmp_path / folder).iterdir()} == written


def test_what_is_there_already_is_never_touched(tokenizer: FileTokenizer, tmp_path: Path) -> None:
    source = model(tmp_path / "base", tokenizer, tied=True, rows=320, dtype=torch.float32)
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "letter.txt").write_text("dear")
    for out in (tmp_path / "full", source):
        with pytest.raises(UserError, match="there is something already"):
            add_tokens(settings(source, out))
    assert [file.name for file in (tmp_path / "full").iterdir()] == ["letter.txt"]
    assert not list(tmp_path.glob(".*"))


@pytest.mark.parametrize("name", ["hello", "x", "two words", " ", "a\nb"])
def test_a_word_or_a_blank_is_no_control_token(name: str, tokenizer: FileTokenizer, tmp_path: Path) -> None:
    source = model(tmp_path / "base", tokenizer, tied=True, rows=320, dtype=torch.float32)
    with pytest.raises(UserError, match=r"is a word of the vocabulary|is no name for a control token"):
        add_tokens(settings(source, tmp_path / "out", (name,)))
    assert not (tmp_path / "out").exists()


def test_the_command_adds_what_a_template_needs(
    tokenizer: FileTokenizer, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    source = model(tmp_path / "base", tokenizer, tied=True, rows=320, dtype=torch.float32)
    assert main(["add-tokens", str(source), f"out={tmp_path / 'out'}", "template=llama3", "--json"]) == 0
    told = json.loads(capsys.readouterr().out)
    assert list(told["added"]) == ["<|begin_of_text|>", "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>"]
    assert main(["add-tokens", str(source), f"out={tmp_path / 'other'}"]) == 2
    assert load_policy(tmp_path / "out").vocabulary == told["rows"]


def test_the_folder_and_the_tokens_may_be_bare_words(
    tokenizer: FileTokenizer, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    source = model(tmp_path / "base", tokenizer, tied=True, rows=320, dtype=torch.float32)
    for words in ([str(tmp_path / "out")], [f"out={tmp_path / 'other'}"]):
        assert main(["add-tokens", str(source), *words, *NAMES[:2], "--json"]) == 0
        told = json.loads(capsys.readouterr().out)
        assert list(told["added"]) == list(NAMES[:2]) and told["path"] == words[0].removeprefix("out=")


def test_new_rows_are_trained_saved_and_loaded_like_any_other(tokenizer: FileTokenizer, tmp_path: Path) -> None:
    source = model(tmp_path / "base", tokenizer, tied=True, rows=320, dtype=torch.float32)
    told = add_tokens(settings(source, tmp_path / "out"))
    decoder = load_policy(tmp_path / "out")
    table = decoder.get_parameter("model.embed_tokens.weight")
    with torch.no_grad():
        table[told.added["<|user|>"]] += 1.0    # what a step of any optimizer does
    save_weights(decoder, tmp_path / "later", end=tokenizer.end)
    load_tokenizer(tmp_path / "out").save(tmp_path / "later")
    assert torch.equal(load_policy(tmp_path / "later").get_parameter("model.embed_tokens.weight"), table)
    assert load_tokenizer(tmp_path / "later").control == load_tokenizer(tmp_path / "out").control
