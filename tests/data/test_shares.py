"""Virtual shards of a step are the same micro-batches whichever process asks for them."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from llmtrainer.core.batch import Batch
from llmtrainer.core.share import Share
from llmtrainer.data.budget_source import BudgetSource
from llmtrainer.data.comparison_source import ComparisonSource
from llmtrainer.data.source import DiskSource
from tests.data.compared import compared_store, random_comparisons
from tests.data.worlds import make_store

SHARDS = 5
LENGTHS = [9, 3, 14, 2, 30, 8, 5, 21, 4, 11, 6, 17]
Made = Callable[..., Any]


@pytest.fixture(params=["rows", "sequences", "comparisons"])
def source(request: pytest.FixtureRequest, tmp_path: Path) -> Made:
    """A step of few rows: of five shards one has less than the others, or nothing."""
    random = np.random.default_rng(3)
    if request.param == "comparisons":
        store = compared_store(tmp_path / "store", random_comparisons([(5, 3, 4), (2, 6, 2), (9, 1, 7), (4, 4, 4)]))
        return partial(ComparisonSource, store, pairs_per_step=4, tokens_per_batch=40, seed=1, prefetch=False)
    store = make_store(tmp_path / "store", [random.integers(0, 300, length).tolist() for length in LENGTHS])
    if request.param == "rows":
        return partial(
            DiskSource, store, sequence_length=8, rows_per_step=13, tokens_per_batch=16, seed=1, prefetch=False,
            cache=tmp_path / "plan",
        )
    return partial(
        BudgetSource, store, sequence_length=30, sequences_per_step=12, tokens_per_batch=31, seed=1, prefetch=False,
        cache=tmp_path / "plan",
    )  # fmt: skip


def shown(batches: list[Batch]) -> list[tuple[int, list[list[int]], list[int]]]:
    return [(batch.shard, batch.tokens_BT.tolist(), batch.place_B.tolist()) for batch in batches]


@pytest.mark.parametrize("step", [0, 2])
def test_every_process_gets_the_shards_it_asks_for_and_none_depends_on_who_asks(source: Made, step: int) -> None:
    apart = {part: shown(source(share=Share((part,), SHARDS)).batches(step)) for part in range(SHARDS)}
    assert len({len(found) for found in apart.values()}) == 1, "as many micro-batches in every shard"
    for mine in ((0, 1, 2, 3, 4), (0, 1), (2, 3, 4), (0, 3), (1, 4)):
        found = shown(source(share=Share(mine, SHARDS)).batches(step))
        assert found == [item for part in mine for item in apart[part]]
        assert {shard for shard, _, _ in found} == set(mine)


def test_a_rank_is_the_shard_of_its_number_where_nothing_is_said_of_shards(source: Made) -> None:
    for rank in range(3):
        given, asked = source(rank=rank, world_size=3), source(share=Share((rank,), 3))
        assert shown(given.batches(1)) == shown(asked.batches(1))


def test_a_shard_beyond_all_others_is_padding_alone(source: Made) -> None:
    last, beyond = (source(share=Share((part,), SHARDS)).batches(0) for part in (SHARDS - 1, SHARDS + 1))
    assert len(last) == len(beyond)
    assert all(float(batch.weights_BT.sum()) == 0.0 and batch.input_tokens == 0 for batch in beyond)
    assert all(torch.equal(batch.document_BT, torch.full_like(batch.document_BT, -1)) for batch in beyond)
