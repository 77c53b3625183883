"""Whether this machine can confine code at all, found out by other means than the sandbox's own."""

from __future__ import annotations

import ctypes
import platform
import sys
from pathlib import Path

import pytest

from llmtrainer.core.sandbox import Limits, Sandbox

_LANDLOCK_CREATE_RULESET, _VERSION = 444, 1


def require_confinement() -> None:
    """Skip the test where the kernel has no Landlock or no seccomp. Where it has both, nothing may be missing: a
    sandbox that leaks must not turn its own tests off."""
    if sys.platform != "linux" or platform.machine() not in ("x86_64", "aarch64"):
        pytest.skip("code is confined on Linux, on x86_64 and aarch64")
    if ctypes.CDLL(None).syscall(_LANDLOCK_CREATE_RULESET, None, 0, _VERSION) < 1:
        pytest.skip("this kernel has no Landlock, or a container switches it off")
    if "Seccomp_filters:" not in Path("/proc/self/status").read_text():
        pytest.skip("this kernel has no filter of system calls")
    assert Sandbox(Limits()).missing() == ()
