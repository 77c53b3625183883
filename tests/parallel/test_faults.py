"""A fault in a job of several ranks is named: which rank, what for, at which line, within ten seconds."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path

import pytest

import llmtrainer
from llmtrainer.base.hangs import Finding, ranks_of, why_ended, why_still
from llmtrainer.base.heartbeat import DUMP_SIGNAL, read_beats
from llmtrainer.base.outcome import read_outcomes
from tests.parallel import faulty
from tests.parallel.faulty import Fault

ROOT = Path(llmtrainer.__file__).parents[1]
SECONDS = 10.0
"""Within which a fault has to be named, on a machine that does nothing else."""
LONGEST = 120.0
"""Until a job is given up, its start included."""
LEAST_SHARE = 38 / 40

KINDS = {
    "skipped sum": "skipped collective", "other shape": "shape mismatch", "slow loader": "slow loader",
    "killed": "dead rank", "deadlocked loader": "deadlock", "full disk": "full disk",
    "out of memory": "out of memory", "skipped figures": "skipped collective",
    # the others run in `make faults` only
    "larger shape": "shape mismatch", "busy loader": "slow loader", "slow worker": "slow loader",
    "halted": "stopped rank", "deadlock": "deadlock", "extra sum": "skipped collective", "aborted": "dead rank",
    "raised": "error", "stuck save": "stuck",
}  # fmt: skip
"""What is injected, and what it has to be called."""
EIGHT = [Fault(kind, rank=place % 2) for place, kind in enumerate(list(KINDS)[:8])]


def forty() -> list[Fault]:
    """Every kind on other ranks, in other steps, of jobs of two and three."""
    found = []
    for place in range(40):
        kind = list(KINDS)[place % len(KINDS)]
        ranks = 2 if place < 24 else 3
        found.append(Fault(kind, rank=(place * 7 + place // 17) % ranks, step=4 + place % 3, ranks=ranks))
    return found


@dataclass
class Running:
    fault: Fault
    folder: Path
    pids: list[int]
    began: float

    @property
    def seconds(self) -> float:
        """Since the fault; 0 before it."""
        happened = self.folder / "happened"
        return time.time() - happened.stat().st_mtime if happened.exists() else 0.0

    def named(self) -> Finding | None:
        """What a supervisor would say now; None while all goes well."""
        heartbeats, outcomes = self.folder / "heartbeats", read_outcomes(self.folder / "ranks")
        ranks = ranks_of(heartbeats)
        if len(ranks) < self.fault.ranks:
            return None
        raised = [item for item in outcomes.values() if item.failed]
        gone = [rank for rank, item in ranks.items() if item.state in (None, "Z") and rank not in outcomes]
        gone += [rank for rank, item in outcomes.items() if item.exit_code is None and ranks[rank].state in (None, "Z")]
        if gone or raised:
            return None if not self.settled() else self.ended(gone)
        if any(time.time() - beat.since < 3.0 for beat in read_beats(heartbeats).values()):
            return None
        silent = [item for item in ranks.values() if item.stall is None and item.state in ("R", "S")]
        for item in silent:
            os.kill(item.beat.pid, DUMP_SIGNAL)
        return why_still(ranks)

    def settled(self) -> bool:
        """Whether the others have said where they stand, as they do before torchrun ends them."""
        return all(
            item.state in (None, "Z") or item.stall is not None
            for item in ranks_of(self.folder / "heartbeats").values()
        )

    def ended(self, gone: list[int]) -> Finding:
        from llmtrainer.apps.launch import _first_failed

        outcomes = read_outcomes(self.folder / "ranks")
        # As torchrun knows it; here the processes are not our children.
        stacks = {rank: (self.folder / "heartbeats" / f"rank-{rank}.stack").read_text() for rank in gone}
        signals = {rank: 6 if "Fatal Python error: Aborted" in text else 9 for rank, text in stacks.items()}
        failed = _first_failed(outcomes, {rank: Failure(-number) for rank, number in signals.items()})
        return why_ended(ranks_of(self.folder / "heartbeats"), outcomes, failed, signals.get(failed or 0))

    def end(self) -> None:
        for pid in self.pids:
            with suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)


@dataclass(frozen=True)
class Failure:
    exitcode: int


def line_of(kind: str) -> int | None:
    text = Path(faulty.__file__).read_text().splitlines()
    return next((number for number, line in enumerate(text, 1) if line.endswith(f"# FAULT {kind}")), None)


@pytest.fixture(scope="module")
def forker() -> Iterator[subprocess.Popen[str]]:
    process = subprocess.Popen(
        [sys.executable, faulty.__file__], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
        env={**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "TORCH_FR_BUFFER_SIZE": "64"},
    )  # fmt: skip
    yield process
    process.communicate(timeout=30)


def start(forker: subprocess.Popen[str], fault: Fault, folder: Path) -> Running:
    (folder / "ranks").mkdir(parents=True)
    assert forker.stdin and forker.stdout
    forker.stdin.write(json.dumps({"fault": asdict(fault), "folder": str(folder)}) + "\n")
    forker.stdin.flush()
    return Running(fault, folder, json.loads(forker.stdout.readline()), time.monotonic())


def named(
    forker: subprocess.Popen[str], faults: list[Fault], folder: Path, at_once: int, within: float
) -> list[str]:
    """The faults that were not named right in time, each with what was said of it."""
    waiting = list(enumerate(faults))
    running: list[Running] = []
    wrong: list[str] = []
    while waiting or running:
        while waiting and len(running) < at_once:
            number, fault = waiting.pop(0)
            running.append(start(forker, fault, folder / str(number)))
        for job in list(running):
            finding = job.named()
            if finding is None and job.seconds < within and time.monotonic() - job.began < LONGEST:
                continue
            print(f"{job.fault.kind}, rank {job.fault.rank} of {job.fault.ranks}: {job.seconds:.1f} s: {finding}")
            job.end()
            running.remove(job)
            wrong += [] if right(job, finding) else [f"{job.fault}: {finding}"]
        time.sleep(0.1)
    return wrong


def right(job: Running, finding: Finding | None) -> bool:
    if finding is None or finding.cause != KINDS[job.fault.kind] or finding.rank != job.fault.rank:
        return False
    line = line_of(job.fault.kind)
    return line is None or job.fault.kind in ("killed", "halted") or f"faulty.py:{line} " in (finding.line or "")


def test_each_of_eight_faults_is_named_with_its_rank_cause_and_line(
    forker: subprocess.Popen[str], tmp_path: Path, pytestconfig: pytest.Config
) -> None:
    many = pytestconfig.getoption("--injected") > len(EIGHT)
    faults = forty() if many else EIGHT
    wrong = named(forker, faults, tmp_path, at_once=4, within=SECONDS if many else 6 * SECONDS)
    assert len(wrong) <= len(faults) * (1 - LEAST_SHARE), "\n".join(wrong)
