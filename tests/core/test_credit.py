"""Credit of answers and tokens by hand: GAE, whitening, running moments, the coefficient that adapts."""

from __future__ import annotations

import numpy as np
import pytest

from llmtrainer.core import credit
from llmtrainer.core.credit import Moments


def test_gae_of_three_tokens_by_hand() -> None:
    # Surprises 0.1, 0.1 and 0.3, backwards with 0.95: 0.3, 0.385, 0.46575.
    advantages, returns = credit.gae(np.array([0.0, 0.0, 1.0]), np.array([0.5, 0.6, 0.7]), 1.0, 0.95)
    assert advantages.tolist() == pytest.approx([0.46575, 0.385, 0.3], abs=1e-12)
    assert returns.tolist() == pytest.approx([0.96575, 0.985, 1.0], abs=1e-12)


def test_gae_is_the_definition_summed_out() -> None:
    draw = np.random.default_rng(3)
    rewards, values, gamma, lam = draw.normal(size=7), draw.normal(size=7), 0.9, 0.8
    following = np.append(values[1:], 0.0)
    surprise = rewards + gamma * following - values
    expected = [sum((gamma * lam) ** k * surprise[t + k] for k in range(7 - t)) for t in range(7)]
    assert credit.gae(rewards, values, gamma, lam)[0].tolist() == pytest.approx(expected, abs=1e-12)


def test_behind_an_answer_that_was_cut_off_stands_what_the_critic_expected() -> None:
    rewards, values = np.array([0.0, 1.0]), np.array([0.5, 0.6])
    # 1 + 0.6 - 0.6 with the last value again, 1 + 0.9 - 0.6 with one for what follows.
    assert credit.gae(rewards, values, 1.0, 1.0, ended=False)[0][-1] == pytest.approx(1.0)
    assert credit.gae(rewards, np.append(values, 0.9), 1.0, 1.0, ended=False)[0][-1] == pytest.approx(1.3)
    assert credit.gae(rewards, np.append(values, 0.9), 1.0, 1.0)[0][-1] == pytest.approx(0.4)


def test_monte_carlo_is_gae_with_lambda_1() -> None:
    rewards, values = np.array([0.1, 0.2, 0.3]), np.array([5.0, -3.0, 2.0])
    assert credit.gae(rewards, values, 1.0, 1.0)[1].tolist() == pytest.approx([0.6, 0.5, 0.3])
    assert credit.returns(rewards, 0.5).tolist() == pytest.approx([0.1 + 0.1 + 0.075, 0.2 + 0.15, 0.3])


def test_whitening_looks_at_every_token_that_counts_and_at_no_other() -> None:
    values = [np.array([1.0, 99.0, 3.0]), np.array([5.0])]
    weights = [np.array([1, 0, 1], dtype=np.float32), np.array([1], dtype=np.float32)]
    found = credit.whiten(values, weights)
    assert found[0].tolist() == pytest.approx([-1.0, 0.0, 0.0]) and found[1].tolist() == pytest.approx([1.0])
    kept = credit.whiten(values, weights, shift=False)
    assert kept[0].tolist() == pytest.approx([2.0, 0.0, 3.0]) and kept[1].tolist() == pytest.approx([4.0])


def test_whitening_a_single_token_gives_nothing_and_no_nan() -> None:
    one = [np.array([2.0])], [np.ones(1, dtype=np.float32)]
    assert credit.whiten(*one)[0].tolist() == [0.0] and credit.whiten([], []) == []


def test_running_moments_are_those_of_everything_at_once() -> None:
    draw = np.random.default_rng(4)
    parts = [draw.normal(3, 2, size) for size in (5, 1, 17)]
    moments = Moments()
    for part in parts:
        moments = moments.with_more(np.append(part, np.nan))
    every = np.concatenate(parts)
    assert (moments.count, moments.mean) == (23, pytest.approx(every.mean(), abs=1e-12))
    assert moments.deviation == pytest.approx(every.std(ddof=1), abs=1e-12)
    expected = (every - every.mean()) / (every.std(ddof=1) + 1e-8)
    np.testing.assert_allclose(moments.normalised(every, shift=True), expected, rtol=0, atol=1e-12)
    np.testing.assert_allclose(moments.normalised(every), every / (every.std(ddof=1) + 1e-8), rtol=0, atol=1e-12)


def test_moments_of_nothing_and_of_equals_divide_by_one() -> None:
    assert Moments().deviation == 1.0 and Moments().with_more(np.array([2.0, 2.0])).deviation == 1.0
    assert Moments().with_more(np.array([np.nan])) == Moments()


@pytest.mark.parametrize(
    ("kl", "expected"), [(6.0, 0.2), (12.0, 0.2 * 1.00512), (6.6, 0.2 * 1.00256), (0.0, 0.2 * 0.99488)]
)
def test_the_coefficient_grows_where_the_policy_went_too_far(kl: float, expected: float) -> None:
    # Errors 0, 0.2 after the clip, 0.1, -0.2 after the clip; 256 answers of a horizon of 10,000.
    assert credit.adapted(0.2, kl, 6.0, 256, 10_000) == pytest.approx(expected)


def test_the_penalty_of_overlong_answers_by_hand() -> None:
    length_R = np.array([5, 12, 14, 16, 20])
    assert credit.overlong(length_R, 16, 4).tolist() == pytest.approx([0, 0, -0.5, -1, -1])
    assert credit.overlong(length_R, 16, 0).tolist() == pytest.approx([0, 0, 0, 0, -1])


def test_the_batch_can_lend_its_deviation_to_its_groups() -> None:
    reward_R, group_R = np.array([1.0, 0.0, 4.0, 2.0]), np.array([0, 0, 1, 1])
    found = credit.group_advantage(reward_R, group_R, "batch")
    deviation = reward_R.std(ddof=1) + 1e-4
    assert found.tolist() == pytest.approx([0.5 / deviation, -0.5 / deviation, 1 / deviation, -1 / deviation])
