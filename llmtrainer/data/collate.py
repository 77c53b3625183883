"""Rows of tokens -> Batch: shifted, padded to the longest row, documents and sequences numbered."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from llmtrainer.core.batch import GATES, Batch


@dataclass(frozen=True)
class Row:
    """n + 1 tokens of one or several documents, of which n are read and n are targets."""

    tokens: NDArray[Any]
    """Ids, [n + 1]."""
    document: NDArray[np.int32]
    """Which document of the row each token belongs to, ascending from 0: [n + 1]."""
    place: int
    """Place of the row in its optimizer step."""
    counts: NDArray[np.float32] | None = None
    """How much each token counts where something announces it, [n + 1]. None: 1."""
    gates: NDArray[np.int64] | None = None
    """The number of the row's gate in each group of a mixture of adapters, [G]. None: nobody asks."""

    @property
    def inputs(self) -> int:
        """n, the tokens the model reads."""
        return len(self.tokens) - 1

    @property
    def weights(self) -> NDArray[np.float32]:
        """How much each token counts as a target, [n + 1]: 0 for the first token of a document, which nothing of
        its own document announces."""
        weights = np.zeros(len(self.tokens), dtype=np.float32)
        weights[1:] = self.document[1:] == self.document[:-1]
        return weights if self.counts is None else weights * self.counts.astype(np.float32)

    @property
    def positions(self) -> NDArray[np.int32]:
        """Place of each token in its document's part of this row, [n + 1]: restarts at 0 with every document."""
        index = np.arange(len(self.tokens), dtype=np.int32)
        first = np.zeros_like(index)
        first[1:] = np.where(self.document[1:] != self.document[:-1], index[1:], 0)
        return index - np.maximum.accumulate(first)

    def shown(self) -> dict[str, list[Any]]:
        """The row as the model sees it: `tokens` (n + 1 of them), and for each how much it counts as a target
        (`weights`), its place in its document (`positions`) and the number of its `document` in the row."""
        return {
            "tokens": self.tokens.tolist(),
            "weights": self.weights.tolist(),
            "positions": self.positions.tolist(),
            "document": self.document.tolist(),
        }


def collate(rows: Sequence[Row]) -> Batch:
    """One Batch of B rows, T the longest; padding has document -1, sequence -1, position 0 and weight 0.

    A row that reads nothing (`filler`) becomes a row of padding, so that a rank without rows still takes part.
    """
    B, T = len(rows), max(1, *(row.inputs for row in rows)) if rows else 1
    tokens, targets = np.zeros((B, T), dtype=np.int64), np.zeros((B, T), dtype=np.int64)
    weights, position = np.zeros((B, T), dtype=np.float32), np.zeros((B, T), dtype=np.int32)
    document, sequence = np.full((B, T), -1, dtype=np.int32), np.full((B, T), -1, dtype=np.int32)
    sequences, G = 0, _groups(rows)
    gates = np.full((B, T, G), -1, dtype=np.int64)
    for b, row in enumerate(rows):
        n = row.inputs
        if n == 0:
            continue
        tokens[b, :n], targets[b, :n] = row.tokens[:-1], row.tokens[1:]
        weights[b, :n], position[b, :n] = row.weights[1:], row.positions[:-1]
        if row.gates is not None:
            gates[b, :n] = row.gates
        document[b, :n] = row.document[:-1]
        sequence[b, :n] = row.document[:-1] + sequences
        sequences = int(sequence[b, n - 1]) + 1
    return Batch(
        tokens_BT=torch.from_numpy(tokens),
        targets_BT=torch.from_numpy(targets),
        weights_BT=torch.from_numpy(weights),
        document_BT=torch.from_numpy(document),
        position_BT=torch.from_numpy(position),
        sequence_BT=torch.from_numpy(sequence),
        place_B=torch.tensor([row.place for row in rows], dtype=torch.int64),
        signals={GATES: torch.from_numpy(gates)} if G else {},
    )


def end_to_end(rows: Sequence[Row]) -> Batch:
    """One row [1, T] of several rows of one document each, without padding: T is what they read together.

    Each token keeps the place of the row that it came in, so that dropout does not depend on who shares the batch.
    """
    assert all(row.inputs and not row.document.any() for row in rows)
    G = _groups(rows)

    def joined(parts: Sequence[NDArray[Any]], dtype: type) -> torch.Tensor:
        return torch.from_numpy(np.concatenate(parts).astype(dtype)[None])

    gates = [np.tile(row.gates, (row.inputs, 1)) for row in rows if row.gates is not None]
    number_BT = joined([np.full(row.inputs, number) for number, row in enumerate(rows)], np.int32)
    return Batch(
        tokens_BT=joined([row.tokens[:-1] for row in rows], np.int64),
        targets_BT=joined([row.tokens[1:] for row in rows], np.int64),
        weights_BT=joined([row.weights[1:] for row in rows], np.float32),
        document_BT=number_BT,
        position_BT=joined([row.positions[:-1] for row in rows], np.int32),
        sequence_BT=number_BT.clone(),
        place_B=torch.tensor([rows[0].place], dtype=torch.int64),
        place_BT=joined([np.full(row.inputs, row.place) for row in rows], np.int64),
        signals={GATES: joined(gates, np.int64)} if G else {},
    )


def filler(place: int, groups: int = 0) -> Row:
    """A row of nothing: one token of padding with weight 0; beside rows with gates, with none of each group open."""
    gates = np.full(groups, -1, dtype=np.int64) if groups else None
    return Row(np.zeros(1, dtype=np.int64), np.zeros(1, dtype=np.int32), place, gates=gates)


def _groups(rows: Sequence[Row]) -> int:
    """G, how many gates each row names; 0 where none is asked for."""
    found = {0 if row.gates is None else len(row.gates) for row in rows}
    assert len(found) <= 1, "rows with gates and rows without in one batch"
    return next(iter(found), 0)
