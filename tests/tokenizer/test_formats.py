"""Vocabularies of other formats give the ids of their own libraries, and no text forges their control tokens."""

from __future__ import annotations

import base64
import json
import random
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import sentencepiece
import tiktoken
import tokenizers
from tokenizers import decoders, models, normalizers, pre_tokenizers, trainers

from llmtrainer.base.errors import UserError
from llmtrainer.tokenizer.byte_pairs import in_oniguruma, merges_of_ranks
from llmtrainer.tokenizer.sentence_piece import SentencePieceTokenizer
from llmtrainer.tokenizer.stream import byte_alphabet
from llmtrainer.tokenizer.tokenizer import FileTokenizer, load_tokenizer
from tests.tokenizer.conftest import chinese, hostile, library_source

CL100K = (
    r"'(?i:[sdmt]|ll|ve|re)|[^\r\n\p{L}\p{N}]?+\p{L}++|\p{N}{1,3}+| ?[^\s\p{L}\p{N}]++[\r\n]*+|\s++$|\s*[\r\n]"
    r"|\s+(?!\S)|\s"
)
R50K = r"'(?:[sdmt]|ll|ve|re)| ?\p{L}++| ?\p{N}++| ?[^\s\p{L}\p{N}]++|\s++$|\s+(?!\S)|\s"
"""As tiktoken publishes them."""

PROBES = [
    "", " ", "  ", "\n", "\r\n", "\x00", "a\x00b", " a", "a ", "  a  b  ", "\ta\t\tb", "😀👩‍👩‍👧🇩🇪", "中 文", "　全角",
    "\x85", "\u200b", "\ufeffx", "ſ's 'ſ I'LL x'ſ", "<s>", "</s> x <unk>", "<0x41>", "é e\u0301 ñ", "ﬁ ½ Å", "한글 ไทย",
    " \n \n", "x" * 300, " " * 70 + "x", "\n" * 20, "a\n   ", "it's 12345 \n\n", "a" * 23, "ab" * 5,
]  # fmt: skip


@pytest.fixture(scope="module")
def probes() -> list[str]:
    lines = [line for text in library_source(300_000) for line in text.splitlines()]
    return [*PROBES, *random.Random(3).sample(lines, 300), *hostile(300, seed=4), chinese(400)]


@pytest.fixture(scope="module")
def ranks() -> dict[bytes, int]:
    """Words and their ranks, as tiktoken has them: learned on the library's source and Chinese."""
    learned = tokenizers.Tokenizer(models.BPE())
    learned.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)  # type: ignore[assignment]
    trainer = trainers.BpeTrainer(
        vocab_size=1_200, show_progress=False, initial_alphabet=pre_tokenizers.ByteLevel.alphabet()
    )
    learned.train_from_iterator([*library_source(300_000), chinese(5_000), "a" * 50], trainer)
    alphabet = byte_alphabet()
    return {bytes(alphabet[letter] for letter in token): rank for token, rank in learned.get_vocab().items()}


def write_ranks(folder: Path, name: str, ranks: dict[bytes, int], config: dict[str, Any] | None) -> Path:
    folder.mkdir()
    lines = [b"%s %d\n" % (base64.b64encode(token), rank) for token, rank in sorted(ranks.items(), key=lambda i: i[1])]
    (folder / name).write_bytes(b"".join(lines))
    if config is not None:
        (folder / "tokenizer_config.json").write_text(json.dumps(config))
    return folder


