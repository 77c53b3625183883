"""Other values in the place of a model's own, for a while."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor


@contextmanager
def exchanged(tensors: Sequence[Tensor], others: Sequence[Tensor]) -> Iterator[None]:
    """Until the block ends, the first have the values of the second, and the second those of the first."""
    _exchange(tensors, others)
    try:
        yield
    finally:
        _exchange(tensors, others)


@torch.no_grad()
def _exchange(tensors: Sequence[Tensor], others: Sequence[Tensor]) -> None:
    # Values, not storage: an optimizer, a graph or a compiled kernel may hold on to the storage.
    for tensor, other in zip(tensors, others, strict=True):
        held = tensor.detach().clone()
        tensor.copy_(other)
        other.copy_(held)
