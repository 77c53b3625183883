"""The cache holds what its key says: made once, found again, made anew when text or settings change."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from llmtrainer.base.errors import UserError
from llmtrainer.data.packed import Store
from llmtrainer.tokenizer.tokenizer import load_tokenizer
from llmtrainer.training import cache as cache_module
from llmtrainer.training import prepare as module
from llmtrainer.training.console import voice
from llmtrainer.training.prepare import (
    Preparation,
    TokenizerTraining,
    prepare,
    prepared,
    train_tokenizer,
    trained_tokenizer,
)

TEXT = "the quick brown fox jumps over the lazy dog and writes a line of code in every file it finds"
WORDS = TEXT.split()


@pytest.fixture(autouse=True)
def quiet() -> Iterator[None]:
    with voice(quiet=True):
        yield


@pytest.fixture
def corpus(tmp_path: Path) -> Path:
    folder = tmp_path / "corpus"
    folder.mkdir()
    for number in range(6):
        turned = WORDS[number:] + WORDS[:number]
        (folder / f"{number}.txt").write_text("\n".join(" ".join(turned) + f" {line}" for line in range(30)))
    return folder


@pytest.fixture
def tokenizer(corpus: Path, tmp_path: Path) -> Path:
    return trained_tokenizer(str(corpus), 300, tmp_path / "cache")


@pytest.fixture
def made(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """What was really made, in order, as opposed to found."""
    log: list[str] = []
    write, train = module.write_store, module.train_vocabulary

    def write_store(*arguments, **settings):
        log.append("store")
        return write(*arguments, **settings)

    def train_vocabulary(*arguments, **settings):
        log.append("vocabulary")
        return train(*arguments, **settings)

    monkeypatch.setattr(module, "write_store", write_store)
    monkeypatch.setattr(module, "train_vocabulary", train_vocabulary)
    return log


def tokens_of(store: Path) -> list[list[int]]:
    opened = Store(store)
    return [opened.read(document).tolist() for document in range(opened.documents)]


def test_the_store_in_the_cache_holds_every_document_tokenised_alone_and_ended(
    corpus: Path, tokenizer: Path, tmp_path: Path
) -> None:
    learned = load_tokenizer(tokenizer)
    store = prepared(str(corpus), tokenizer, tmp_path / "cache", workers=1)
    texts = [path.read_text() for path in sorted(corpus.iterdir())]
    assert tokens_of(store) == [[*learned.encode(text), learned.end] for text in texts]


def test_the_same_text_is_prepared_once_wherever_it_lies(
    corpus: Path, tokenizer: Path, tmp_path: Path, made: list[str]
) -> None:
    cache = tmp_path / "cache"
    first = prepared(str(corpus), tokenizer, cache, workers=1)
    moved = shutil.copytree(corpus, tmp_path / "elsewhere")
    assert prepared(str(corpus), tokenizer, cache, workers=1) == first
    assert prepared(str(moved), tokenizer, cache, workers=2) == first
    assert trained_tokenizer(str(moved), 300, cache) == tokenizer
    assert made == ["store"]


@pytest.mark.parametrize("change", ["text", "order", "tokenizer", "fields"])
def test_another_text_tokenizer_or_setting_is_prepared_anew(
    change: str, corpus: Path, tokenizer: Path, tmp_path: Path, made: list[str]
) -> None:
    cache, fields = tmp_path / "cache", ("text", "content")
    first = prepared(str(corpus), tokenizer, cache, workers=1)
    match change:
        case "text":
            (corpus / "3.txt").write_text((corpus / "3.txt").read_text().replace("fox", "cat"))
        case "order":
            (corpus / "0.txt").rename(corpus / "9.txt")
        case "tokenizer":
            tokenizer = trained_tokenizer(str(corpus), 290, cache)
            made.clear()
        case "fields":
            fields = ("body",)
    second = prepared(str(corpus), tokenizer, cache, fields=fields, workers=1)
    assert second != first and made[-1:] == ["store"]


def test_a_change_that_keeps_size_and_name_is_noticed(corpus: Path, tokenizer: Path, tmp_path: Path) -> None:
    first = prepared(str(corpus), tokenizer, tmp_path / "cache", workers=1)
    file = corpus / "2.txt"
    file.write_text(file.read_text().replace("dog", "cow"))
    assert prepared(str(corpus), tokenizer, tmp_path / "cache", workers=1) != first


def test_a_file_that_was_not_touched_is_not_hashed_again(
    corpus: Path, tokenizer: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    cache = tmp_path / "cache"
    prepared(str(corpus), tokenizer, cache, workers=1)
    hashed: list[str] = []
    digest = cache_module.identity_of
    monkeypatch.setattr(cache_module, "identity_of", lambda path: hashed.append(path.name) or digest(path))
    prepared(str(corpus), tokenizer, cache, workers=1)
    assert hashed == []
    os.utime(corpus / "4.txt", ns=(1, 1))
    prepared(str(corpus), tokenizer, cache, workers=1)
    assert hashed == ["4.txt"]


@pytest.mark.parametrize("rubbish", ["", "[]", "{", '{"x": 1}'])
def test_a_damaged_table_of_hashes_costs_time_and_nothing_else(
    rubbish: str, corpus: Path, tokenizer: Path, tmp_path: Path
) -> None:
    cache = tmp_path / "cache"
    first = prepared(str(corpus), tokenizer, cache, workers=1)
    (cache / "hashes.json").write_text(rubbish)
    assert prepared(str(corpus), tokenizer, cache, workers=1) == first


def test_half_a_store_is_never_used(
    corpus: Path, tokenizer: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    cache, write = tmp_path / "cache", module.write_store

    def broken(*arguments, **settings):
        write(*arguments, **settings)
        raise KeyboardInterrupt    # after the store, before its receipt

    monkeypatch.setattr(module, "write_store", broken)
    with pytest.raises(KeyboardInterrupt):
        prepared(str(corpus), tokenizer, cache, workers=1)
    assert [path for path in (cache / "tokens").iterdir() if not path.name.startswith(".")] == []
    monkeypatch.setattr(module, "write_store", write)
    store = prepared(str(corpus), tokenizer, cache, workers=1)
    assert len(tokens_of(store)) == 6 and [path.name for path in (cache / "tokens").iterdir()] == [store.name]


BUILDER = """
import sys
from pathlib import Path
from llmtrainer.training import prepare as module
from llmtrainer.training.prepare import trained_tokenizer
train = module.train_vocabulary
def counted(*arguments, **settings):
    print("made", flush=True)
    return train(*arguments, **settings)