@pytest.mark.parametrize(("name", "pattern"), [("r50k", R50K), ("cl100k", CL100K), ("words", r"\w+|\W")])
def test_tiktoken_ranks_give_the_ids_of_tiktoken(
    tmp_path: Path, ranks: dict[bytes, int], probes: list[str], name: str, pattern: str
) -> None:
    special = {"<|endoftext|>": 1_200, "<|tool|>": 1_205}
    config = {"pat_str": pattern, "special_tokens": special, "eos_token": "<|endoftext|>"}
    ours = load_tokenizer(write_ranks(tmp_path / "folder", f"{name}.tiktoken", ranks, config))
    theirs = tiktoken.Encoding(name, pat_str=pattern, mergeable_ranks=ranks, special_tokens=special)
    texts = [*probes, "a<|tool|>b", "<|endoftext|>"]
    assert ours.encode_batch(texts) == [theirs.encode(text, disallowed_special=()) for text in texts]
    assert ours.encode("a<|tool|>b", allowed="all") == theirs.encode("a<|tool|>b", allowed_special="all")
    assert [ours.decode(ids) for ids in ours.encode_batch(texts)] == texts
    assert (ours.end, ours.begin, ours.vocabulary) == (1_200, None, 1_206)


def test_a_published_name_says_how_text_is_cut(tmp_path: Path, ranks: dict[bytes, int], probes: list[str]) -> None:
    ours = load_tokenizer(write_ranks(tmp_path / "a", "cl100k_base.tiktoken", ranks, None))
    theirs = tiktoken.Encoding("a", pat_str=CL100K, mergeable_ranks=ranks, special_tokens={})
    assert ours.encode_batch(probes) == [theirs.encode_ordinary(text) for text in probes]
    assert ours.control["<|fim_middle|>"] == 100_259


def test_a_rank_file_of_an_unknown_pattern_is_refused_and_the_fix_is_told(
    tmp_path: Path, ranks: dict[bytes, int]
) -> None:
    with pytest.raises(UserError, match="how this vocabulary cuts text is not known") as caught:
        load_tokenizer(write_ranks(tmp_path / "a", "tokenizer.model", ranks, {"eos_token": "<end>"}))
    assert "pat_str" in str(caught.value.fix)
    with pytest.raises(UserError, match="cannot be carried over"):
        in_oniguruma(r"\p{N}{1,3}+a", "here")
    with pytest.raises(UserError, match="line 2 is no rank"):
        (tmp_path / "bad.tiktoken").write_bytes(b"YQ== 0\nnothing\n")
        load_tokenizer(tmp_path / "bad.tiktoken")


def test_of_two_cuts_of_one_word_the_one_that_can_stand_left_comes_first() -> None:
    # In `ab a ba` both pairs make `aba`; the left pair is (ab, a), whatever the lengths.
    ranks = {word: place for place, word in enumerate(["a", "b", "ab", "ba", "aba"])}
    assert list(merges_of_ranks(ranks))[-2:] == [("ab", "a"), ("a", "ba")]


