"""What the process does with memory that torch has freed."""

from __future__ import annotations

import ctypes
import sys

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
