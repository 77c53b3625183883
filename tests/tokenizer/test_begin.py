"""The id before a text is the one that transformers puts there, and blanks that a file added are words."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

import pytest
import tokenizers
from tokenizers import decoders, models, pre_tokenizers, processors, trainers

from llmtrainer.base.errors import UserError
from llmtrainer.tokenizer.tokenizer import FileTokenizer, load_tokenizer
from tests.tokenizer.conftest import hostile, library_source

transformers = pytest.importorskip("transformers")

FLAGS = {"single_word": False, "lstrip": False, "rstrip": False}


def llama_like(folder: Path, scheme: str = "first", config: dict[str, Any] | None = None) -> Path:
    """Metaspace pairs with byte fallback, `<s>` before every text."""
    built = tokenizers.Tokenizer(models.BPE(byte_fallback=True, unk_token="<unk>", fuse_unk=True))
    built.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme=scheme, split=False)  # type: ignore[assignment]
    built.decoder = decoders.Sequence(  # type: ignore[assignment]
        [decoders.Replace("\u2581", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    trainer = trainers.BpeTrainer(
        vocab_size=800, show_progress=False,
        special_tokens=["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256))],
    )  # fmt: skip
    built.train_from_iterator(library_source(60_000)[0].split("\n"), trainer)
    built.post_processor = processors.TemplateProcessing(  # type: ignore[assignment]
        single="<s> $A", pair="<s> $A $B", special_tokens=[("<s>", 1)]
    )
    description = json.loads(built.to_str())
    description["added_tokens"] = [token for token in description["added_tokens"] if token["id"] < 3]
    folder.mkdir()
    (folder / "tokenizer.json").write_text(json.dumps(description), encoding="utf-8")
    roles = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}
    told = {"tokenizer_class": "PreTrainedTokenizerFast", **roles, **(config or {})}
    (folder / "tokenizer_config.json").write_text(json.dumps(told))
    return folder


@pytest.mark.parametrize(
    ("scheme", "config"), [("first", {}), ("always", {"add_bos_token": False}), ("never", {"add_bos_token": True})]
)
def test_begin_and_ids_are_those_of_auto_tokenizer(tmp_path: Path, scheme: str, config: dict[str, Any]) -> None:
    folder = llama_like(tmp_path / "a", scheme, config)
    ours, theirs = load_tokenizer(folder), transformers.AutoTokenizer.from_pretrained(str(folder))
    assert ours.begin == 1
    before = [1]
    texts = [*(text for text in hostile(300) if text), "a b", " a", "</s>", "<s>a<unk>", "caf\u00e9 \u4e2d"]
    for text in texts:
        assert before + ours.encode(text) == theirs(text, split_special_tokens=True)["input_ids"]
    for text in ("a b</s>c d", "x</s> y", "</s>z"):
        assert before + ours.encode(text, allowed="all") == theirs(text)["input_ids"]
    assert ours.decode(ours.encode("a b") + ours.encode_continuation("c d")) == "a bc d"


def test_the_fingerprint_knows_the_begin_and_nothing_changed_without_one(
    tmp_path: Path, trained: FileTokenizer
) -> None:
    first = load_tokenizer(llama_like(tmp_path / "a"))
    folder = llama_like(tmp_path / "b")
    description = json.loads((folder / "tokenizer.json").read_text(encoding="utf-8"))
    (folder / "tokenizer.json").write_text(json.dumps({**description, "post_processor": None}), encoding="utf-8")
    assert load_tokenizer(folder).begin is None
    assert load_tokenizer(folder).fingerprint != first.fingerprint
    assert trained.begin is None and trained.fingerprint == fingerprint_before_begins(trained)


def fingerprint_before_begins(tokenizer: FileTokenizer) -> str:
    """As every store and checkpoint so far has it."""
    description = json.loads(tokenizer._files["tokenizer.json"])
    model = description["model"]
    model["merges"] = [" ".join(merge) for merge in model["merges"]]
    kept = {key: description[key] for key in ("normalizer", "pre_tokenizer")}
    decides = {**kept, "model": model, "control": dict(tokenizer.control), "end": tokenizer.end}
    return hashlib.sha256(json.dumps(decides, sort_keys=True).encode()).hexdigest()


def test_a_template_of_two_ids_before_a_text_is_refused(tmp_path: Path) -> None:
    folder = llama_like(tmp_path / "a")
    description = json.loads((folder / "tokenizer.json").read_text(encoding="utf-8"))
    single = description["post_processor"]["single"]
    description["post_processor"]["single"] = [single[0], *single]
    (folder / "tokenizer.json").write_text(json.dumps(description), encoding="utf-8")
    with pytest.raises(UserError, match="begins a text with 2 ids"):
        load_tokenizer(folder)


def test_added_runs_of_blanks_are_words_and_added_names_are_not(trained: FileTokenizer, tmp_path: Path) -> None:
    trained.save(tmp_path)
    description = json.loads((tmp_path / "tokenizer.json").read_text(encoding="utf-8"))
    for place, content in enumerate(["    ", "  ", "<think>"]):
        token = {"id": 1_000 + place, "content": content, **FLAGS, "normalized": True, "special": False}
        description["added_tokens"].append(token)
    (tmp_path / "tokenizer.json").write_text(json.dumps(description), encoding="utf-8")
    ours, theirs = load_tokenizer(tmp_path), transformers.AutoTokenizer.from_pretrained(str(tmp_path))
    assert "    " not in ours.control and ours.control["<think>"] == 1_002
    texts = ["def f():\n        return 1", "   a", "      \n  b", "a"]
    assert ours.encode_batch(texts) == theirs(texts, split_special_tokens=True)["input_ids"]
    assert 1_000 in ours.encode(texts[0])
    assert 1_002 in theirs("<think>", split_special_tokens=True)["input_ids"] and 1_002 not in ours.encode("<think>")
    assert [ours.decode(ids) for ids in ours.encode_batch(texts)] == texts
    assert ours.fingerprint != trained.fingerprint


def test_a_unigram_models_own_control_words_are_unreachable(tmp_path: Path) -> None:
    words = [["<pad>", 0.0], ["</s>", 0.0], ["<unk>", 0.0], ["\u2581", -2.0], ["<", -3.0], ["/", -3.0], ["s", -3.0],
             [">", -3.0], ["\u2581s", -2.5], ["pad", -2.0], ["unk", -2.0]]  # fmt: skip
    added = [{"id": place, "content": words[place][0], **FLAGS, "normalized": False, "special": True}
             for place in range(3)]  # fmt: skip
    description = {
        "version": "1.0", "added_tokens": added, "normalizer": None,
        "pre_tokenizer": {"type": "Metaspace", "replacement": "\u2581", "prepend_scheme": "always", "split": True},
        "post_processor": None,
        "decoder": {"type": "Metaspace", "replacement": "\u2581", "prepend_scheme": "always", "split": True},
        "model": {"type": "Unigram", "unk_id": 2, "vocab": words, "byte_fallback": False},
    }  # fmt: skip
    (tmp_path / "tokenizer.json").write_text(json.dumps(description), encoding="utf-8")
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"eos_token": "</s>", "pad_token": "<pad>"}))
    ours = load_tokenizer(tmp_path)
    assert ours.encode("</s>") == [3, 4, 5, 6, 7]
    assert ours.encode("s <pad><unk>") == [8, 3, 4, 9, 7, 4, 10, 7]
    assert ours.encode("\u4e2d") == [3, 2]
