"""Real text that lies on every machine, and one vocabulary learned from it."""

from __future__ import annotations

import random
import sysconfig
from pathlib import Path

import pytest

from llmtrainer.tokenizer.tokenizer import FileTokenizer
from llmtrainer.tokenizer.train import train_vocabulary


def library_source(amount: int) -> list[str]:
    """Modules of the standard library, at least `amount` bytes of them."""
    texts: list[str] = []
    for file in sorted(Path(sysconfig.get_paths()["stdlib"]).glob("*.py")):
        texts.append(file.read_text(encoding="utf-8", errors="replace"))
        amount -= len(texts[-1])
        if amount <= 0:
            return texts
    raise AssertionError("the standard library is smaller than this test needs")


def chinese(characters: int, seed: int = 0, *, even: bool = False) -> str:
    """Runs of frequent and rare characters between commas: as in real text, most runs are distinct; with
    `even`, nearly all."""
    chance = random.Random(seed)
    letters = [chr(0x4E00 + chance.randrange(20_000)) for _ in range(3_000)]
    weights = [1 if even else 1 / rank for rank in range(1, 3_001)]
    drawn = chance.choices(letters, weights, k=characters)
    for place in range(7, characters, 11):
        drawn[place] = "，" if place % 3 else "\n"
    return "".join(drawn)


@pytest.fixture(scope="session")
def texts() -> list[str]:
    return [*library_source(2_000_000), chinese(30_000)]


@pytest.fixture(scope="session")
def trained(texts: list[str]) -> FileTokenizer:
    return train_vocabulary(texts, 1_000)


def hostile(count: int, seed: int = 0) -> list[str]:
    """Strings over all of Unicode: plain words, digits, blanks, Chinese, emoji, control characters, control
    names."""
    chance = random.Random(seed)
    pools = (
        "abcdefgh ", "0123456789", " \n\t\r\x0b\x85\u2028\u3000", "春眠不觉晓处处闻啼鸟，。", "é漢ñß한글ไทย",
        "👩‍👩‍👧🇩🇪🏽",
        "\x00\x01\x7f\ufffd\ufeff\u202e", "'\"_-=<|>(){}[]#", "\u0300\u0301a\u0327", "\U0010ffff\U000e0001",
    )  # fmt: skip
    strings = []
    for _ in range(count):
        parts = []
        for _ in range(chance.randrange(1, 8)):
            if chance.random() < 0.1:
                start = chance.choice([0x20, 0xE000, 0x10000, 0x2F800])
                parts.append(chr(start + chance.randrange(0x900)))
            elif chance.random() < 0.1:
                parts.append(chance.choice(["<|endoftext|>", "<|im_start|>", "<|im_end|", "<|<|pad|>|>"]))
            else:
                parts.append("".join(chance.choices(chance.choice(pools), k=chance.randrange(1, 12))))
        strings.append("".join(parts))
    return strings
