"""Text to ids and back, and what no text may do."""

from __future__ import annotations

import json
import random
import re
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from llmtrainer.base.errors import UserError
from llmtrainer.tokenizer import tokenizer as module
from llmtrainer.tokenizer.files import byte_level_files, pre_tokenizer
from llmtrainer.tokenizer.split import CONTROL_NAMES
from llmtrainer.tokenizer.stream import byte_alphabet
from llmtrainer.tokenizer.tokenizer import FileTokenizer, load_tokenizer, padded_vocabulary
from tests.tokenizer.conftest import hostile

FLAGS = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False}


def edited(tokenizer: FileTokenizer, folder: Path, **changes: Any) -> FileTokenizer:
    """The same tokenizer with other entries at the top of its tokenizer.json or, as `config`, beside it."""
    tokenizer.save(folder)
    config = changes.pop("config", None)
    description = json.loads((folder / "tokenizer.json").read_text(encoding="utf-8"))
    (folder / "tokenizer.json").write_text(json.dumps({**description, **changes}), encoding="utf-8")
    if config is not None:
        (folder / "tokenizer_config.json").write_text(json.dumps(config), encoding="utf-8")
        (folder / "special_tokens_map.json").unlink()
    return load_tokenizer(folder)


def test_decoding_gives_back_any_text(trained: FileTokenizer) -> None:
    strings = hostile(1_000)
    for text, ids in zip(strings, trained.encode_batch(strings), strict=True):
        assert trained.decode(ids) == text
        assert trained.encode(text) == ids


@given(st.text(max_size=100))
def test_decoding_gives_back_what_hypothesis_finds(trained: FileTokenizer, text: str) -> None:
    assert trained.decode(trained.encode(text)) == text


def test_the_control_ids_follow_the_base_vocabulary_in_their_order(trained: FileTokenizer) -> None:
    base = json.loads(trained._files["tokenizer.json"])["model"]["vocab"]
    assert sorted(base.values()) == list(range(987))
    assert list(trained.control.items()) == list(zip(CONTROL_NAMES, range(987, 1_000), strict=True))
    assert len(CONTROL_NAMES) == 13
    assert trained.vocabulary == 1_000
    assert (trained.end, trained.pad) == (988, 993)


@pytest.mark.parametrize(("vocabulary", "rows"), [(64_013, 64_064), (4_096, 4_096), (4_097, 4_160), (1, 64)])
def test_rows_are_padded_to_a_multiple_of_64(vocabulary: int, rows: int) -> None:
    assert padded_vocabulary(vocabulary) == rows
    assert padded_vocabulary(vocabulary, 128) % 128 == 0


@pytest.mark.parametrize("name", CONTROL_NAMES)
def test_text_never_becomes_a_control_id(trained: FileTokenizer, name: str) -> None:
    nested = f"{name[:4]}{name}{name[4:]}"
    for text in (name, f"a{name}b", f" {name}\n{name}", nested, name * 3, f"中{name}文"):
        for ids in (trained.encode(text), *trained.encode_batch([text, text])):
            assert not set(ids) & set(trained.control.values())
            assert trained.decode(ids) == text == trained.decode(ids, skip_control=True)


def test_allowed_control_names_become_ids_and_others_stay_text(trained: FileTokenizer) -> None:
    start, end = trained.control["<|im_start|>"], trained.control["<|im_end|>"]
    text = "<|im_start|>user says <|im_end|>"
    words = trained.encode("user says ")
    assert trained.encode(text, allowed="all") == [start, *words, end]
    assert trained.encode(text, allowed={"<|im_end|>"}) == [*trained.encode("<|im_start|>user says "), end]
    assert trained.encode(text, allowed=set()) == trained.encode(text, allowed="none") == trained.encode(text)
    assert trained.encode("user says ", allowed="none_raise") == words
    with pytest.raises(UserError, match=re.escape("<|im_start|>")):
        trained.encode(text, allowed="none_raise")
    with pytest.raises(UserError, match=r"no control token is called <.tool.>"):
        trained.encode(text, allowed={"<|tool|>"})
    with pytest.raises(UserError, match="allowed='everything'"):
        trained.encode(text, allowed="everything")  # type: ignore[arg-type]


