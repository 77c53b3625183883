"""Where text is cut before anything merges."""

from __future__ import annotations

import json

import pytest
import tokenizers
from hypothesis import given
from hypothesis import strategies as st

from llmtrainer.tokenizer.files import pre_tokenizer
from llmtrainer.tokenizer.split import cut
from llmtrainer.tokenizer.tokenizer import FileTokenizer
from tests.tokenizer.conftest import library_source

EMPTY = {"type": "BPE", "vocab": {}, "merges": []}
RULE = tokenizers.Tokenizer.from_str(
    json.dumps({"version": "1.0", "added_tokens": [], "pre_tokenizer": pre_tokenizer(), "model": EMPTY})
).pre_tokenizer

LETTERS = st.text(st.sampled_from("ab1中文あ \n\r\t.,'\"_(é\u0301\u3000"), max_size=60)


def split(text: str) -> list[str]:
    return [text[start:stop] for _, (start, stop) in RULE.pre_tokenize_str(text)]


@pytest.mark.parametrize(
    ("text", "pieces"),
    [
        ("1234567", ["123", "456", "7"]),
        ("x = 2024", ["x", " =", " ", "202", "4"]),
        ("春眠不觉晓处处闻", ["春眠不觉", "晓处处闻"]),
        ("用Python写，快", ["用", "Python", "写", "，", "快"]),
        ("一 二", ["一", " ", "二"]),
        ("ひらがなカタカナです", ["ひらがなカタカナ", "です"]),
        ("it's he'll 'tis 'string'", ["it", "'s", " he", "'ll", " '", "tis", " '", "string", "'"]),
        ("self.append(my_name)", ["self", ".append", "(my", "_name", ")"]),
        ("cafe\u0301s", ["cafe\u0301s"]),
        ("x == y", ["x", " ==", " y"]),
        ("def f():\n        return 1\n", ["def", " f", "():\n", "       ", " return", " ", "1", "\n"]),
        ("a\n\n\n    b", ["a", "\n\n\n", "   ", " b"]),
        ("a   \nb", ["a", "   \n", "b"]),
        ("end  ", ["end", "  "]),
    ],
)
def test_text_is_cut_as_the_rule_says(text: str, pieces: list[str]) -> None:
    assert split(text) == pieces


def test_a_prompt_that_ends_with_a_newline_is_cut_as_the_whole_text_is(trained: FileTokenizer) -> None:
    (text, *_) = library_source(1)
    lines = text.splitlines(keepends=True)[:300]
    whole = trained.encode("".join(lines))
    for count in range(1, len(lines)):
        if not lines[count].startswith("\n"):
            assert trained.encode("".join(lines[:count])) + trained.encode("".join(lines[count:])) == whole


@given(st.one_of(LETTERS, st.text(max_size=40)))
def test_every_character_is_in_one_piece(text: str) -> None:
    assert "".join(split(text)) == text


@pytest.mark.parametrize(
    "unit", ["a", "中", "あ", "0", "=", " ", "\n", "é", "。", "=\n", " \n", "\u0301", "\u2028"]
)
def test_no_piece_is_longer_than_its_bound(unit: str) -> None:
    pieces = split(unit * 3_000)
    assert "".join(pieces) == unit * 3_000
    assert max(map(len, pieces)) <= 80


@given(LETTERS, st.integers(1, 9))
def test_ids_of_a_text_that_is_cut_are_the_ids_of_the_whole(
    trained: FileTokenizer, text: str, longest: int
) -> None:
    parts = list(cut(text, longest))
    assert "".join(parts) == text
    assert [number for part in parts for number in trained.encode(part)] == trained.encode(text)


def test_a_long_text_is_cut_only_between_a_word_and_a_newline() -> None:
    assert list(cut("abc \n x\ny 1\n中\nz", 1)) == ["abc \n x", "\ny 1", "\n中", "\nz"]
    assert list(cut("abc " * 9, 5)) == ["abc " * 9]
