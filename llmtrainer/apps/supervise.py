"""supervise: a run is started again when it crashes or hangs, and never when a person has to mend something first."""

from __future__ import annotations

import hashlib
import os
import sys
import time
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, ClassVar

from pydantic import Field

from llmtrainer.base import supervision
from llmtrainer.base.config import Config
from llmtrainer.base.errors import DEFECT, DONE, MENDABLE, STOPPED, UserError
from llmtrainer.base.hangs import Finding, Rank, memory_kills, ranks_of, why_ended, why_still
from llmtrainer.base.heartbeat import DUMP_SIGNAL
from llmtrainer.base.outcome import Outcome, read_outcomes
from llmtrainer.base.process import StopRequests, processor_seconds
from llmtrainer.base.result import Result
from llmtrainer.base.rundir import RunDir
from llmtrainer.base.supervision import Child, Job, Machine, State, write_state
from llmtrainer.training.console import is_quiet, say, warn

POLL_SECONDS = 0.25
SHORTEST_STALL, SHORTEST_HANG = 5.0, 60.0
"""Seconds below which nothing is called a stall or a hang by itself."""
STALL_TIMES, HANG_TIMES = 5.0, 50.0
"""So many times the longest that a phase took is a stall, or a hang."""
SECONDS_TO_END = 60.0
"""What a job has to end in once the first of its ranks has."""
GONE_SECONDS = 2.0
"""A rank that is gone takes the job with it within a moment; after that it has to be told."""


class Supervision(Config):
    """What to watch, and when to start it again."""

    words: ClassVar[tuple[str, ...]] = ("command",)
    ends_in_command: ClassVar[bool] = True

    command: tuple[str, ...] = ()
    """`train recipe.yaml ...`, or `launch --nproc 8 train recipe.yaml ...`."""

    run: str | None = None
    """The run directory; the recipe's own if not given."""

    restarts: int = Field(default=10, ge=0)
    """Crashes in a row, without a new checkpoint between them, after which it gives up."""

    backoff: float = Field(default=5.0, ge=0.0)
    """Seconds before the first restart; doubled with every further crash in a row."""

    longest_backoff: float = Field(default=300.0, ge=0.0)
    """Seconds that the wait before a restart is at most."""

    stall: float | None = Field(default=None, gt=0.0)
    """Seconds without a sign of life after which rank, cause and line are told. Found from the phases before if not
    given: five times the longest, and at least five seconds."""

    hang: float | None = Field(default=None, gt=0.0)
    """Seconds without a sign of life after which the run is killed and started again. Found from the phases before if
    not given: fifty times the longest, and at least a minute."""

    patience: float = Field(default=1800.0, gt=0.0)
    """The same where nothing is known yet: while a run loads, in its first step, and in a phase seen for the first
    time."""

    hosts: tuple[str, ...] = ()
    """Other machines of a `launch`, as ssh knows them; this one is machine 0. Keys must let ssh in without a
    password."""


@dataclass(frozen=True)
class Supervised(Result):
    """How a watched run ended."""

    run: str
    code: int
    restarts: int
    findings: tuple[str, ...]
    """What every crash was."""
    result: dict[str, Any]
    """What the command itself has to tell."""
    told: str = ""

    @property
    def exit_code(self) -> int:
        return self.code

    def json(self) -> dict[str, Any]:
        return {"run": self.run, "restarts": self.restarts, "findings": list(self.findings), "result": self.result}

    def text(self) -> str:
        return "\n".join(filter(None, [self.told, f"restarts {self.restarts}"]))


def supervise(supervision_: Supervision) -> Supervised:
    """Watch a command until it is done, was asked to stop, or only a person can mend it."""
    job = supervision.job_of(supervision_.command, supervision_.run, supervision_.hosts)
    with supervision.watching(job.run):
        return _Supervisor(supervision_, job).watch()


