"""A batch by hand: what is counted, and sums over sequences."""

from __future__ import annotations

from dataclasses import replace

import torch

from llmtrainer.core.batch import Batch
from llmtrainer.core.objective import count
from tests.worlds import row_batch


def packed() -> Batch:
    """One row of two trained sequences of 2 and 3 tokens after a shared token, then padding."""
    batch = row_batch([[0] * 8])
    return replace(
        batch,
        document_BT=torch.tensor([[0, 0, 0, 0, 0, 0, -1]], dtype=torch.int32),
        sequence_BT=torch.tensor([[-1, 0, 0, 1, 1, 1, -1]], dtype=torch.int32),
        weights_BT=torch.tensor([[0.0, 1.0, 1.0, 1.0, 0.0, 2.0, 0.0]]),
    )


def test_units_are_counted_before_the_forward_pass() -> None:
    assert count([packed(), packed()]) == {"tokens": 10.0, "sequences": 4.0, "pairs": 2.0, "batches": 2.0}
    assert packed().input_tokens == 6


def test_sums_and_means_by_sequence_are_weighted() -> None:
    value_BT = torch.tensor([[9.0, 1.0, 3.0, 2.0, 50.0, 5.0, 9.0]])
    assert packed().sum_by_sequence(value_BT).tolist() == [4.0, 12.0]
    assert packed().mean_by_sequence(value_BT).tolist() == [2.0, 4.0]


def test_a_sequence_without_weight_has_mean_zero_and_no_nan() -> None:
    batch = replace(packed(), weights_BT=torch.zeros(1, 7))
    assert batch.mean_by_sequence(torch.ones(1, 7)).tolist() == [0.0, 0.0]
