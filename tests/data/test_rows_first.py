"""Rows first: what is promised of a budget is what training does with it."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from llmtrainer.base.errors import UserError
from llmtrainer.data.budget import lower_bound, pack
from llmtrainer.data.budget_source import BudgetSource
from llmtrainer.data.draws import Draws
from llmtrainer.data.rows_first import (
    DIVIDERS,
    SPREAD,
    bins_of_steps,
    drawn_lengths,
    find_plan,
    plan_of,
    smallest_budget,
)  # fmt: skip
from tests.data.test_budget import slow_best_fit
from tests.data.worlds import counting, make_store

LENGTHS = np.array([(37 * i) % 911 + 50 for i in range(1000)])


def test_all_steps_at_once_open_the_bins_that_each_opens_alone() -> None:
    lengths = np.clip(np.random.default_rng(0).lognormal(5, 1, 5000), 1, 1024).astype(np.int64)
    for batch_size, budget in ((1, 1024), (7, 1024), (37, 1300), (64, 9000)):
        drawn = drawn_lengths(lengths, batch_size, seed=3)
        alone = [int(pack(step, budget).max()) + 1 for step in drawn]
        assert bins_of_steps(drawn, budget).tolist() == alone


def test_a_plan_says_what_training_does(tmp_path: Path) -> None:
    found = find_plan(LENGTHS, group_size=8, batch_size=32, max_length=1024, seed=5)
    store = make_store(tmp_path / "store", counting((LENGTHS + 1).tolist()), vocabulary=600_000, shard_tokens=10**6)

    def micro_batches(budget: int, ranks: int = 1) -> list[int]:
        source = BudgetSource(
            store, sequence_length=960, sequences_per_step=32, tokens_per_batch=budget, seed=5, world_size=ranks,
            prefetch=False,
        )  # fmt: skip
        assert len(source.draws(3)) == 32
        return [sum(map(len, source.cut(step))) for step in range(32)]

    counts = micro_batches(found.budget)
    assert found.samples_per_step == (32, 32) and found.micro_batches == (min(counts), max(counts))
    assert (found.bins, max(counts)) == (sum(counts), 8)
    assert max(micro_batches(found.budget - 32)) == 9, "no smaller budget will do"
    assert max(micro_batches(found.budget, ranks=4)) == 8, "nor does it matter how many ranks share them"


@pytest.mark.parametrize(("group_size", "batch_size"), [(8, 32), (3, 20), (2, 50)])
def test_budget_and_divider_are_those_that_trying_all_would_find(group_size: int, batch_size: int) -> None:
    lengths = LENGTHS[:200]
    drawn = drawn_lengths(lengths, batch_size, seed=0)
    legal = {}
    for divider in DIVIDERS:
        budget = 32 * -(-int(drawn.max()) // 32)
        while max(slow_best_fit(step.tolist(), budget) for step in drawn) > group_size * divider:
            budget += 32
        samples = {len(step) for step in drawn.tolist()}
        if max(samples) - min(samples) <= SPREAD and budget >= 1024:
            legal[divider] = budget
    found = find_plan(lengths, group_size, batch_size, 1024, seed=0)
    assert (found.divider, found.budget) == min(legal.items())


def test_a_micro_batch_below_the_longest_sequence_is_refused_with_what_would_do() -> None:
    with pytest.raises(UserError, match="micro-batches of 960 tokens, below max_length, 1,024") as error:
        find_plan(LENGTHS, 32, 32, 1024, seed=0)
    assert "group_size=16" in str(error.value.fix) and "batch_size=64" in str(error.value.fix)
    assert find_plan(LENGTHS, 16, 32, 1024, seed=0).budget >= 1024 <= find_plan(LENGTHS, 32, 64, 1024, seed=0).budget
    with pytest.raises(UserError, match="11 of 1,000 sequences are longer than max_length, 950"):
        find_plan(np.where(LENGTHS > 950, 960, LENGTHS), 8, 32, 950, seed=0)


def test_fill_and_bound_are_those_of_the_steps() -> None:
    drawn = drawn_lengths(LENGTHS, 25, seed=1)
    found = plan_of(drawn, 2048)
    assert found.bins == sum(int(pack(step, 2048).max()) + 1 for step in drawn)
    assert found.lower_bound == sum(lower_bound(step, 2048) for step in drawn) <= found.bins
    assert found.fill == LENGTHS.sum() / (2048 * found.bins)


def test_a_million_lengths_are_planned() -> None:
    lengths = np.clip(np.random.default_rng(0).lognormal(5, 1, 1_000_000), 1, 2048).astype(np.int64)
    drawn = drawn_lengths(lengths, 64, seed=0)
    assert drawn.shape == (15_625, 64) and (np.diff(drawn, axis=1) <= 0).all()
    assert smallest_budget(drawn, 8) >= drawn.sum(axis=1).max() / 8


def test_draws_are_those_of_each_step_alone() -> None:
    draws = Draws(10, 4, seed=1)
    epochs, rows = draws.of_steps(0, 5)
    assert epochs.ravel().tolist() == [0] * 10 + [1] * 10
    assert sorted(rows.ravel()[:10]) == sorted(rows.ravel()[10:]) == list(range(10))
    for step in range(5):
        assert draws.of_steps(step, step + 1)[1].tolist() == [rows[step].tolist()]
