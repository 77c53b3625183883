"""Bins first: the figures that auto_get_size printed, and what its rules promise."""

from __future__ import annotations

import itertools

import numpy as np
import pytest

from llmtrainer.base.errors import UserError
from llmtrainer.data.bins_first import equal_samples, find_steps, plan_steps, rounded_up, worst_fit

LENGTHS = [(37 * i) % 911 + 50 for i in range(1000)]


@pytest.mark.parametrize(
    ("group_size", "batch_size", "budget", "samples"),
    [(8, 64, 4352, (66, 67)), (8, 100, 6464, (100, 100)), (8, 32, 2208, (32, 33)), (32, 32, 128, (32, 33))],
)
def test_the_figures_of_the_old_tool_come_out(
    group_size: int, batch_size: int, budget: int, samples: tuple[int, int]
) -> None:
    assert sum(LENGTHS) == 501_899
    found = find_steps(LENGTHS, group_size, batch_size)
    assert (found.budget, found.samples_per_step) == (budget, samples)


def test_the_budget_is_the_smallest_multiple_of_32_that_gives_enough_sequences() -> None:
    random = np.random.default_rng(2)
    for _ in range(20):
        lengths = random.integers(1, 300, int(random.integers(50, 400))).tolist()
        group_size, batch_size = int(random.integers(1, 5)), int(random.integers(8, 40))
        found = find_steps(lengths, group_size, batch_size)

        def average(budget: int, lengths: list[int] = lengths, group_size: int = group_size) -> float:
            return len(lengths) / -(-len(worst_fit(lengths, budget)) // group_size)

        assert average(found.budget) >= batch_size or found.budget == 2**22
        assert found.budget < 32 or average(found.budget - 32) < batch_size


def test_worst_fit_takes_the_bin_with_most_room_and_gives_a_long_sequence_its_own() -> None:
    bins = worst_fit(LENGTHS, 700)
    loads = [sum(LENGTHS[number] for number in held) for held in bins]
    assert sorted(itertools.chain(*bins)) == list(range(1000))
    assert all(load <= 700 or len(held) == 1 for load, held in zip(loads, bins, strict=True))
    assert any(load > 700 for load in loads)


def test_bins_are_halved_from_the_end_until_steps_are_whole() -> None:
    assert rounded_up([[1, 2, 3], [4], [5, 6]], 4) == [[1, 2, 3], [4], [5], [6]]
    assert rounded_up([[1, 2, 3], [4], [5, 6]], 5) == [[1], [2, 3], [4], [5], [6]]
    assert rounded_up([[1, 2, 3, 4], [5]], 5) == [[1], [3], [5], [4], [2]], "and then single sequences leave"
    assert rounded_up([[1, 2], [3]], 2) == [[1, 2], [3]]
    with pytest.raises(UserError, match="do not fill a step"):
        rounded_up([[1, 2], [3]], 4)


def test_every_sequence_is_in_one_bin_and_every_bin_in_one_step() -> None:
    for group_size in (1, 3, 8, 24):
        found = plan_steps(LENGTHS, 2208, group_size)
        assert len(found.bins) % group_size == 0 and {len(step) for step in found.steps} == {group_size}
        assert sorted(itertools.chain(*found.steps)) == list(range(len(found.bins)))
        assert sorted(itertools.chain(*found.bins)) == list(range(1000))


def test_a_larger_divider_never_makes_steps_less_equal() -> None:
    spreads = []
    for divider in (1, 2, 4):
        least, most = plan_steps(LENGTHS, 4416 // divider, 8 * divider).samples_per_step
        spreads.append(most - least)
    assert spreads == sorted(spreads, reverse=True)


def test_no_exchange_of_the_extreme_steps_would_make_them_more_equal() -> None:
    random = np.random.default_rng(4)
    for _ in range(50):
        group_size = int(random.integers(1, 6))
        counts = random.integers(1, 20, group_size * int(random.integers(1, 9))).tolist()
        steps = equal_samples(counts, group_size)
        totals = [sum(counts[number] for number in step) for step in steps]
        light, heavy = totals.index(min(totals)), len(totals) - 1 - totals[::-1].index(max(totals))
        gap = totals[heavy] - totals[light]
        moved = {counts[b] - counts[a] for a in steps[light] for b in steps[heavy]}
        assert not any(0 < move < gap for move in moved)
