"""What the process does with memory that torch has freed, and where in memory a tensor begins."""

from __future__ import annotations

import ctypes
import sys

from torch import Tensor

_TRIM_THRESHOLD, _MMAP_THRESHOLD = -1, -3
_NEVER = 2**30


def keep_freed_memory() -> bool:
    """Let glibc keep what a step frees for the next step, instead of returning it to the system.

    A step on a CPU frees and asks again for the same hundreds of megabytes; fetched from the system, each page
    costs a fault and is cleared first. Changes speed alone. Returns False where the C library is another one.
    """
    if not sys.platform.startswith("linux"):
        return False
    adjust = getattr(ctypes.CDLL(None), "mallopt", None)
    return adjust is not None and all(adjust(option, _NEVER) for option in (_TRIM_THRESHOLD, _MMAP_THRESHOLD))


_ALIGNMENT = 64
"""Bytes: where torch's own allocations begin on a CPU."""


def aligned(tensor: Tensor) -> Tensor:
    """The tensor, or a copy of it if its memory begins where torch would have begun none.

    What a product of matrices rounds to may depend on that: MKL without AVX-512 gives other last digits for views
    into a buffer and for tensors inside a mapped file, at other places than multiples of 16 bytes (measured).
    """
    elsewhere = tensor.device.type == "cpu" and tensor.data_ptr() % _ALIGNMENT
    return tensor.clone() if elsewhere else tensor
