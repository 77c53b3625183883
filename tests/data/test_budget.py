"""Bins under a budget: legal, few, with a bound that is one, and equal work on every rank."""

from __future__ import annotations

import itertools
from collections.abc import Callable

import numpy as np
import pytest

from llmtrainer.data.budget import cost_of, cut_step, deal, lower_bound, pack, snake

Draw = Callable[[np.random.Generator, int], np.ndarray]

SHAPES: dict[str, Draw] = {
    "uniform": lambda r, n: r.integers(1, 1025, n), "uniform short": lambda r, n: r.integers(1, 200, n),
    "uniform long": lambda r, n: r.integers(500, 1025, n), "halves": lambda r, n: r.integers(400, 700, n),
    "thirds": lambda r, n: r.integers(250, 450, n), "lognormal": lambda r, n: r.lognormal(5, 1, n),
    "lognormal narrow": lambda r, n: r.lognormal(5, 0.4, n), "lognormal wide": lambda r, n: r.lognormal(4, 2, n),
    "exponential": lambda r, n: r.exponential(300, n), "exponential short": lambda r, n: r.exponential(60, n),
    "pareto": lambda r, n: 20 * (1 + r.pareto(1.2, n)), "normal": lambda r, n: r.normal(500, 150, n),
    "normal short": lambda r, n: r.normal(120, 30, n), "two kinds": lambda r, n: r.choice([90, 700], n),
    "three kinds": lambda r, n: r.choice([34, 340, 512], n), "primes": lambda r, n: r.choice([7, 211, 397, 601], n),
    "beta": lambda r, n: 1024 * r.beta(2, 5, n), "u-shaped": lambda r, n: 1024 * r.beta(0.4, 0.4, n),
    "triangular": lambda r, n: r.triangular(10, 200, 1000, n), "mostly full": lambda r, n: 1024 - r.exponential(90, n),
}  # fmt: skip


def drawn(shape: str, count: int, longest: int = 1024, seed: int = 5) -> np.ndarray:
    return np.clip(SHAPES[shape](np.random.default_rng(seed), count), 1, longest).astype(np.int64)


def slow_best_fit(lengths: list[int], budget: int) -> int:
    """The definition: longest first, each into the open bin that it leaves least room in."""
    rooms: list[int] = []
    for length in sorted(lengths, reverse=True):
        fits = [room for room in rooms if room >= length]
        if fits:
            rooms.remove(min(fits))
            rooms.append(min(fits) - length)
        else:
            rooms.append(budget - length)
    return len(rooms)


def fewest(lengths: list[int], budget: int) -> int:
    """By trying everything: each length into every bin."""
    best = len(lengths)

    def place(index: int, loads: list[int]) -> None:
        nonlocal best
        if len(loads) >= best:
            return
        if index == len(lengths):
            best = len(loads)
            return
        for number in range(len(loads)):
            if loads[number] + lengths[index] <= budget:
                loads[number] += lengths[index]
                place(index + 1, loads)
                loads[number] -= lengths[index]
        place(index + 1, [*loads, lengths[index]])

    place(0, [])
    return best


@pytest.mark.parametrize("shape", SHAPES)
def test_every_length_has_one_bin_and_no_bin_is_over_the_budget(shape: str) -> None:
    for budget in (1024, 1500, 8192):
        lengths = drawn(shape, 3000)
        bins = pack(lengths, budget)
        assert len(bins) == len(lengths) and set(bins) == set(range(bins.max() + 1))
        assert np.bincount(bins, weights=lengths).max() <= budget
        assert bins.max() + 1 == slow_best_fit(lengths.tolist(), budget)
        assert np.array_equal(bins, pack(lengths, budget)), "the same plan each time"


def test_10_000_lengths_fill_nine_tenths_of_bins_of_four_mean_lengths() -> None:
    for shape in SHAPES:
        lengths = drawn(shape, 10_000)
        budget = max(1024, int(4 * lengths.mean()))
        bins = int(pack(lengths, budget).max()) + 1
        assert lengths.sum() / (bins * budget) >= 0.9, shape


def test_the_gap_to_the_bound_is_below_half_a_percent_in_most_distributions() -> None:
    gaps = []
    for shape in SHAPES:
        lengths = drawn(shape, 10_000)
        bins, bound = int(pack(lengths, 2048).max()) + 1, lower_bound(lengths, 2048)
        assert bins >= bound
        gaps.append(bins / bound - 1)
    assert len(gaps) == 20 and np.median(gaps) <= 0.005
    assert sum(gap == 0 for gap in gaps) >= 10, "as few as can be, proved"