def test_control_tokens_show_their_name_unless_skipped(trained: FileTokenizer) -> None:
    ids = [*trained.encode("one"), trained.end, *trained.encode(" two"), trained.pad]
    assert trained.decode(ids) == "one<|endoftext|> two<|pad|>"
    assert trained.decode(ids, skip_control=True) == "one two"
    assert trained.decode([]) == ""


def test_a_piece_is_empty_until_the_last_token_of_its_character(trained: FileTokenizer) -> None:
    single = FileTokenizer(byte_level_files(byte_alphabet(), []))
    ids = [*single.encode("a中"), single.end, *single.encode("é")]
    assert single.pieces(ids) == ["a", "", "", "中", "<|endoftext|>", "", "é"]
    # A character that never ends is shown by its own tokens, not by the control token after it.
    cut_short = [*single.encode("中")[:2], single.end, *single.encode("中")[:1]]
    assert single.pieces(cut_short) == ["", "\ufffd", "<|endoftext|>", "\ufffd"]


@given(st.lists(st.integers(0, 999), max_size=30))
def test_pieces_and_streams_join_to_the_decoded_text_for_any_ids(
    trained: FileTokenizer, ids: list[int]
) -> None:
    decoded = trained.decode(ids)
    assert len(trained.pieces(ids)) == len(ids)
    assert "".join(trained.pieces(ids)) == decoded
    stream = trained.stream()
    assert "".join(map(stream.feed, ids)) + stream.close() == decoded


def test_a_continuation_is_encoded_as_if_alone_and_joins_to_the_exact_text(
    trained: FileTokenizer, texts: list[str]
) -> None:
    chance = random.Random(5)
    for _ in range(500):
        text = chance.choice(texts)
        start = chance.randrange(len(text) - 1)
        text = text[start : start + chance.randrange(2, 200)]
        place = chance.randrange(len(text))
        prompt, answer = trained.encode(text[:place]), trained.encode_continuation(text[place:])
        assert answer == trained.encode(text[place:])
        assert trained.decode(prompt + answer) == text
        assert trained.encode_batch([text[:place], text[place:]])[1] == answer


def test_texts_that_this_thread_encodes_and_texts_that_all_do_become_the_same_ids(trained: FileTokenizer) -> None:
    for text in ("", "a", "def f(x):\n    return x\n", "你好，世界 \N{SNOWMAN} e\u0301", "x" * 2000):
        alone = trained.encode(text)
        crowded = trained.encode_batch([text, " filler" * 1000])[0]
        assert alone == crowded



