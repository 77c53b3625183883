"""Freed memory stays with the process."""

from __future__ import annotations

import subprocess
import sys

import pytest

SCRIPT = """
import resource, sys, torch
torch.set_num_threads(1)
from llmtrainer.core.memory import keep_freed_memory
if sys.argv[1] == "keep" and not keep_freed_memory():
    print("none")
    raise SystemExit
def faults():
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt
def step():
    # Like a training step: much is taken in turn, held together, and freed together.
    return [torch.ones(size * 2**18) for size in (1, 12, 3, 40, 5, 2, 16)]
for turn in range(12):
    if turn == 8:
        before = faults()
    step()
print(faults() - before)
"""


def test_what_a_step_frees_comes_back_without_page_faults() -> None:
    found = {}
    for word in ("keep", "leave"):
        done = subprocess.run([sys.executable, "-c", SCRIPT, word], capture_output=True, text=True, check=True)
        found[word] = done.stdout.strip()
    if found["keep"] == "none":
        pytest.skip("not glibc")
    assert int(found["keep"]) < int(found["leave"]) / 10, found
