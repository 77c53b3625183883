"""Activations that are computed again in backward instead of being kept."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Literal, NamedTuple

from torch import Tensor
from torch.utils.checkpoint import checkpoint


class Recompute(NamedTuple):
    """Which activations are computed again in backward instead of being kept."""

    every: int = 1
    """Of every so-manyth block, the first included."""
    what: Literal["layer", "mlp"] = "layer"
    """The whole block, or what follows its attention."""


def call(function: Callable[..., Tensor], *inputs: Any) -> Tensor:
    return function(*inputs)


def again(function: Callable[..., Tensor], *inputs: Any) -> Tensor:
    """The function's value, of which nothing is kept for backward but the inputs: it is computed again there.
    Nothing in a block draws random numbers, so the second time gives the same bits."""
    return checkpoint(function, *inputs, use_reentrant=False, preserve_rng_state=False)  # type: ignore[no-any-return]
