"""Rows that are too long, by hand: 0 is read, 1 is learned, 9 ends an answer."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from llmtrainer.data.length import CutEnd, CutSide, LengthPolicy, Piece, TooLong

# Two turns: a question of 3, an answer of 3 with its end, once more with an answer of 5.
TOKENS = [1, 2, 3, 4, 5, 9, 11, 12, 13, 14, 15, 16, 17, 9]
WEIGHTS = [0, 0, 0, 1, 1, 1, 0, 0, 0, 1, 1, 1, 1, 1]


def row(tokens: list[int] = TOKENS, weights: list[int] = WEIGHTS) -> Piece:
    return Piece(np.array(tokens, dtype=np.int64), np.array(weights, dtype=np.float32))


def applied(policy: LengthPolicy, given: Piece | None = None) -> tuple[str, list[tuple[list[int], list[float]]]]:
    fate, pieces = policy.applied(given or row(), (9,))
    return fate, [(piece.tokens.tolist(), piece.weights.tolist()) for piece in pieces]


@pytest.mark.parametrize("too_long", ["drop", "cut", "split", "keep"])
def test_a_row_that_fits_is_left_alone(too_long: TooLong) -> None:
    assert applied(LengthPolicy(14, too_long)) == ("kept", [(TOKENS, WEIGHTS)])


def test_a_longer_row_is_dropped_or_kept_whole() -> None:
    assert applied(LengthPolicy(13, "drop")) == ("too long", [])
    assert applied(LengthPolicy(13, "keep")) == ("kept (longer)", [(TOKENS, WEIGHTS)])


def test_a_cut_answer_keeps_its_end_behind_what_is_left_of_it() -> None:
    expected = ([1, 2, 3, 4, 5, 9, 11, 12, 13, 14, 15, 9], [0, 0, 0, 1, 1, 1, 0, 0, 0, 1, 1, 1])
    assert applied(LengthPolicy(12, "cut")) == ("cut", [expected])


def test_a_cut_answer_may_lose_its_end_on_purpose() -> None:
    assert applied(LengthPolicy(12, "cut", cut_end="leave_out")) == ("cut", [(TOKENS[:12], WEIGHTS[:12])])


def test_an_end_is_not_put_behind_an_answer_of_which_nothing_is_left_nor_behind_a_question() -> None:
    assert applied(LengthPolicy(10, "cut")) == ("cut", [(TOKENS[:10], WEIGHTS[:10])])
    assert applied(LengthPolicy(8, "cut")) == ("cut", [(TOKENS[:8], WEIGHTS[:8])])
    assert applied(LengthPolicy(6, "cut")) == ("cut", [(TOKENS[:6], WEIGHTS[:6])])


def test_where_everything_is_learned_the_end_is_that_of_the_message_that_is_cut() -> None:
    everything = row(TOKENS, [1] * len(TOKENS))
    assert applied(LengthPolicy(5, "cut"), everything)[1][0][0] == [1, 2, 3, 4, 9]
    assert applied(LengthPolicy(12, "cut"), everything)[1][0][0] == [*TOKENS[:11], 9]
    assert applied(LengthPolicy(7, "cut"), everything)[1][0][0] == TOKENS[:7], "no second end behind an end"
    assert applied(LengthPolicy(12, "cut"), row([*TOKENS[:-1], 8]))[1][0][0] == TOKENS[:12], "an answer without an end"


def test_a_cut_on_the_left_takes_the_beginning_and_what_it_announced() -> None:
    fate, [(tokens, weights)] = applied(LengthPolicy(10, "cut", "left"))
    assert fate == "cut" and tokens == TOKENS[4:]
    assert weights == [0.0, *WEIGHTS[5:]], "the first token has nothing left that announces it"


def test_split_rows_hold_each_target_once_and_those_without_are_left_out() -> None:
    fate, pieces = applied(LengthPolicy(4, "split"))
    # Strides of 3 over places 0, 3, 6, 9, 12; place 6 holds 11 12 13 14, of which 14 is learned.
    assert fate == "split"
    assert pieces == [
        ([1, 2, 3, 4], [0, 0, 0, 1]), ([4, 5, 9, 11], [0, 1, 1, 0]), ([11, 12, 13, 14], [0, 0, 0, 1]),
        ([14, 15, 16, 17], [0, 1, 1, 1]), ([17, 9], [0, 1]),
    ]  # fmt: skip
    without = row([1, 2, 3, 4, 5, 6, 7], [0, 0, 0, 0, 0, 0, 1])
    assert applied(LengthPolicy(3, "split"), without)[1] == [([5, 6, 7], [0, 0, 1])]


@given(
    st.lists(st.sampled_from([0.0, 1.0]), min_size=2, max_size=40), st.integers(2, 12),
    st.sampled_from(["left", "right"]), st.sampled_from(["keep", "leave_out"]),
)
def test_no_cut_is_longer_than_asked_and_no_token_is_overwritten(
    weights: list[float], longest: int, side: CutSide, end: CutEnd
) -> None:
    whole = row(list(range(len(weights))), weights)    # type: ignore[arg-type]
    _, [piece] = LengthPolicy(longest, "cut", side, end).applied(whole, (len(weights) - 1,))
    assert len(piece.tokens) == min(longest, len(weights))
    assert (np.diff(piece.tokens) > 0).all(), "tokens of the row in their order, each once"
    kept = [weights[token] for token in piece.tokens]
    assert piece.weights[1:].tolist() == kept[1:], "each with its own weight"
    _, pieces = LengthPolicy(longest, "split").applied(whole, (len(weights) - 1,))
    learned = [token for piece in pieces for token in piece.tokens[1:][piece.weights[1:] > 0]]
    assert learned == [place for place, weight in enumerate(weights) if weight and place]