@dataclass
class _Supervisor:
    """One run's life."""

    settings: Supervision
    job: Job
    state: State = field(default_factory=State)
    _log_read: int = 0
    _kills: int = 0
    _told_at: tuple[int, ...] = ()
    _sign: tuple[object, ...] = ()
    _sign_at: float = field(default_factory=time.monotonic)
    _work: tuple[int, ...] = ()
    _work_at: float = field(default_factory=time.monotonic)

    @property
    def _run(self) -> RunDir:
        return self.job.run

    @property
    def _log(self) -> Path:
        return self._run.path / "log.txt"

    def watch(self) -> Supervised:
        with StopRequests() as stop:
            child = self._taken_over()
            while True:
                child = child or self._start()
                try:
                    hung = self._until_ended(child, stop)
                except KeyboardInterrupt:
                    self._end(child)
                    raise
                ended = self._ended(child, hung)
                if ended is not None:
                    return ended
                if not self._backed_off(stop):
                    return self._finished(STOPPED, {}, "stopped while it waited for a restart")
                child = None

    def _taken_over(self) -> Child | None:
        """The process that a supervisor before this one started, if it still lives or ended unseen."""
        before = supervision.read_state(self._run.control)
        self._log_read = self._log.stat().st_size if self._log.exists() else 0
        if not before.pid or before.ended is not None:
            self.state = State(command=self.job.local, first=self._newest(), newest=self._newest())
            return None
        if before.host != os.uname().nodename:
            if supervision.is_running(self._run):
                raise UserError(
                    "this run is still running on another machine", where=before.host,
                    why="its supervisor died there", fix=f"llmtrainer stop {self._run.path}, or supervise it there",
                )
            self.state = before
            return None
        child = Child(before.pid, before.started)
        if before.command != self.job.local:
            if child.alive:
                raise UserError(
                    "another command is running in this run directory", where=f"process {before.pid}",
                    why=f"its supervisor died: llmtrainer {' '.join(before.command)}",
                    fix=f"supervise that command, or llmtrainer stop {self._run.path} first",
                )
            self.state = State(command=self.job.local, first=self._newest(), newest=self._newest())
            return None
        self.state = before
        self._kills = memory_kills()
        say(f"takes over process {before.pid}" if child.alive else f"process {before.pid} ended while nobody watched")
        return child

    def _start(self) -> Child:
        command = list(self.job.local)
        if self._newest() != self.state.first:
            # This run has begun to write: whatever `resume` said of its beginning, it continues from there now.
            command.append("resume=auto")
        self._log_read = self._log.stat().st_size if self._log.exists() else 0
        self._kills, self._told_at, self._sign_at = memory_kills(), (), time.monotonic()
        self._work_at = self._sign_at
        child = supervision.start(self._run, command, self._log)
        self.state = write_state(self._run.control, replace(
            self.state, pid=child.pid, started=child.started, host=os.uname().nodename, newest=self._newest(),
            ended=None,
        ))  # fmt: skip
        for machine, line in self._machines():
            child.others[machine.host] = machine.start([*supervision.program(), *line, *command[len(self.job.local):]],
                                                       self._log)  # fmt: skip
        return child

    def _machines(self) -> Iterator[tuple[Machine, tuple[str, ...]]]:
        digest = hashlib.sha256(str(self._run.path.absolute()).encode()).hexdigest()[:12]
        for place, (host, line) in enumerate(self.job.remote.items(), start=1):
            yield Machine(host, Path.cwd(), f"/tmp/llmtrainer-{digest}-{place}.pid"), line

    def _until_ended(self, child: Child, stop: StopRequests) -> Finding | None:
        """Wait for the end. What it hung in, if it had to be killed."""
        asked = False
        while child.alive:
            self._relay()
            if stop.requested is not None and not asked:
                asked = True
                (self._run.control / "stop").write_text(f"supervise: {stop.requested}", encoding="utf-8")
            finding = self._standing_still()
            if finding is not None:
                self._end(child)
                return finding
            time.sleep(POLL_SECONDS)
        self._relay()
        return None

    def _standing_still(self) -> Finding | None:
        """What the run hangs in, once it has for long enough. Before that, it is told."""
        ranks = ranks_of(self._run.control / "heartbeats")
        age, idle, stall, hang = self._quiet(ranks)
        ending = any(item.exit_code is not None for item in self._inner().values())
        if ending:
            # One rank has said how it ends; the others are given their time to, and are killed by the launcher.
            stall = hang = max(hang, SECONDS_TO_END)
        elif any(item.state in (None, "Z", "T", "t") for item in ranks.values()):
            stall = min(stall, GONE_SECONDS)
        if age < stall:
            return None
        mark = tuple(item.beat.count for item in ranks.values())
        if mark != self._told_at and ranks:
            ranks = self._asked(ranks)
            self._told_at = mark
            self._tell(f"stands still for {age:.0f} s: {why_still(ranks)}")
        if idle < hang:
            return None
        if not ranks:
            return Finding(None, "hang", None, f"no sign of life for {age:.0f} s")
        return why_still(ranks)

    def _quiet(self, ranks: dict[int, Rank]) -> tuple[float, float, float, float]:
        """Seconds since the last sign of life of any rank, and since any last worked; how many are a stall and a
        hang. A phase that is seen for the first time may take hours: while it computes, it is no hang."""
        events, now = self._run.events, time.monotonic()
        sign = (
            tuple(item.beat.count for item in ranks.values()), events.stat().st_size if events.exists() else 0,
            None if ranks or not self._log.exists() else self._log.stat().st_size,
        )  # fmt: skip
        if sign != self._sign:
            self._sign, self._sign_at, self._work_at = sign, now, now
        known = [item.stall.longest for item in ranks.values() if item.stall is not None and item.stall.longest]
        settled = bool(known) and all(item.beat.step > 1 for item in ranks.values())
        work = tuple(int(processor_seconds(item.beat.pid)) for item in ranks.values() if item.state not in (None, "?"))
        if not settled and work != self._work:
            self._work, self._work_at = work, now
        stall = max(SHORTEST_STALL, STALL_TIMES * max(known)) if settled else self.settings.patience
        hang = max(SHORTEST_HANG, HANG_TIMES * max(known)) if settled else self.settings.patience
        age, idle = now - self._sign_at, now - self._work_at
        if ranks and all(item.beat.step > 0 for item in ranks.values()):
            stall, hang = self.settings.stall or stall, self.settings.hang or hang
            idle = age if self.settings.hang is not None else idle
        return age, idle, min(stall, hang), hang

    def _asked(self, ranks: dict[int, Rank]) -> dict[int, Rank]:
        """Have the ranks that say nothing of themselves dump their stacks: no Python code runs in them."""
        silent = [item for item in ranks.values() if item.stall is None and item.state in ("R", "S", "D")]
        for item in silent:
            with suppress(ProcessLookupError, PermissionError):
                os.kill(item.beat.pid, DUMP_SIGNAL)
        if not silent:
            return ranks
        time.sleep(POLL_SECONDS)
        return ranks_of(self._run.control / "heartbeats")

    def _ended(self, child: Child, hung: Finding | None) -> Supervised | None:
        """The result, if nothing is to be started again; else the crash is written down."""
        outcomes = read_outcomes(self._run.control / "outcomes")
        outcome = next((item for item in outcomes.values() if item.pid == child.pid), None)
        code = outcome.exit_code if outcome is not None and outcome.exit_code is not None else child.code
        if hung is None and outcome is not None and code in (DONE, STOPPED):
            self._end(child, patiently=True)
            return self._finished(code or DONE, outcome.result or {}, outcome.text)
        mendable = outcome is not None and code == MENDABLE and (outcome.error or {}).get("type") != "MachinesMissing"
        self._end(child)
        if hung is None and mendable:
            assert outcome is not None
            write_state(self._run.control, replace(self.state, ended=MENDABLE))
            said = outcome.error or {}
            raise UserError(
                said.get("what") or outcome.text, where=said.get("where"), why=said.get("why"), fix=said.get("fix")
            )
        finding = hung or self._why(outcome, code)
        self.state = supervision.with_crash(self.state, str(finding), self._newest())
        self._tell(f"{'hung and was killed' if hung else 'crashed'}: {finding}")
        if self.state.in_a_row > self.settings.restarts:
            self._tell(f"gives up after {self.state.in_a_row} crashes without a new checkpoint")
            return self._finished(DEFECT, {}, "")
        return None

    def _why(self, outcome: Outcome | None, code: int | None) -> Finding:
        folder = self._run.control
        ranks = ranks_of(folder / "heartbeats")
        inner = self._inner()
        failed: int | None = None
        signalled = -code if code is not None and code < 0 else None
        if outcome is not None and not inner:
            inner = {0: outcome}
        if outcome is not None and outcome.result is not None and "error" in outcome.result:
            told = outcome.result["error"]
            failed, signalled = told.get("rank"), told.get("signal")
        return why_ended(ranks, inner, failed, signalled, memory_kills=memory_kills() - self._kills)

    def _inner(self) -> dict[int, Outcome]:
        """How the ranks of a launched job ended, as far as they have."""
        return read_outcomes(self._run.control / "outcomes" / "ranks")

    def _backed_off(self, stop: StopRequests) -> bool:
        """Wait before a restart; False if a stop was asked for meanwhile."""
        seconds = min(self.settings.backoff * 2 ** (self.state.in_a_row - 1), self.settings.longest_backoff)
        self.state = write_state(self._run.control, replace(self.state, restarts=self.state.restarts + 1))
        say(f"starts again in {seconds:g} s, crash {self.state.in_a_row} in a row")
        until = time.monotonic() + seconds
        file = self._run.control / "stop"
        while True:
            if stop.requested is not None or file.exists():
                file.unlink(missing_ok=True)
                return False
            if time.monotonic() >= until:
                return True
            time.sleep(min(POLL_SECONDS, max(until - time.monotonic(), 0.0)))

    def _finished(self, code: int, result: dict[str, Any], told: str) -> Supervised:
        self.state = write_state(self._run.control, replace(self.state, ended=code))
        return Supervised(str(self._run.path), code, self.state.restarts, self.state.findings, result, told)

    def _end(self, child: Child, patiently: bool = False) -> None:
        """Leave nothing of an attempt behind, here or on other machines. `patiently`: what ends by itself may."""
        until = time.monotonic() + (60.0 if patiently else 0.0)
        while time.monotonic() < until and any(item.poll() is None for item in child.others.values()):
            time.sleep(POLL_SECONDS)
        supervision.end(self._run, child)
        for machine, _ in self._machines():
            machine.end(child.others.get(machine.host))

    def _newest(self) -> str | None:
        folders = self._run.whole_checkpoints()
        return folders[0].name if folders else None

    def _tell(self, text: str) -> None:
        """To whoever watches, and into the run's log."""
        warn(text)
        with suppress(OSError), self._log.open("a", encoding="utf-8") as log:
            log.write(f"supervise: {text}\n")
            log.flush()
            self._log_read = log.tell()

    def _relay(self) -> None:
        """Show what the command has printed since."""
        if not self._log.exists() or self._log.stat().st_size <= self._log_read:
            return
        with self._log.open("rb") as log:
            log.seek(self._log_read)
            text = log.read()
            self._log_read = log.tell()
        if not is_quiet():
            sys.stderr.write(text.decode(errors="replace"))
            sys.stderr.flush()
