"""Which rows each step draws: a function of (seed, step), with nothing to save."""

from __future__ import annotations

from functools import lru_cache

import numpy as np
from numpy.typing import NDArray

from llmtrainer.base.units import Pace
from llmtrainer.core.randomness import derive
from llmtrainer.data.permutation import Permutation


class Draws:
    """Step n owns draws n*R .. (n+1)*R - 1; draw d is row `order(d mod P)` of epoch d div P, in an order of that
    epoch alone (or, unshuffled, in the order of the data)."""

    def __init__(self, rows_per_epoch: int, rows_per_step: int, seed: int, shuffle: bool = True) -> None:
        assert rows_per_epoch > 0 and rows_per_step > 0
        self.rows_per_epoch, self.rows_per_step, self.shuffle = rows_per_epoch, rows_per_step, shuffle
        self._order = lru_cache(4)(lambda epoch: Permutation(rows_per_epoch, derive(seed, "order", epoch)))

    def of_step(self, step: int) -> list[tuple[int, int]]:
        """(epoch, row) at each place of a step, of all ranks."""
        epochs, rows = self.of_steps(step, step + 1)
        return list(zip(epochs[0].tolist(), rows[0].tolist(), strict=True))

    def of_steps(self, first: int, stop: int) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """Epoch and row at every place of steps first..stop, both [steps, R]."""
        assert 0 <= first <= stop
        draws = np.arange(first * self.rows_per_step, stop * self.rows_per_step, dtype=np.int64)
        epochs, places = np.divmod(draws, self.rows_per_epoch)
        rows = places.copy()
        if self.shuffle:
            for epoch in np.unique(epochs):
                rows[epochs == epoch] = self._order(int(epoch))[places[epochs == epoch]]
        return epochs.reshape(-1, self.rows_per_step), rows.reshape(-1, self.rows_per_step)

    @property
    def steps_per_epoch(self) -> float:
        return self.rows_per_epoch / self.rows_per_step

    def pace(self, tokens_per_row: float) -> Pace:
        """A step in epochs and tokens."""
        return Pace(epochs=1.0 / self.steps_per_epoch, tokens=tokens_per_row * self.rows_per_step)

    def epochs(self, step: int) -> float:
        """Passes over the data after so many steps. One division of whole numbers: a whole epoch is exact."""
        return step * self.rows_per_step / self.rows_per_epoch
