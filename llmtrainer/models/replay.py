"""One more token of every row as a CUDA graph: hundreds of kernels at the cost of one launch."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from llmtrainer.core.graphs import Graphs, Record
from llmtrainer.models.reading import Store, attend_one, through, turns


class OneEach:
    """One new token of each row: every tensor it consists of, so that a recording can be given other ones."""

    more = 0

    def __init__(self, store: Store, token_B: Tensor, capacity: int) -> None:
        """capacity: places of each row that are looked at; all rows are shorter."""
        weights, before_B = store.weights, store.lengths_B
        device = before_B.device
        self.keys, self.places = slice(0, capacity), store.places()
        self.tokens_N, self.tokens = token_B, len(token_B)
        self.last_B = torch.arange(len(token_B), device=device)
        self.slots = store.slots(self.last_B, before_B)
        self.cos, self.sin = turns(weights, before_B, store.longest)
        place_S = torch.arange(capacity, device=device)
        hidden_BS = place_S > before_B[:, None]
        if weights.window is not None:
            hidden_BS |= place_S <= before_B[:, None] - weights.window
        zeros = torch.zeros(hidden_BS.shape, dtype=weights.compute, device=device)
        self.hidden_B11S = zeros.masked_fill_(hidden_BS, -torch.inf)[:, None, None]

    def attend(self, q_NHC: Tensor, k_BKSC: Tensor, v_BKSC: Tensor) -> Tensor:
        return attend_one(q_NHC, k_BKSC, v_BKSC, self.keys, self.hidden_B11S)

    @property
    def inputs(self) -> list[Tensor]:
        """What differs from step to step."""
        return [self.tokens_N, *self.slots, self.cos, self.sin, self.hidden_B11S, *self.places]


class _Recording(NamedTuple):
    step: OneEach
    """The one that was recorded: its tensors are read again each time."""
    again: Callable[[], Tensor]


class Recordings:
    """Steps of one memory, each recorded once for every number of rows and of places that are looked at.

    A size that occurs once only is never recorded: that would take longer than the step itself. The memory and the
    weights must stay where they are; who moves them calls `forget`.
    """

    def __init__(self, record: Record) -> None:
        self._record = record
        self._recordings: dict[tuple[int, int], _Recording] = {}
        self._met: set[tuple[int, int]] = set()

    def forget(self) -> None:
        self._recordings.clear()

    def read(self, store: Store, step: OneEach) -> Tensor:
        """Logits [B, V] of what follows each row's new token; a copy, which the next step leaves alone."""
        size = step.tokens, step.keys.stop
        if size not in self._met:
            self._met.add(size)
            return through(store, step, step.last_B)
        if size not in self._recordings:
            self._recordings[size] = _Recording(step, self._record(lambda: through(store, step, step.last_B)))
        recording = self._recordings[size]
        if recording.step is not step:
            torch._foreach_copy_(recording.step.inputs, step.inputs)
        return recording.again().clone()


def recordings(device: torch.device) -> Recordings | None:
    """Where steps are worth being recorded; None elsewhere."""
    return Recordings(Graphs()) if device.type == "cuda" else None
