"""Rows of a second source in every step, for an objective that has another one beside it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

import torch
from torch import Tensor

from llmtrainer.core.batch import BESIDE, KEPT, NEVER, TEMPERATURE, Batch
from llmtrainer.core.protocols import Source

_PLACE = 1 << 24
"""Places in a step of the other source's rows begin here: no row shares its random numbers with one of the main's."""
_OWN = (KEPT, NEVER, TEMPERATURE)
"""What changes a log-probability itself is said only of the rows that it is true of."""


class BesideSource:
    """The micro-batches of the main source, then those of the other, all with the signal `beside_S`."""

    def __init__(self, main: Source, other: Source) -> None:
        self.main, self.other = main, other

    @property
    def fingerprint(self) -> str:
        return f"{self.main.fingerprint}+{self.other.fingerprint}"

    def epochs(self, step: int) -> float:
        """Passes over the main source's data."""
        return self.main.epochs(step)

    def batches(self, step: int) -> list[Batch]:
        mine = self.main.batches(step)
        known = {name: value for batch in mine for name, value in batch.signals.items()}
        others = [_moved(_knowing(batch, known)) for batch in self.other.batches(step)]
        both = [*(_marked(batch, 0.0) for batch in mine), *(_marked(batch, 1.0) for batch in others)]
        return sorted(both, key=lambda batch: batch.shard)    # what belongs to one part of the step, side by side

    def close(self) -> None:
        self.main.close()
        self.other.close()


def _marked(batch: Batch, beside: float) -> Batch:
    return batch.with_signals({BESIDE: torch.full((batch.sequences,), beside)})


def _moved(batch: Batch) -> Batch:
    place_BT = None if batch.place_BT is None else batch.place_BT + _PLACE
    return replace(batch, place_B=batch.place_B + _PLACE, place_BT=place_BT)


def _knowing(batch: Batch, known: Mapping[str, Tensor]) -> Batch:
    """The batch with every signal of the main source's, as zeros: nothing of it is read where nothing of it counts."""
    B, T = batch.tokens_BT.shape
    zeros = {}
    for name, value in known.items():
        if name in batch.signals or name in _OWN:
            continue
        letters = name.rpartition("_")[2]
        shape = (batch.sequences,) if letters == "S" else (B, T, *value.shape[2:])
        zeros[name] = torch.zeros(shape, dtype=value.dtype)
    return batch.with_signals(zeros)
