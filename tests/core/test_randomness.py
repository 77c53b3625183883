"""Randomness is a function: the same key gives the same mask, another purpose another seed."""

from __future__ import annotations

import math

import pytest
import torch

from llmtrainer.core.randomness import derive, dropout, embedding_noise


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


def test_noise_on_embeddings_is_uniform_up_to_alpha_over_the_root_of_length_times_width() -> None:
    x_BTD = torch.zeros(2, 60, 50)
    document_BT = torch.tensor([[0] * 40 + [1] * 20, [0] * 10 + [-1] * 50])
    noise_BTD = embedding_noise(x_BTD, 5.0, 3, document_BT, torch.tensor([0, 1]))
    for row, part, length in ((0, slice(0, 40), 40), (0, slice(40, 60), 20), (1, slice(0, 10), 10)):
        bound = 5.0 / math.sqrt(length * 50)
        found = noise_BTD[row, part] / bound
        assert found.abs().max() <= 1.0 and abs(float(found.mean())) < 0.1
        assert abs(float(found.square().mean()) - 1 / 3) < 0.05
    assert not noise_BTD[1, 10:].any()


def test_noise_on_embeddings_is_a_function_of_the_step_and_of_the_place_of_the_row() -> None:
    x_BTD, document_BT = torch.randn(3, 4, 8), torch.zeros(3, 4, dtype=torch.int64)

    def noisy(key: int, places: list[int]) -> torch.Tensor:
        rows = slice(0, len(places))
        return embedding_noise(x_BTD[rows], 5.0, key, document_BT[rows], torch.tensor(places)) - x_BTD[rows]

    whole = noisy(1, [0, 1, 2])
    assert torch.equal(noisy(1, [0, 1])[:2], whole[:2])
    assert not torch.equal(noisy(2, [0, 1, 2]), whole) and not torch.equal(whole[0], whole[1])
