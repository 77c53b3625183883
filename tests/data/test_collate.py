"""Rows -> Batch, against a restatement in plain Python."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from llmtrainer.data.collate import Row, collate, filler

rows_of_lengths = st.lists(st.lists(st.integers(1, 6), min_size=1, max_size=4), min_size=1, max_size=4)


def row_of(lengths: list[int], place: int = 0) -> Row:
    document = np.repeat(np.arange(len(lengths), dtype=np.int32), lengths)
    return Row(np.arange(10, 10 + len(document)), document, place)


@given(rows_of_lengths)
def test_every_tensor_says_what_the_batch_promises(rows: list[list[int]]) -> None:
    batch = collate([row_of(lengths, place) for place, lengths in enumerate(rows)])
    T = max(1, max(sum(lengths) - 1 for lengths in rows))
    assert batch.tokens_BT.shape == (len(rows), T)
    sequence = -1
    for b, lengths in enumerate(rows):
        flat = [(document, place) for document, length in enumerate(lengths) for place in range(length)]
        for t in range(T):
            if t >= len(flat) - 1:
                padding = [batch.weights_BT[b, t], batch.position_BT[b, t], batch.document_BT[b, t]]
                assert padding == [0, 0, -1] and batch.sequence_BT[b, t] == -1
                continue
            (document, place), (next_document, _) = flat[t], flat[t + 1]
            sequence += place == 0
            assert batch.tokens_BT[b, t] == 10 + t and batch.targets_BT[b, t] == 11 + t
            assert batch.weights_BT[b, t] == float(document == next_document)
            assert batch.document_BT[b, t] == document and batch.position_BT[b, t] == place
            assert batch.sequence_BT[b, t] == sequence
    assert batch.sequences == sequence + 1
    assert batch.input_tokens == sum(sum(lengths) - 1 for lengths in rows)
    assert batch.place_B.tolist() == list(range(len(rows)))


def test_types_are_those_of_the_batch() -> None:
    batch = collate([row_of([3, 2])])
    types = [batch.tokens_BT, batch.targets_BT, batch.weights_BT, batch.document_BT, batch.position_BT,
             batch.sequence_BT, batch.place_B]  # fmt: skip
    assert [item.dtype for item in types] == [
        torch.int64, torch.int64, torch.float32, torch.int32, torch.int32, torch.int32, torch.int64
    ]  # fmt: skip


def test_unsigned_ids_of_a_store_do_not_wrap() -> None:
    row = Row(np.array([65_535, 40_000, 3], dtype=np.uint16), np.zeros(3, dtype=np.int32), 0)
    assert collate([row]).tokens_BT.tolist() == [[65_535, 40_000]]


def test_a_filler_row_is_padding_alone() -> None:
    batch = collate([filler(7)])
    assert batch.document_BT.tolist() == [[-1]] and batch.weights_BT.tolist() == [[0.0]]
    assert batch.sequences == 0 and batch.input_tokens == 0 and batch.place_B.tolist() == [7]


@pytest.mark.parametrize("lengths", [[1, 1, 1], [1], [5, 1]])
def test_a_token_is_never_the_target_of_another_document(lengths: list[int]) -> None:
    assert collate([row_of(lengths)]).weights_BT.sum() == sum(length - 1 for length in lengths)
