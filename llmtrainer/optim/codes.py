"""Numbers as eight-bit codes, block by block, each block relative to its own largest."""

from __future__ import annotations

from functools import cache

import torch
from torch import Tensor

BLOCK = 256
"""Numbers that share one scale: one outlier spoils the digits of its own block only."""


def encode(values_N: Tensor, *, signed: bool) -> tuple[Tensor, Tensor]:
    """Codes [N], uint8, and scales [ceil(N / BLOCK)], float32, of numbers that are finite and, without `signed`,
    not negative. Nearest code after rounding to 11 binary digits (Dettmers 2022, arXiv:2110.02861, section 2.1)."""
    rows = _blocks(values_N)
    scale = rows.abs().amax(1).float().clamp(min=torch.finfo(torch.float32).tiny)
    # The bits of a float16 are the place in a table: 30 times as fast as a search among 256 borders.
    bits = (rows / scale[:, None]).half().view(torch.int16).int()
    codes = _nearest(signed, values_N.device).index_select(0, bits.add_(2**15).flatten())
    return codes[: values_N.numel()], scale


def decode(codes_N: Tensor, scale: Tensor, dtype: torch.dtype, *, signed: bool) -> Tensor:
    """The numbers [N] that the codes stand for."""
    values_N = meanings(signed).to(codes_N.device, dtype).index_select(0, codes_N.int())
    rows = _blocks(values_N).mul_(scale[:, None])
    return rows.flatten()[: codes_N.numel()]


def blocks(count: int) -> int:
    """How many scales so many numbers have."""
    return -(-count // BLOCK)


@cache
def meanings(signed: bool) -> Tensor:
    """What each of the 256 codes stands for, between -1 and 1: the paper's dynamic tree (section 1.3).

    Zeros in front count powers of ten below 1, the digit 1 ends them, and what is left divides 0.1 to 1 evenly.
    With a sign, its bit is the first. Without, no code means 0: a mean square that is not 0 must not become 0,
    because an update is divided by its root.
    """
    digits = 7 if signed else 8
    values = [0.0 if signed else 0.55 * 10.0**-digits]
    for code in range(1, 2**digits):
        left = code.bit_length() - 1
        part = (code - 2**left + 0.5) / 2**left
        values.append(10.0 ** (left + 1 - digits) * (0.1 + 0.9 * part))
    values[-1] = 1.0  # the largest number of a block keeps its value
    return torch.tensor([*values, *(-value for value in values)] if signed else values)


@cache
def _nearest(signed: bool, device: torch.device) -> Tensor:
    """The code nearest to each float16, by its bits read as a signed number, plus 2^15."""
    floats = torch.arange(-(2**15), 2**15, dtype=torch.int32).short().view(torch.float16).float()
    values, order = meanings(signed).sort(stable=True)
    borders = (values[1:] + values[:-1]) / 2
    return order.to(torch.uint8)[torch.bucketize(floats.nan_to_num(0.0), borders)].to(device)


def _blocks(values_N: Tensor) -> Tensor:
    """As rows of one block, the last one filled with zeros."""
    missing = -values_N.numel() % BLOCK
    return torch.nn.functional.pad(values_N, (0, missing)).view(-1, BLOCK)
