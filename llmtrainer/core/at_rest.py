"""A module without dropout and noise for a while."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from torch import nn


@contextmanager
def at_rest(module: nn.Module) -> Iterator[None]:
    """In evaluation mode until the block ends; afterwards the mode is what it was."""
    training = module.training
    module.eval()
    try:
        yield
    finally:
        module.train(training)
