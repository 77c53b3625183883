"""Randomness is a function: the same key gives the same mask, another purpose another seed."""

from __future__ import annotations

import pytest
import torch

from llmtrainer.core.randomness import derive, dropout


def test_a_seed_depends_on_every_part_of_its_purpose() -> None:
    seeds = {derive(1), derive(2), derive(1, "step", 1), derive(1, "step", 2), derive(1, "step1"), derive(1, "a", "b")}
    assert len(seeds) == 6 and all(0 <= seed < 2**62 for seed in seeds)
    assert derive(1, "step", 1) == derive(1, "step", 1)


def test_dropout_keeps_the_given_share_and_the_mean() -> None:
    x = torch.ones(4, 64, 256)
    dropped = dropout(x, 0.25, derive(0, "step", 3), torch.arange(4), site=2)
    assert float((dropped == 0).float().mean()) == pytest.approx(0.25, abs=0.01)
    assert float(dropped.mean()) == pytest.approx(1.0, abs=0.02)


def test_a_mask_is_the_rows_own_whatever_stands_beside_it() -> None:
    x, key = torch.ones(3, 8, 16), derive(0, "step", 3)
    together = dropout(x, 0.5, key, torch.tensor([5, 9, 70_000]), site=1)
    alone = dropout(x[:1], 0.5, key, torch.tensor([9]), site=1)
    assert torch.equal(together[1:2], alone)
    assert not torch.equal(together[0], together[1])
    assert not torch.equal(alone, dropout(x[:1], 0.5, key, torch.tensor([9]), site=2))
    assert not torch.equal(alone, dropout(x[:1], 0.5, derive(0, "step", 4), torch.tensor([9]), site=1))


def test_a_shorter_row_has_the_same_mask_as_far_as_it_goes() -> None:
    x, key = torch.ones(1, 8, 16), derive(0, "step", 3)
    whole = dropout(x, 0.5, key, torch.tensor([2]), site=0)
    assert torch.equal(whole[:, :5], dropout(x[:, :5], 0.5, key, torch.tensor([2]), site=0))
