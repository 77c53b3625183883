"""Sizes rounded up, so that few shapes of products occur where each shape costs memory and time."""

from __future__ import annotations

import torch

from llmtrainer.core.products import in_float32

LEAST = 32
"""Tokens that a row is rounded to where nothing is known of it."""
_PER_OCTAVE = 16
"""Sizes between one power of two and the next: 6 % of padding at worst, 2 or 3 % on average."""


def costs_by_shape(device: torch.device, compute: torch.dtype) -> bool:
    """Whether each shape of a product is kept for good.

    In 16 bits on a CPU, torch asks oneDNN, which writes machine code for every shape it meets and keeps it: half a
    megabyte for each (measured on a processor with AMX, torch 2.13: 0.27 MB of description in torch's cache and 0.3 MB
    of code in the library's; 1,024 of each are kept, between which freed activations come to lie in pieces), and the
    first product takes as long as thirty others. A run in which each step has a length of its own met 37 shapes a
    step. Wider types, and what is computed in one, are multiplied by another library, which keeps nothing.
    """
    narrow = compute in (torch.bfloat16, torch.float16)
    return device.type == "cpu" and narrow and not in_float32(device, compute)


def padding(number: int, device: torch.device, compute: torch.dtype) -> int:
    """Rows to put behind so many, for products on that device in that type to meet few shapes; 0 where none cost."""
    return rounded(number) - number if costs_by_shape(device, compute) else 0


def rounded(number: int, least: int = LEAST) -> int:
    """The next size from `number` on that is made use of: multiples of `least`, and of more for large numbers."""
    grain = max(least, 2 ** (number.bit_length() - 1) // _PER_OCTAVE) if number else least
    return -(-number // grain) * grain
