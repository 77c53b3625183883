"""Stop strings: the text ends before the first, wherever tokens cut it, and no part of one is ever shown."""

from __future__ import annotations

import random
from collections.abc import Sequence

import pytest

from llmtrainer.generation.stopping import Growing


class Pieces:
    """A stream of ids that are places in a list of pieces."""

    def __init__(self, pieces: Sequence[str], rest: str = "") -> None:
        self.pieces, self.rest = pieces, rest

    def feed(self, token: int) -> str:
        return self.pieces[token]

    def close(self) -> str:
        return self.rest


def shown(pieces: Sequence[str], stop: Sequence[str], rest: str = "", **more: int) -> tuple[list[str], bool]:
    growing = Growing(Pieces(pieces, rest), [], stop=stop, **more)
    found = []
    for token in range(len(pieces)):
        found.append(growing.feed(token))
        if growing.stopped:
            break
    return [*found, growing.close()], growing.stopped


def by_hand(text: str, stop: Sequence[str]) -> str:
    """Character after character: where the first stop string is complete, the text is cut before the longest."""
    for end in range(1, len(text) + 1):
        ending = [one for one in stop if text[:end].endswith(one)]
        if ending:
            return text[: end - max(map(len, ending))]
    return text


@pytest.mark.parametrize(
    ("text", "stop", "expected"),
    [
        ("one\n\ntwo", ["\n\n"], "one"),
        ("aaab", ["aab"], "a"),
        ("aab aac", ["aac"], "aab "),
        ("xabcx", ["abcx", "bc"], "xa"),
        ("xabc", ["abc", "bc"], "x"),
        ("no end", ["END"], "no end"),
        ("almost EN", ["END"], "almost EN"),
        ("END", ["END"], ""),
        ("你好。再见", ["。"], "你好"),
    ],
)
def test_a_text_is_cut_before_the_first_stop_string(text: str, stop: list[str], expected: str) -> None:
    assert by_hand(text, stop) == expected
    for size in range(1, len(text) + 1):
        pieces = [text[start : start + size] for start in range(0, len(text), size)]
        found, stopped = shown(pieces, stop)
        assert ("".join(found), stopped) == (expected, expected != text), size


def test_no_cut_into_tokens_changes_the_text_and_nothing_of_a_stop_string_is_shown_on_the_way() -> None:
    chance = random.Random(3)
    for _ in range(3_000):
        text = "".join(chance.choice("ab") for _ in range(chance.randrange(1, 14)))
        stop = ["".join(chance.choice("ab") for _ in range(chance.randrange(1, 5))) for _ in range(2)]
        pieces, left = [], text
        while left:
            size = chance.randrange(0, 4)
            pieces.append(left[:size])
            left = left[size:]
        found, _ = shown(pieces, stop)
        assert "".join(found) == by_hand(text, stop), (pieces, stop)


def test_what_cannot_become_a_stop_string_is_shown_at_once() -> None:
    found, _ = shown(["Hel", "lo <", "b>", " <", "/s", ">"], ["</s>"])
    assert found == ["Hel", "lo ", "<b>", " ", "", "", ""]


def test_what_is_left_at_the_end_is_shown() -> None:
    assert shown(["a", "<"], ["<>"], rest="\ufffd") == (["a", "", "<\ufffd"], False)
    assert shown(["a", "<"], ["<>"], rest=">") == (["a", "", ""], True)


def test_in_the_first_tokens_no_stop_string_is_looked_for() -> None:
    assert shown(["a.", "b.", "c.", "d."], ["."], unsearched=2) == (["a.", "b.", "c", ""], True)
    # One that begins in them is none either: its beginning was shown.
    assert "".join(shown(["a", "bc", "d"], ["abc"], unsearched=1)[0]) == "abcd"


def test_silent_ids_have_no_text_and_the_prompt_is_fed_and_not_searched() -> None:
    growing = Growing(Pieces(["STOP", "x", "secret", "y"]), [0], silent={2}, stop=["STOP"])
    assert [growing.feed(token) for token in (1, 2, 3)] == ["x", "", "y"]
    assert not growing.stopped
