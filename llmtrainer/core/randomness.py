"""Randomness as a function of where it is needed: nothing random is saved, so nothing random can be lost."""

from __future__ import annotations

import hashlib

import torch
from torch import Tensor


def derive(seed: int, *purpose: str | int) -> int:
    """A 62-bit seed that is a function of (seed, purpose) alone."""
    text = "\0".join([str(seed), *map(str, purpose)])
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "big") >> 2


def dropout(
    x_BTD: Tensor, rate: float, key: int, place: Tensor, site: int, position_BT: Tensor | None = None
) -> Tensor:
    """Inverted dropout whose mask is a function of (key, place of the row in the step, site, element).

    The key holds (seed, step); neither micro-batches nor ranks, nor an evaluation between two steps, can shift
    the mask. `place` is [B]; or [B, T], of the sequence that each token belongs to, and then `position_BT` is the
    token's place in that sequence: the mask is the one of the sequence in a row of its own. Costs one 32-bit mix per
    element (the finaliser of MurmurHash3, public domain).
    """
    if rate == 0.0:
        return x_BTD
    bits_BTD = _bits(x_BTD, derive(key, "dropout", site), place, position_BT)
    kept_BTD = bits_BTD >= int(rate * 2**32)
    return x_BTD * kept_BTD.to(x_BTD.dtype) * (1.0 / (1.0 - rate))


def embedding_noise(
    x_BTD: Tensor, alpha: float, key: int, document_BT: Tensor, place: Tensor, position_BT: Tensor | None = None
) -> Tensor:
    """x plus uniform noise up to alpha / sqrt(L D), L the tokens of the document (arXiv:2310.05914, algorithm 1).

    A function of (key, place, element), which are those of `dropout`. Padding (-1) stays as it is.
    """
    owner_BT = document_BT.long() + 1
    counts = torch.zeros(len(x_BTD), int(owner_BT.max()) + 1, dtype=torch.int64, device=x_BTD.device)
    length_BT = counts.scatter_add(1, owner_BT, torch.ones_like(owner_BT)).gather(1, owner_BT)
    size_BT = torch.where(document_BT >= 0, alpha / (length_BT * x_BTD.shape[-1]).sqrt(), 0.0)
    bits_BTD = _bits(x_BTD, derive(key, "embedding noise"), place, position_BT)
    return (x_BTD + size_BT[:, :, None] * (bits_BTD.to(torch.float32) / 2**31 - 1.0)).to(x_BTD.dtype)


def token_bits(key: int, place: Tensor, position_BT: Tensor) -> Tensor:
    """32 random bits for every token [B, T]: a function of (key, place of its sequence in the step, position in it)."""
    row = _mix(place * 0x9E3779B1 + key)
    return _mix((row[:, None] if place.dim() == 1 else row) ^ position_BT.long())


def _bits(x_BTD: Tensor, key: int, place: Tensor, position_BT: Tensor | None) -> Tensor:
    """32 random bits for every element."""
    _, T, D = x_BTD.shape
    assert (place.dim() == 2) == (position_BT is not None)
    row = _mix(place * 0x9E3779B1 + key)
    if position_BT is None:
        return _mix(row[:, None, None] ^ torch.arange(T * D, device=x_BTD.device).view(T, D))
    element_BTD = position_BT.long()[:, :, None] * D + torch.arange(D, device=x_BTD.device)
    return _mix(row[:, :, None] ^ element_BTD)


def _mix(x: Tensor) -> Tensor:
    low = 0xFFFFFFFF
    x = x & low
    x = ((x ^ (x >> 16)) * 0x85EBCA6B) & low
    x = ((x ^ (x >> 13)) * 0xC2B2AE35) & low
    return x ^ (x >> 16)
