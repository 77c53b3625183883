"""What is known of each learned token of each answer, in its place in a batch and back."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from llmtrainer.core.batch import Batch


def with_row_signals(batch: Batch, rows: Sequence[Mapping[str, NDArray[Any]]]) -> Batch:
    """A batch that knows more. rows: for each of its sequences in order, by the name of the signal, an entry for each
    token of it that counts, in order: [n] or [n, K]. Elsewhere stands 0."""
    found: dict[str, Tensor] = {}
    for name in rows[0] if rows else ():
        first = torch.from_numpy(rows[0][name])
        shape = (*batch.tokens_BT.shape, *first.shape[1:])
        found[name] = torch.zeros(shape, dtype=first.dtype)
        for places, row in zip(places_of(batch), rows, strict=True):
            found[name][places] = torch.from_numpy(row[name])
    return batch.with_signals(found)


def nothing_of(batch: Batch, row: Mapping[str, NDArray[Any]]) -> dict[str, Tensor]:
    """Signals of the names and types of `row` for a batch in which nobody learns anything: 0 everywhere."""
    return {
        name: torch.from_numpy(np.zeros((*batch.tokens_BT.shape, *value.shape[1:]), value.dtype))
        for name, value in row.items()
    }


def read_back(batch: Batch, value_BT: Tensor) -> list[NDArray[Any]]:
    """For each sequence of the batch, the values at its tokens that count, in order."""
    value_BT = value_BT.detach().cpu()
    return [value_BT[places].numpy() for places in places_of(batch)]


def places_of(batch: Batch) -> list[tuple[Tensor, Tensor]]:
    """Row and column of the counting tokens of each sequence, in order."""
    counted_BT = batch.weights_BT > 0
    return [
        tuple((counted_BT & (batch.sequence_BT == sequence)).nonzero().unbind(1))  # type: ignore[misc]
        for sequence in range(batch.sequences)
    ]
