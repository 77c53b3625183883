"""Formulas that objectives share: pure functions of tensors, each with where it was published."""

from __future__ import annotations

import math

import torch
from torch import Tensor

LOG_2 = math.log(2.0)


def log1mexp(x: Tensor) -> Tensor:
    """log(1 - exp(x)) for x <= 0, elementwise: the logarithm of the probability of the contrary."""
    # 1 - exp(x) loses its digits near 0, and exp(x) is lost beside 1 far below it. Each form is exact where the
    # other fails; log 2 is where their errors cross (Maechler 2012, "Accurately computing log(1 - exp(-|a|))", eq. 7).
    # Both are evaluated everywhere, so each is clamped to its own side: `where` picks the value, but a NaN gradient
    # of the side not picked would still get through it.
    tiny = torch.finfo(x.dtype).tiny
    near = torch.log(-torch.expm1(x.clamp(-LOG_2, -tiny)))
    far = torch.log1p(-torch.exp(x.clamp(max=-LOG_2)))
    return torch.where(x > -LOG_2, near, far)