def test_the_bound_is_never_above_the_fewest_bins_there_can_be_and_best_fit_is_rarely_above_it() -> None:
    random = np.random.default_rng(0)
    met = better = 0
    for _ in range(300):
        budget = int(random.integers(5, 40))
        lengths = random.integers(1, budget + 1, int(random.integers(1, 9)))
        exact = fewest(lengths.tolist(), budget)
        bound = lower_bound(lengths, budget)
        assert -(-int(lengths.sum()) // budget) <= bound <= exact <= int(pack(lengths, budget).max()) + 1
        met += bound == exact
        better += bound > -(-int(lengths.sum()) // budget)
    assert met > 280 and better > 30, "it proves more than the sum alone does"


def test_the_bound_sees_what_the_sum_does_not() -> None:
    # Budget 10: a 7 has room for no 4, so three bins of 7 and two for the four 4s; the sum, 37, says 4.
    assert lower_bound(np.array([7, 7, 7, 4, 4, 4, 4]), 10) == 5
    # A bin holds two of 4 at most, so seven of them need 4 bins; the sum, 28, says 3.
    assert lower_bound(np.full(7, 4), 10) == 4
    assert lower_bound(np.array([5, 5, 5]), 10) == 2 and lower_bound(np.array([], dtype=np.int64), 10) == 0


@pytest.mark.parametrize("ranks", [1, 2, 3, 4, 7])
def test_a_step_is_cut_into_as_many_micro_batches_on_every_rank(ranks: int) -> None:
    random = np.random.default_rng(ranks)
    for _ in range(100):
        count, budget = int(random.integers(1, 60)), int(random.integers(1024, 5000))
        lengths = drawn("lognormal", count, seed=int(random.integers(1 << 30)))
        cut = cut_step(lengths, budget, ranks)
        assert len(cut) == ranks and len({len(micro) for micro in cut}) == 1
        assert sorted(itertools.chain(*(places.tolist() for micro in cut for places in micro))) == list(range(count))
        assert max(lengths[places].sum() for micro in cut for places in micro) <= budget
        fewest_bins = int(pack(lengths, budget).max()) + 1
        assert len(cut[0]) == -(-fewest_bins // ranks), "balance costs no micro-batch"


@pytest.mark.parametrize("ranks", [2, 4, 8])
def test_ranks_of_1_000_random_steps_differ_by_no_more_than_the_costliest_item(ranks: int) -> None:
    random = np.random.default_rng(7)
    ours, dealt_in_turn, by_snake = [], [], []
    for _ in range(1000):
        costs = random.lognormal(7, 0.8, ranks * int(random.integers(1, 9)))
        loads = [sum(costs[items]) for items in deal(costs, ranks)]
        assert len({len(items) for items in deal(costs, ranks)}) == 1
        assert max(loads) - min(loads) <= costs.max() + 1e-9
        ours.append(max(loads) / np.mean(loads))
        in_turn = [costs[rank::ranks].sum() for rank in range(ranks)]
        dealt_in_turn.append(max(in_turn) / np.mean(loads))
        there_and_back = [costs[items].sum() for items in snake(np.argsort(-costs).tolist(), ranks)]
        assert max(loads) <= max(there_and_back) + 1e-9
        by_snake.append(max(there_and_back) / np.mean(loads))
    assert np.mean(ours) < np.mean(by_snake) < np.mean(dealt_in_turn)


def test_the_snake_goes_there_and_back() -> None:
    assert snake(list(range(12)), 3) == [[0, 5, 6, 11], [1, 4, 7, 10], [2, 3, 8, 9]]


def test_a_long_sequence_costs_more_than_as_many_tokens_in_short_ones() -> None:
    one, many = cost_of(np.array([8192]))[0], cost_of(np.full(64, 128)).sum()
    assert one == 8192 * 1.5 and many == 8192 * (1 + 128 / 16384)
    cut = cut_step(np.array([4096, 2048, 2048, 1024, 1024, 1024, 1024]), 8192, 2)
    loads = [cost_of(np.array([4096, 2048, 2048, 1024, 1024, 1024, 1024])[micro[0]]).sum() for micro in cut]
    assert max(loads) / min(loads) < 1.1


def test_a_million_lengths_are_packed() -> None:
    lengths = drawn("lognormal", 1_000_000, 2048)
    bins = pack(lengths, 8192)
    assert bins.max() + 1 == lower_bound(lengths, 8192), "and no plan has fewer"
    assert np.bincount(bins, weights=lengths).max() <= 8192


def test_a_sequence_beyond_the_budget_is_a_micro_batch_alone() -> None:
    for ranks in (1, 2):
        cut = cut_step(np.array([3, 25, 4, 11, 3]), 10, ranks)
        held = sorted(micro.tolist() for rank in cut for micro in rank)
        assert [1] in held and [3] in held and sorted(place for micro in held for place in micro) == [0, 1, 2, 3, 4]


def test_a_sequence_beyond_the_budget_is_a_defect_of_the_caller() -> None:
    with pytest.raises(AssertionError):
        pack(np.array([5, 11]), 10)