def test_encoding_does_not_depend_on_how_much_is_encoded_at_a_time(
    trained: FileTokenizer, texts: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = trained.encode_batch(texts[:5])
    monkeypatch.setattr(module, "LONG_TEXT", 100)
    assert trained.encode_batch(texts[:5]) == whole == [trained.encode(text) for text in texts[:5]]


@pytest.mark.parametrize("number", [-1, 1_000, 10**9])
def test_an_id_outside_the_vocabulary_is_refused(trained: FileTokenizer, number: int) -> None:
    for read in (trained.decode, trained.pieces):
        with pytest.raises(UserError, match="not in the vocabulary of 1,000"):
            read([5, number])


def test_half_of_a_surrogate_pair_is_refused_with_its_place(trained: FileTokenizer) -> None:
    with pytest.raises(UserError, match=re.escape("U+D83D")) as caught:
        trained.encode_batch(["fine", "ab\ud83dcd"])
    assert caught.value.where == "text 1, character 2"


def test_a_saved_tokenizer_is_the_same_when_loaded(trained: FileTokenizer, tmp_path: Path) -> None:
    trained.save(tmp_path / "new" / "folder")
    assert {file.name for file in (tmp_path / "new" / "folder").iterdir()} == {
        "tokenizer.json", "tokenizer_config.json", "special_tokens_map.json",
    }  # fmt: skip
    loaded = load_tokenizer(tmp_path / "new" / "folder")
    loaded.save(tmp_path / "again")
    for file in (tmp_path / "again").iterdir():
        assert file.read_bytes() == (tmp_path / "new" / "folder" / file.name).read_bytes()
    assert loaded.fingerprint == trained.fingerprint
    assert (loaded.vocabulary, loaded.end, loaded.pad, loaded.control) == (
        trained.vocabulary, trained.end, trained.pad, trained.control,
    )  # fmt: skip
    strings = hostile(1_000, seed=1)
    assert loaded.encode_batch(strings) == trained.encode_batch(strings)


def test_what_lies_beside_is_passed_on_byte_for_byte(trained: FileTokenizer, tmp_path: Path) -> None:
    trained.save(tmp_path / "a")
    (tmp_path / "a" / "chat_template.jinja").write_bytes("{{ messages }}\r\n中".encode())
    load_tokenizer(tmp_path / "a").save(tmp_path / "b")
    assert (tmp_path / "b" / "chat_template.jinja").read_bytes() == "{{ messages }}\r\n中".encode()


def test_the_fingerprint_is_of_meaning_and_not_of_layout(trained: FileTokenizer, tmp_path: Path) -> None:
    model = json.loads(trained._files["tokenizer.json"])["model"]
    joined = {**model, "merges": [" ".join(merge) for merge in model["merges"]]}
    assert (
        edited(trained, tmp_path / "same", model=joined, truncation=None).fingerprint == trained.fingerprint
    )
    fewer = {**model, "merges": model["merges"][:-1]}
    split = json.loads(json.dumps(pre_tokenizer()))
    split["pretokenizers"][0]["pattern"]["Regex"] = r"\w+|\W"
    config = {"eos_token": "<|im_end|>", "pad_token": "<|pad|>"}
    others = [
        edited(trained, tmp_path / "merges", model=fewer),
        edited(trained, tmp_path / "split", pre_tokenizer=split),
        edited(trained, tmp_path / "normalizer", normalizer={"type": "NFC"}),
        edited(trained, tmp_path / "end", config=config),
    ]
    assert others[-1].end == trained.control["<|im_end|>"]
    assert len({other.fingerprint for other in [*others, trained]}) == 5


def test_truncation_and_padding_of_a_file_change_no_id(trained: FileTokenizer, tmp_path: Path) -> None:
    truncation = {"direction": "Right", "max_length": 3, "strategy": "LongestFirst", "stride": 0}
    padding = {
        "strategy": {"Fixed": 50}, "direction": "Right", "pad_to_multiple_of": None, "pad_id": 1,
        "pad_type_id": 0, "pad_token": "<|pad|>",
    }  # fmt: skip
    other = edited(trained, tmp_path, truncation=truncation, padding=padding)
    assert other.encode("a longer text than three") == trained.encode("a longer text than three")


def foreign(tmp_path: Path, **changes: Any) -> FileTokenizer:
    """Somebody else's byte-level BPE: its end token is word 0 of the model, `<think>` is added but not
    special."""
    alphabet = byte_alphabet()
    vocabulary = {"<end>": 0} | {character: number + 1 for character, number in alphabet.items()}
    added = [
        {"id": 0, "content": "<end>", **FLAGS, "special": True},
        {"id": 257, "content": "<think>", **FLAGS, "special": False},
    ]
    description = {
        "version": "1.0", "added_tokens": added, "normalizer": None,
        "pre_tokenizer": {
            "type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": False,
        },
        "post_processor": {
            "type": "TemplateProcessing",
            "single": [{"SpecialToken": {"id": "<end>", "type_id": 0}}, {"Sequence": {"id": "A", "type_id": 0}}],
            "pair": [{"Sequence": {"id": "A", "type_id": 0}}, {"Sequence": {"id": "B", "type_id": 1}}],
            "special_tokens": {"<end>": {"id": "<end>", "ids": [0], "tokens": ["<end>"]}},
        },
        "decoder": {"type": "ByteLevel", "add_prefix_space": True, "trim_offsets": True, "use_regex": True},
        "model": {"type": "BPE", "vocab": vocabulary, "merges": [], "ignore_merges": True},
        **changes,
    }  # fmt: skip
    (tmp_path / "tokenizer.json").write_text(json.dumps(description), encoding="utf-8")
    config = {"eos_token": {"content": "<end>", **FLAGS}}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(config), encoding="utf-8")
    return load_tokenizer(tmp_path)


