"""A batch of one long row with padding behind it, where every length of its own would cost memory for good."""

from __future__ import annotations

from dataclasses import replace

import torch
import torch.nn.functional as F

from llmtrainer.core.batch import GATES, Batch
from llmtrainer.core.few_shapes import costs_by_shape, rounded


def with_few_shapes(batch: Batch, compute: torch.dtype, always: bool = False) -> Batch:
    """What a stack reads: the batch, or one whose row [1, T] ends in padding, so that T is one of few. `always`: also
    where a shape costs nothing by itself.

    Rows end to end are as long as what they hold; several rows are padded to a common length already, and rows of
    text have one length throughout a run. No token sees padding, so each comes to what it would without. Signals
    that a stack does not read are left out.
    """
    B, T = batch.tokens_BT.shape
    few = always or costs_by_shape(batch.tokens_BT.device, compute)
    more = rounded(T) - T if B == 1 and few else 0
    if not more:
        return batch
    behind = (0, more)
    gates = {name: F.pad(value, (0, 0, *behind), value=-1) for name, value in batch.signals.items() if name == GATES}
    return replace(
        batch, tokens_BT=F.pad(batch.tokens_BT, behind), targets_BT=F.pad(batch.targets_BT, behind),
        weights_BT=F.pad(batch.weights_BT, behind), document_BT=F.pad(batch.document_BT, behind, value=-1),
        position_BT=F.pad(batch.position_BT, behind), sequence_BT=F.pad(batch.sequence_BT, behind, value=-1),
        place_BT=None if batch.place_BT is None else F.pad(batch.place_BT, behind), signals=gates,
    )
