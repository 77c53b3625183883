"""Freed memory stays with the process, and is used again."""

from __future__ import annotations

import subprocess
import sys

import pytest

HEAD = """
import sys, torch
from pathlib import Path
from llmtrainer.core.memory import keep_freed_memory
from llmtrainer.core.vocab_head import log_probabilities
def peak():
    return int(Path("/proc/self/status").read_text().split("VmHWM:")[1].split()[0]) // 1024
torch.set_num_threads(1)
keep_freed_memory()
hidden, weight = torch.randn(4096, 8, requires_grad=True), torch.randn(16384, 8, requires_grad=True)
targets = torch.zeros(4096, dtype=torch.long)
log_probabilities(hidden[:8], weight, targets[:8])["logp"].sum().backward()    # what a library takes once
before = peak()
log_probabilities(hidden, weight, targets, chunk=2048)["logp"].sum().backward()
print(peak() - before)
"""
SLICE_MIB = 64
"""1,024 positions and 16,384 ids in float32: a quarter of the logits of this call."""

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


@pytest.mark.skipif(sys.platform != "linux", reason="the peak is read from /proc")
def test_logits_of_a_long_batch_take_the_room_of_one_slice() -> None:
    done = subprocess.run([sys.executable, "-c", HEAD], capture_output=True, text=True, check=True)
    assert int(done.stdout) < 1.5 * SLICE_MIB, done.stdout