def test_added_tokens_of_others_cannot_be_forged_special_or_not(tmp_path: Path) -> None:
    tokenizer = foreign(tmp_path)
    assert tokenizer.control == {"<end>": 0, "<think>": 257}
    # `ignore_merges` would read a pre-token that is a word of the model as that word.
    for text in ("<end>", "<think>", "x<end>y<think>"):
        assert not set(tokenizer.encode(text)) & {0, 257}
        assert tokenizer.decode(tokenizer.encode(text)) == text
    assert tokenizer.encode("<think>", allowed="all") == [257]
    assert tokenizer.encode("") == []


def test_only_special_tokens_are_skipped_and_pad_may_be_the_end(tmp_path: Path) -> None:
    tokenizer = foreign(tmp_path)
    assert tokenizer.decode([257, 0], skip_control=True) == "<think>"
    assert tokenizer.pieces([257, 0]) == ["<think>", "<end>"]
    assert tokenizer.pad == tokenizer.end == 0


def test_a_model_that_reads_a_control_name_itself_is_refused(tmp_path: Path) -> None:
    words = {"type": "WordLevel", "unk_token": "<unk>", "vocab": {"<unk>": 0, "<end>": 1, "a": 2}}
    added = [{"id": 1, "content": "<end>", **FLAGS, "special": True}]
    with pytest.raises(UserError, match="text could forge <end>"):
        foreign(
            tmp_path, model=words, added_tokens=added, pre_tokenizer=None, decoder=None, post_processor=None
        )


def test_pieces_of_a_decoder_that_drops_the_first_blank_join_to_the_text(tmp_path: Path) -> None:
    words = ["<unk>", "<end>", "\u2581one", "\u2581two", "s", "<0xE4>", "<0xB8>", "<0xAD>", "\u2581"]
    tokenizer = foreign(
        tmp_path,
        model={
            "type": "BPE", "vocab": {word: number for number, word in enumerate(words)}, "merges": [],
            "unk_token": "<unk>", "byte_fallback": True, "fuse_unk": True,
        },
        added_tokens=[{"id": 1, "content": "<end>", **FLAGS, "special": True}],
        pre_tokenizer=None, post_processor=None,
        decoder={"type": "Sequence", "decoders": [
            {"type": "Replace", "pattern": {"String": "\u2581"}, "content": " "}, {"type": "ByteFallback"},
            {"type": "Fuse"}, {"type": "Strip", "content": " ", "start": 1, "stop": 0},
        ]},
    )  # fmt: skip
    ids = [2, 4, 3, 5, 6, 7, 3, 1, 2]
    assert tokenizer.decode(ids) == "ones two中 two<end> one"
    assert tokenizer.pieces(ids) == ["one", "s", " two", "", "", "中", " two", "<end>", " one"]
    assert "".join(tokenizer.pieces([5, 6, 2])) == tokenizer.decode([5, 6, 2])


@pytest.mark.parametrize(
    ("name", "content", "what"),
    [
        ("tokenizer.json", b"{", "tokenizer.json is no JSON"),
        ("tokenizer.json", b"[]", "does not describe a tokenizer"),
        ("tokenizer.json", b'{"model": {"type": "Magic"}}', "not one the tokenizers library can read"),
        ("tokenizer.json", b'{"model": "\xff"}', "tokenizer.json is not UTF-8"),
        ("tokenizer_config.json", b"nothing", "tokenizer_config.json is no JSON"),
    ],
)
def test_damaged_files_are_refused_by_name(
    trained: FileTokenizer, tmp_path: Path, name: str, content: bytes, what: str
) -> None:
    trained.save(tmp_path)
    (tmp_path / name).write_bytes(content)
    with pytest.raises(UserError, match=what) as caught:
        load_tokenizer(tmp_path)
    assert str(tmp_path) in str(caught.value)


def test_a_folder_without_a_tokenizer_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"no tokenizer\.json in"):
        load_tokenizer(tmp_path)
    with pytest.raises(UserError, match=r"no tokenizer\.json in") as caught:
        load_tokenizer(tmp_path / "nowhere")
    assert caught.value.why == "there is no such folder"


def test_a_tokenizer_that_does_not_say_how_documents_end_is_refused(tmp_path: Path) -> None:
    foreign(tmp_path)
    (tmp_path / "tokenizer_config.json").unlink()
    with pytest.raises(UserError, match="nothing says which token ends a document"):
        load_tokenizer(tmp_path)