module.train_vocabulary = counted
print(trained_tokenizer(sys.argv[1], 300, Path(sys.argv[2])), flush=True)
"""


def test_two_processes_that_want_the_same_make_it_once(corpus: Path, tmp_path: Path) -> None:
    command = [sys.executable, "-c", BUILDER, str(corpus), str(tmp_path / "shared")]
    both = [subprocess.Popen(command, stdout=subprocess.PIPE, text=True) for _ in range(2)]
    told = [process.communicate(timeout=120)[0].split() for process in both]
    assert sum(words.count("made") for words in told) == 1
    assert told[0][-1] == told[1][-1] and (Path(told[0][-1]) / "tokenizer.json").is_file()


def test_a_killed_builder_leaves_nothing_that_stops_the_next_one(corpus: Path, tmp_path: Path) -> None:
    stuck = BUILDER.replace("    return train", "    import signal; signal.pause()\n    return train")
    command = [sys.executable, "-c", stuck, str(corpus), str(tmp_path / "shared")]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout and process.stdout.readline() == "made\n"
        process.send_signal(signal.SIGKILL)
    folder = trained_tokenizer(str(corpus), 300, tmp_path / "shared")
    assert load_tokenizer(folder).decode(load_tokenizer(folder).encode("fox")) == "fox"


def test_a_store_is_taken_as_it_is_and_refused_with_another_tokenizer(
    corpus: Path, tokenizer: Path, tmp_path: Path, made: list[str]
) -> None:
    store = prepared(str(corpus), tokenizer, tmp_path / "cache", workers=1)
    assert prepared(str(store), tokenizer, tmp_path / "cache") == store
    other = trained_tokenizer(str(corpus), 280, tmp_path / "cache")
    with pytest.raises(UserError, match="another tokenizer"):
        prepared(str(store), other, tmp_path / "cache")


def test_the_commands_report_what_they_made_and_leave_it_alone_the_second_time(
    corpus: Path, tmp_path: Path, made: list[str]
) -> None:
    learned = train_tokenizer(TokenizerTraining(data=str(corpus), out=str(tmp_path / "tok"), vocabulary=300))
    store = prepare(Preparation(data=str(corpus), out=str(tmp_path / "store"), tokenizer=learned.path, workers=1))
    tokens = [len(tokens) for tokens in tokens_of(tmp_path / "store")]
    size = sum(path.stat().st_size for path in corpus.iterdir())
    assert (learned.vocabulary, learned.documents, learned.tokens) == (300, 6, sum(tokens) - 6)
    assert (store.documents, store.tokens, store.vocabulary) == (6, sum(tokens), 300)
    assert learned.bytes_per_token == size / learned.tokens
    assert store.bytes_per_token == size / store.tokens
    again = prepare(Preparation(data=str(corpus), out=str(tmp_path / "store"), tokenizer=learned.path))
    assert again.reused and not store.reused and made == ["vocabulary", "store"]
    assert set(store.json()) >= {"path", "tokens", "documents", "vocabulary"}


def test_nothing_that_is_there_already_is_overwritten(corpus: Path, tmp_path: Path) -> None:
    out = tmp_path / "tok"
    train_tokenizer(TokenizerTraining(data=str(corpus), out=str(out), vocabulary=300))
    before = {path.name: path.read_bytes() for path in out.iterdir()}
    with pytest.raises(UserError) as caught:
        train_tokenizer(TokenizerTraining(data=str(corpus), out=str(out), vocabulary=290))
    assert caught.value.where == str(out) and caught.value.fix
    assert {path.name: path.read_bytes() for path in out.iterdir()} == before
    foreign = tmp_path / "foreign"
    foreign.mkdir()
    (foreign / "thesis.txt").write_text("ten years of work")
    with pytest.raises(UserError):
        train_tokenizer(TokenizerTraining(data=str(corpus), out=str(foreign), vocabulary=300))
    assert [path.name for path in foreign.iterdir()] == ["thesis.txt"]


def test_a_missing_file_is_said_before_anything_is_written(tmp_path: Path) -> None:
    with pytest.raises(UserError):
        trained_tokenizer(str(tmp_path / "nothing-here"), 300, tmp_path / "cache")
    assert not (tmp_path / "cache").exists()


def test_the_receipt_names_key_and_figures(corpus: Path, tokenizer: Path) -> None:
    noted = json.loads((tokenizer / "prepared.json").read_text())
    assert set(noted) == {"key", "vocabulary", "tokens", "documents", "bytes_per_token"}
    assert tokenizer.name == noted["key"][:32]