def test_vocab_and_merges_give_the_ids_of_gpt2s_tokenizer(tmp_path: Path, probes: list[str]) -> None:
    transformers = pytest.importorskip("transformers")
    bare = tokenizers.Tokenizer(models.BPE())
    bare.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)  # type: ignore[assignment]
    trainer = trainers.BpeTrainer(
        vocab_size=900, show_progress=False, special_tokens=["<|endoftext|>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
    )  # fmt: skip
    bare.train_from_iterator(library_source(200_000), trainer)
    bare.model.save(str(tmp_path))
    ours = load_tokenizer(tmp_path)
    assert load_tokenizer(tmp_path / "merges.txt").fingerprint == ours.fingerprint
    theirs = transformers.GPT2Tokenizer.from_pretrained(str(tmp_path))
    assert ours.encode_batch(probes) == theirs(probes, split_special_tokens=True)["input_ids"]
    assert ours.control == {"<|endoftext|>": 0} and ours.end == 0
    ours.save(tmp_path / "saved")
    assert load_tokenizer(tmp_path / "saved").encode_batch(probes) == ours.encode_batch(probes)
    (tmp_path / "tokenizer_config.json").write_text('{"tokenizer_class": "CodeGenTokenizer"}')
    with pytest.raises(UserError, match="how CodeGenTokenizer cuts text is not known"):
        load_tokenizer(tmp_path)


def test_merges_left_out_at_random_and_blanks_cut_in_front_do_not_reach_what_is_learned(tmp_path: Path) -> None:
    bare = tokenizers.Tokenizer(models.BPE(dropout=0.5))
    bare.normalizer = normalizers.Sequence([normalizers.Lowercase(), normalizers.Strip()])  # type: ignore[assignment]
    bare.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)  # type: ignore[assignment]
    bare.decoder = decoders.ByteLevel()  # type: ignore[assignment]
    trainer = trainers.BpeTrainer(
        vocab_size=600, show_progress=False, special_tokens=["<|endoftext|>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
    )  # fmt: skip
    bare.train_from_iterator(library_source(50_000), trainer)
    bare.save(str(tmp_path / "tokenizer.json"))
    ours, text = load_tokenizer(tmp_path), "return the default encoding of the string"
    assert len({tuple(bare.encode(text).ids) for _ in range(20)}) > 1
    assert len({tuple(ours.encode(text)) for _ in range(20)}) == 1
    assert ours.decode(ours.encode("hello") + ours.encode_continuation(" world")) == "hello world"


KINDS: dict[str, dict[str, Any]] = {
    "llama": {"model_type": "bpe", "byte_fallback": True, "normalization_rule_name": "identity",
              "remove_extra_whitespaces": False, "allow_whitespace_only_pieces": True},
    "no_bytes": {"model_type": "bpe", "normalization_rule_name": "identity", "remove_extra_whitespaces": False},
    "no_prefix": {"model_type": "bpe", "byte_fallback": True, "normalization_rule_name": "identity",
                  "remove_extra_whitespaces": False, "add_dummy_prefix": False},
    "unigram": {"model_type": "unigram", "byte_fallback": True, "normalization_rule_name": "identity",
                "remove_extra_whitespaces": False},
    "nfkc": {"model_type": "unigram"},
    "nfkc_pairs": {"model_type": "bpe", "byte_fallback": True},
    "named": {"model_type": "bpe", "byte_fallback": True, "normalization_rule_name": "identity",
              "remove_extra_whitespaces": False, "user_defined_symbols": ["<turn>", "\u2581\u2581\u2581"]},
}  # fmt: skip
LOSSLESS = [kind for kind, settings in KINDS.items() if settings.get("byte_fallback") and "nfkc" not in kind]


@pytest.fixture(scope="module")
def learned(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """Path of a SentencePiece model of a kind."""
    folder = tmp_path_factory.mktemp("sentencepiece")
    lines = [line for text in [*library_source(100_000), chinese(2_000)] for line in text.splitlines() if line]

    def path(kind: str) -> Path:
        file = folder / f"{kind}.model"
        if not file.exists():
            with file.open("wb") as out:
                sentencepiece.SentencePieceTrainer.train(
                    sentence_iterator=iter(lines), model_writer=out, vocab_size=2_000, character_coverage=0.98,
                    num_threads=1, minloglevel=3, hard_vocab_limit=False, **KINDS[kind],
                )  # fmt: skip
        return file

    return path


@pytest.mark.parametrize("kind", KINDS)
def test_a_sentencepiece_model_gives_the_ids_of_sentencepiece(
    learned: Callable[[str], Path], probes: list[str], kind: str, tmp_path: Path
) -> None:
    ours = load_tokenizer(learned(kind))
    theirs = sentencepiece.SentencePieceProcessor(model_file=str(learned(kind)))
    assert isinstance(ours, SentencePieceTokenizer) == (kind in ("unigram", "nfkc", "nfkc_pairs", "named"))
    assert ours.encode_batch(probes) == [theirs.encode(text) for text in probes]
    assert (ours.vocabulary, ours.end, ours.begin) == (len(theirs), theirs.eos_id(), None)
    ours.save(tmp_path)
    again = load_tokenizer(tmp_path)
    assert again.fingerprint == ours.fingerprint and again.encode_batch(probes) == ours.encode_batch(probes)
    for ids in ours.encode_batch(probes):
        assert "".join(ours.pieces(ids)) == ours.decode(ids)


@pytest.mark.parametrize("kind", KINDS)
def test_no_text_forges_a_control_token_of_a_sentencepiece_model(learned: Callable[[str], Path], kind: str) -> None:
    ours = load_tokenizer(learned(kind))
    assert set(ours.control) == {"<s>", "</s>"} | ({"<turn>"} if kind == "named" else set())
    for name in ours.control:
        for text in (name, f"a {name}b", f" {name}{name}", f"{name}\n"):
            for ids in (ours.encode(text), ours.encode_continuation(text)):
                assert not set(ids) & set(ours.control.values())
            if kind in LOSSLESS:
                assert ours.decode(ours.encode(text)) == text
        assert ours.encode(f"a{name}", allowed="all")[-1] == ours.control[name]


@pytest.mark.parametrize("kind", LOSSLESS)
def test_continuations_join_to_the_exact_text_and_do_not_know_what_was_before(
    learned: Callable[[str], Path], probes: list[str], kind: str
) -> None:
    ours = load_tokenizer(learned(kind))
    chance = random.Random(6)
    texts = [text for text in probes if len(text) > 1 and "\u2581" not in text]
    for _ in range(500):
        text = chance.choice(texts)
        place = chance.randrange(1, len(text))
        before, after = text[:place], text[place:]
        assert ours.decode(ours.encode(before) + ours.encode_continuation(after)) == text
    word = "return"
    behind_a_line = ours.encode(f"\n{word}")[len(ours.encode("\n")) :]
    assert ours.encode_continuation(word) == behind_a_line
    if kind != "no_prefix":
        assert ours.encode(word) != behind_a_line, "the blank in front of a first word is not seen by this test"


def test_half_of_a_surrogate_pair_is_refused_by_sentencepiece_models_too(learned: Callable[[str], Path]) -> None:
    for kind in ("llama", "nfkc"):
        with pytest.raises(UserError, match=r"U\+D83D"):
            load_tokenizer(learned(kind)).encode_batch(["fine", "ab\ud83dcd"])


def test_a_damaged_sentencepiece_model_is_refused_and_a_missing_library_named(
    learned: Callable[[str], Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "a.model").write_bytes(learned("llama").read_bytes()[:5_000])
    with pytest.raises(UserError, match="no SentencePiece model"):
        load_tokenizer(tmp_path)
    monkeypatch.setitem(sys.modules, "sentencepiece", None)
    assert load_tokenizer(learned("llama")).encode("a b")
    with pytest.raises(UserError, match="needs the sentencepiece library") as caught:
        load_tokenizer(learned("nfkc"))
    assert "llmtrainer[hf]" in str(caught.value.fix)


def test_a_config_that_asks_for_it_puts_the_begin_before_a_text(learned: Callable[[str], Path], tmp_path: Path) -> None:
    for kind in ("llama", "unigram"):
        folder = tmp_path / kind
        folder.mkdir()
        (folder / "tokenizer.model").write_bytes(learned(kind).read_bytes())
        (folder / "tokenizer_config.json").write_text('{"bos_token": "<s>", "add_bos_token": true}')
        ours = load_tokenizer(folder)
        assert ours.begin == 1 and load_tokenizer(learned(kind)).begin is None
        assert ours.encode("a b") == load_tokenizer(learned(kind)).encode("a b")
        assert ours.fingerprint != load_tokenizer(learned(kind)).fingerprint


def test_several_candidates_in_a_folder_are_refused_by_name(learned: Callable[[str], Path], tmp_path: Path) -> None:
    for name in ("a.model", "b.model"):
        (tmp_path / name).write_bytes(learned("llama").read_bytes())
    with pytest.raises(UserError, match="2 files in"):
        load_tokenizer(tmp_path)
    assert isinstance(load_tokenizer(tmp_path / "b.model"), FileTokenizer)
    (tmp_path / "words.txt").write_text("a b c")
    with pytest.raises(UserError, match=r"words\.txt is no tokenizer"):
        load_tokenizer(tmp_path / "words.txt")
