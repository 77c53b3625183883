"""Which products of matrices run within a test."""

from __future__ import annotations

from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode

PRODUCTS = ("mm", "addmm", "bmm", "baddbmm", "linear", "_linear_pointwise")


class Multiplied(TorchDispatchMode):
    """The shapes of all products that run within, and the types of their factors."""

    def __init__(self) -> None:
        super().__init__()
        self.shapes: set[tuple[Any, ...]] = set()
        self.types: set[torch.dtype] = set()

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        name = func.__name__.split(".")[0]
        if name in PRODUCTS:
            factors = [x for x in args if isinstance(x, torch.Tensor)]
            self.shapes.add((name, *(tuple(x.shape) for x in factors)))
            self.types.update(x.dtype for x in factors)
        return func(*args, **(kwargs or {}))
