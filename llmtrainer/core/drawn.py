"""The distribution that targets were drawn from, where that was not the plain softmax over all ids."""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from llmtrainer.core.batch import KEPT, NEVER, TEMPERATURE, Batch

_IMPOSSIBLE = -1e30
"""The logit of an id that could not be drawn. Finite, and far from the largest float: an entropy and its gradient
multiply by it, and 0 times infinity is no number."""


class Drawn(NamedTuple):
    """How the targets of some positions were drawn, where that was not from the plain softmax over all ids."""

    temperature_N: Tensor | None
    never_K: Tensor | None
    kept_NW: Tensor | None
    """Bits of the ids that a target was drawn from (see core/batch.py)."""

    @classmethod
    def of(cls, batch: Batch, chosen_N: Tensor | None) -> Drawn | None:
        """What a batch says of it; None: nothing."""
        if not {TEMPERATURE, NEVER, KEPT} & batch.signals.keys():
            return None
        of_tokens = [batch.signals.get(name) for name in (TEMPERATURE, KEPT)]
        temperature_N, kept_NW = (None if signal is None else _of(signal, chosen_N) for signal in of_tokens)
        return cls(temperature_N, batch.signals.get(NEVER), kept_NW)

    def padded(self, more: int) -> Drawn:
        """With so many positions behind, which were drawn from all ids."""
        temperature_N = None if self.temperature_N is None else F.pad(self.temperature_N, (0, more), value=1.0)
        kept_NW = None if self.kept_NW is None else F.pad(self.kept_NW, (0, 0, 0, more), value=255)
        return Drawn(temperature_N, self.never_K, kept_NW)

    def narrowed(self, logits: Tensor, part: slice) -> Tensor:
        """Logits of the distribution that the targets were drawn from, in float32 or wider: divided by the
        temperature, and as good as impossible where an id was not kept."""
        # As the sampler does it: a quotient in 16 bits would be another distribution.
        logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
        if self.temperature_N is not None:
            logits = logits / self.temperature_N[part, None].to(logits.dtype)
        if self.never_K is not None:
            logits = logits.index_fill(1, self.never_K, _IMPOSSIBLE)
        if self.kept_NW is not None:
            bit = torch.arange(8, dtype=torch.uint8, device=logits.device)
            kept_NV = (self.kept_NW[part, :, None] >> bit & 1).flatten(1)[:, : logits.shape[1]].bool()
            logits = logits.masked_fill(~kept_NV, _IMPOSSIBLE)
        return logits

    def unnarrowed(self, gradient: Tensor, part: slice, dtype: torch.dtype) -> Tensor:
        """The gradient of the logits as they were, given that of the narrowed ones."""
        if self.temperature_N is not None:
            gradient = gradient / self.temperature_N[part, None].to(gradient.dtype)
        return gradient.to(dtype)


def _of(signal_BT: Tensor, chosen_N: Tensor | None) -> Tensor:
    """The chosen positions of all rows, of all where none are chosen."""
    flat = signal_BT.flatten(0, 1)
    return flat if chosen_N is None else flat.index_select(0, chosen_N)
