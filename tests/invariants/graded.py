"""Graded texts for the table: comparisons whose better answers have a higher class than the others."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import torch

from llmtrainer.core.batch import HIGH, LOW, Batch
from llmtrainer.training.dataset import Opened, Rows, Setting
from llmtrainer.training.datasets.preferences import Preferences


@dataclass
class GradedRows:
    """Rows, each said to be of a class or of one of two."""

    rows: Rows

    def __getattr__(self, name: str) -> Any:
        return getattr(self.rows, name)

    def batches(self, step: int) -> list[Batch]:
        return [_graded(batch) for batch in self.rows.batches(step)]


def _graded(batch: Batch) -> Batch:
    worse_S = torch.arange(batch.sequences) % 2
    return batch.with_signals({LOW: 2 - 2 * worse_S, HIGH: 4 - 2 * worse_S})


class Graded(Preferences):
    """Of two answers, the better is of class 2 or 3, the worse of class 0 or 1."""

    def opened(self, setting: Setting) -> Opened:
        opened = super().opened(setting)
        assert opened.train is not None
        graded: Any = GradedRows(opened.train)
        return replace(opened, train=graded, signals=(*opened.signals, LOW, HIGH))
