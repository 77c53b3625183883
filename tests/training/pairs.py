"""Comparisons for runs: pairs of answers as a dataset of its own, of which the better holds a planted token."""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from llmtrainer.base.units import Pace
from llmtrainer.core.batch import GROUP, HIGH, LOW, MARGIN, Batch
from llmtrainer.core.protocols import Engine
from llmtrainer.data.collate import Row, end_to_end
from llmtrainer.data.packed import Store
from llmtrainer.training.dataset import Dataset, Opened, Setting
from tests.data.worlds import make_store

GOOD, BAD = 7, 9
"""Of two answers, the one with more of the first than of the second is the better."""


def planted(count: int, seed: int) -> list[list[int]]:
    """Better and worse answers in turn, each behind a prompt that both have."""
    draw = random.Random(seed)
    rows = []
    for _ in range(count):
        prompt = [draw.randrange(20, 250) for _ in range(draw.randint(2, 6))]
        for kind in (GOOD, BAD):
            answer = [draw.randrange(20, 250) for _ in range(draw.randint(2, 12))]
            for _ in range(2):
                answer.insert(draw.randrange(len(answer)), kind)
            rows.append([*prompt, *answer])
    return rows


def make_pairs(folder: Path, train: int = 400, held_out: int = 100) -> Path:
    """A folder with the two stores."""
    make_store(folder / "train", planted(train, 1), vocabulary=320)
    make_store(folder / "held_out", planted(held_out, 2), vocabulary=320)
    return folder


@dataclass
class PairRows:
    """Sequences 2i and 2i + 1 of a store are pair i."""

    store: Store
    pairs_per_step: int
    pairs_per_batch: int
    grades: int

    def __post_init__(self) -> None:
        self.rows_per_step = 2 * self.pairs_per_step
        self.fingerprint = f"{self.store.fingerprint} {self.pairs_per_step}"

    @property
    def pairs(self) -> int:
        return self.store.documents // 2

    @property
    def pace(self) -> Pace:
        return Pace(epochs=1 / self.steps_per_epoch)

    @property
    def steps_per_epoch(self) -> float:
        return self.pairs / self.pairs_per_step

    def epochs(self, step: int) -> float:
        return step / self.steps_per_epoch

    def batches(self, step: int) -> list[Batch]:
        chosen = [(step * self.pairs_per_step + n) % self.pairs for n in range(self.pairs_per_step)]
        cuts = range(0, len(chosen), self.pairs_per_batch)
        return [self._batch(chosen[cut : cut + self.pairs_per_batch], 2 * cut) for cut in cuts]

    def _batch(self, pairs: Sequence[int], first: int) -> Batch:
        documents = [2 * pair + side for pair in pairs for side in (0, 1)]
        rows = [self._row(document, first + n) for n, document in enumerate(documents)]
        batch = end_to_end(rows)
        worse_S = torch.arange(len(documents)) % 2
        # A good answer has the highest grade, a bad one one of the two lowest.
        top = self.grades - 1
        return batch.with_signals({
            GROUP: torch.arange(len(documents)) // 2, MARGIN: torch.full((len(documents),), 0.1),
            LOW: top * (1 - worse_S), HIGH: 1 + top * (1 - worse_S) + worse_S,
        })  # fmt: skip

    def _row(self, document: int, place: int) -> Row:
        """A document of which every token is read: nothing follows the last."""
        tokens = np.append(self.store.read(document).astype(np.int64), 0)
        counts = np.ones(len(tokens), dtype=np.float32)
        counts[-1] = 0.0
        return Row(tokens, np.zeros(len(tokens), dtype=np.int32), place, counts)

    def row(self, step: int, place: int) -> dict[str, list[Any]]:
        raise NotImplementedError

    def close(self) -> None:
        pass


class Pairs(Dataset):
    """The two stores of a folder."""

    path: str = ""
    """Where they lie."""
    pairs_per_step: int = 8
    """Pairs of one step."""
    pairs_per_batch: int = 8
    """Pairs of one micro-batch."""
    grades: int = 4
    """Classes of a graded answer."""

    def opened(self, setting: Setting) -> Opened:
        engine: Engine = setting.engine
        assert engine.world_size == 1
        train, held_out = (Store(Path(self.path) / part) for part in ("train", "held_out"))
        rows = PairRows(train, self.pairs_per_step, self.pairs_per_batch, self.grades)
        measured = PairRows(held_out, held_out.documents // 2, self.pairs_per_batch, self.grades)
        return Opened(rows, lambda: {"held_out": measured}, signals=(GROUP, MARGIN, LOW, HIGH))
