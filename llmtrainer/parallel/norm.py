"""How large all gradients are together: fast, or the same to the last bit wherever their rows are."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor


def global_norm(gradients: Sequence[Tensor], device: torch.device) -> Tensor:
    """L2 norm over all gradients, a float64 scalar: squares of large float32 gradients do not overflow.

    On a CPU the last axis is reduced in the gradients' own type and only what is left in float64: a ninth of the
    time, and the same to nine digits. Where such squares could leave their type's range, it is not done so.
    """
    wide = torch.float32 if device.type == "mps" else torch.float64  # MPS has no float64
    if not gradients:
        return torch.zeros((), dtype=wide, device=device)
    if device.type == "cpu":
        rows = [torch.linalg.vector_norm(gradient, dim=-1) if gradient.ndim else gradient for gradient in gradients]
        norm = torch.linalg.vector_norm(torch.stack([torch.linalg.vector_norm(row, dtype=wide) for row in rows]))
        if _NARROW_NORMS[0] < float(norm) < _NARROW_NORMS[1]:
            return norm
    return torch.linalg.vector_norm(torch.stack(torch._foreach_norm(list(gradients), 2.0, dtype=wide)))


def exact_norm(rows: Callable[[torch.dtype | None], Tensor]) -> Tensor:
    """L2 norm, a float64 scalar, of the norms of all gradients' rows along their last axis, which no engine cuts, in
    one fixed order. `rows` works them out in a type, None: the gradients' own."""
    norm = torch.linalg.vector_norm(rows(None))
    if _NARROW_NORMS[0] < float(norm) < _NARROW_NORMS[1]:
        return norm
    return torch.linalg.vector_norm(rows(torch.float64))


def rows_of(gradients: Sequence[Tensor], dtype: torch.dtype | None) -> Tensor:
    """The norm of each row along the last axis of each gradient, one after the other, as one float64 vector; a
    vector's rows are its elements. dtype: of the arithmetic; None: the gradients' own, nine times as fast."""
    found = [
        torch.linalg.vector_norm(gradient, dim=-1, dtype=dtype).reshape(-1).double() if gradient.ndim > 1
        else gradient.reshape(-1).double().abs()
        for gradient in gradients
    ]  # fmt: skip
    return torch.cat(found) if found else torch.zeros(0, dtype=torch.float64)


_NARROW_NORMS = (1e-12, 1e18)
"""Norms whose squares, and those of what makes them up, are ordinary float32 numbers."""
