"""What a supervisor holds: its lock and state in the run directory, the process it watches, other machines by ssh."""

from __future__ import annotations

import fcntl
import json
import os
import shlex
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

from llmtrainer.base.config import load, sorted_words
from llmtrainer.base.errors import UserError
from llmtrainer.base.heartbeat import read_beats
from llmtrainer.base.process import OUTCOMES, is_alive, process_started, with_variables
from llmtrainer.base.rundir import RunDir
from llmtrainer.base.text import read_yaml_file
from llmtrainer.base.verbs import verb_named

SSH = ("ssh", "-o", "BatchMode=yes", "-o", "ConnectTimeout=15", "-o", "ServerAliveInterval=15")
"""Without BatchMode ssh would ask a person for a password, who is not there."""


@dataclass(frozen=True)
class Job:
    """The command of every machine, and where they write."""

    run: RunDir
    local: tuple[str, ...]
    remote: dict[str, tuple[str, ...]]


def job_of(command: Sequence[str], run: str | None, hosts: Sequence[str]) -> Job:
    """What is to be watched, on every machine. `run` is the run directory if the command does not say it."""
    if not command:
        raise UserError("there is no command to watch", fix="llmtrainer supervise launch nproc=2 train recipe.yaml")
    verb, *rest = command
    before: list[str] = []
    inner = list(command)
    if verb == "launch":
        launching = verb_named("launch").config_type()
        file, overrides, inner = sorted_words(launching, rest)
        load(launching, file, overrides, inner)     # a mistake is told now, and not after the first back-off
        before = [*([str(file)] if file else []), *overrides]
    elif hosts:
        raise UserError("`hosts` without `launch`", fix="supervise hosts=[second] launch rendezvous=first ...")
    folder = RunDir(Path(run if run is not None else _run_of(inner)))
    if not hosts:
        return Job(folder, tuple(command), {})
    count = f"nnodes={len(hosts) + 1}"
    lines = [("launch", *before, count, f"node_rank={place}", *inner) for place in range(len(hosts) + 1)]
    return Job(folder, lines[0], dict(zip(hosts, lines[1:], strict=True)))


def _run_of(command: Sequence[str]) -> str:
    """The run directory of a `train` command, found without loading what trains."""
    verb, *words = command
    if verb != "train":
        raise UserError(f"`{verb}` has no run directory", fix="run=runs/NAME before the command, or supervise train")
    found: str | None = None
    if words and words[0].endswith((".yaml", ".yml")):
        value = read_yaml_file(Path(words[0]))[0].get("run")
        found = None if value is None else str(value)
    for place, word in enumerate(words):
        if word.startswith(("run=", "--run=")):
            found = word.partition("=")[2]
        elif word == "--run" and place + 1 < len(words):
            found = words[place + 1]
    return found if found is not None else str(verb_named("train").config_type().model_fields["run"].default)


@dataclass(frozen=True)
class State:
    """What a supervisor leaves for the one after it."""

    command: tuple[str, ...] = ()
    pid: int = 0
    started: str = ""
    """Tells the process from a later one of the same number."""
    host: str = ""
    """Where it runs."""
    restarts: int = 0
    """Of this run, all together."""
    in_a_row: int = 0
    """Crashes since a checkpoint was last written."""
    newest: str | None = None
    """The newest checkpoint when the process was started."""
    first: str | None = None
    """The newest checkpoint when the first process was started."""
    findings: tuple[str, ...] = ()
    """What every crash was, in words."""
    ended: int | None = None
    """The exit code, once nothing is left to watch."""


def read_state(control: Path) -> State:
    """The state that the last supervisor of a run left; an empty one if there was none."""
    try:
        data = json.loads((control / "supervisor.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return State()
    return State(**{**data, "command": tuple(data["command"]), "findings": tuple(data["findings"])})


def write_state(control: Path, state: State) -> State:
    """Write it whole, or leave the one before."""
    aside = control / ".supervisor.partial"
    with suppress(OSError):     # a full disk is no reason to stop watching
        aside.write_text(json.dumps(asdict(state), indent=2), encoding="utf-8")
        os.replace(aside, control / "supervisor.json")
    return state


@contextmanager
def watching(run: RunDir) -> Iterator[None]:
    """Be the one supervisor of a run. The kernel drops the lock with the process, so the next can take over."""
    run.control.mkdir(parents=True, exist_ok=True)
    path = run.control / ".supervisor.lock"
    with path.open("a+") as handle:
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            handle.seek(0)
            raise UserError(
                f"this run has a supervisor, process {handle.read().strip() or 'unknown'}", where=str(run.path),
                why="two of them would start it twice", fix=f"llmtrainer stop {run.path} ends both in order",
            ) from None
        handle.truncate(0)
        handle.write(str(os.getpid()))
        handle.flush()
        yield


def is_watched(run: RunDir) -> bool:
    """Whether a supervisor of this run lives."""
    return _is_locked(run.control / ".supervisor.lock")


def is_running(run: RunDir) -> bool:
    """Whether a process trains in this run directory."""
    return _is_locked(run.path / ".lock")


def _is_locked(path: Path) -> bool:
    try:
        with path.open("r") as handle:
            # Shared, and let go at once: whoever comes at this moment for the whole lock tries again or says so.
            fcntl.flock(handle, fcntl.LOCK_SH | fcntl.LOCK_NB)
            return False
    except FileNotFoundError:
        return False
    except BlockingIOError:
        return True


@dataclass
class Child:
    """The process that is watched: started here, or by a supervisor that is no more."""

    pid: int
    started: str
    process: subprocess.Popen[bytes] | None = None
    others: dict[str, subprocess.Popen[bytes]] = field(default_factory=dict)
    """ssh to other machines, by host."""

    @property
    def alive(self) -> bool:
        if self.process is not None:
            return self.process.poll() is None
        return is_alive(self.pid, self.started)

    @property
    def code(self) -> int | None:
        """As the system has it; None where another process was its parent."""
        return None if self.process is None else self.process.poll()


def start(run: RunDir, command: Sequence[str], log: Path) -> Child:
    """Start a command of llmtrainer in a session of its own, so that it outlives this supervisor."""
    outcomes = run.control / "outcomes"
    for folder in (outcomes, outcomes / "ranks", run.control / "heartbeats"):
        folder.mkdir(parents=True, exist_ok=True)
        for old in folder.glob("rank-*"):
            old.unlink()
    with log.open("ab") as out:
        process = subprocess.Popen(
            [*program(), *command], stdin=subprocess.DEVNULL, stdout=out, stderr=out, start_new_session=True,
            env=with_variables({OUTCOMES: str(outcomes.absolute())}),
        )  # fmt: skip
    return Child(process.pid, process_started(process.pid) or "", process)


def program() -> list[str]:
    """What every command line begins with."""
    return [sys.executable, "-m", "llmtrainer"]


def end(run: RunDir, child: Child) -> None:
    """Kill what is left of an attempt: its process and its group, and every rank that left a heartbeat here."""
    # Only where it is surely ours: after a restart of the machine the number may be anybody's.
    if child.process is not None or child.alive:
        with suppress(ProcessLookupError, PermissionError):
            os.killpg(child.pid, signal.SIGKILL)
    for beat in read_beats(run.control / "heartbeats").values():
        if beat.host == os.uname().nodename and is_alive(beat.pid, beat.started):
            with suppress(ProcessLookupError, PermissionError):
                os.kill(beat.pid, signal.SIGKILL)
    if child.process is not None:
        child.process.wait()
    while is_alive(child.pid, child.started):
        time.sleep(0.05)


@dataclass(frozen=True)
class Machine:
    """Another machine of the job, reached by the system's ssh."""

    host: str
    folder: Path
    """Where the command is started there."""
    mark: str
    """The file there that holds the number of its process."""

    def start(self, command: Sequence[str], log: Path) -> subprocess.Popen[bytes]:
        """Start a command there; what it prints goes into the log here."""
        line = f"cd {shlex.quote(str(self.folder))} && echo $$ > {self.mark} && exec {shlex.join(command)}"
        with log.open("ab") as out:
            return subprocess.Popen(
                [*SSH, self.host, line], stdin=subprocess.DEVNULL, stdout=out, stderr=out, start_new_session=True
            )

    def end(self, process: subprocess.Popen[bytes] | None) -> None:
        """Kill what was started there. Its ranks die with it."""
        line = f"test ! -f {self.mark} || kill -KILL $(cat {self.mark}); rm -f {self.mark}"
        with suppress(subprocess.TimeoutExpired):
            subprocess.run([*SSH, self.host, line], stdin=subprocess.DEVNULL, capture_output=True, timeout=30)
        if process is not None and process.poll() is None:
            process.kill()
            process.wait()


def with_crash(state: State, finding: str, newest: str | None) -> State:
    """The state after a crash: a checkpoint since the start means progress, and the count begins anew."""
    in_a_row = 1 if newest != state.newest else state.in_a_row + 1
    return replace(state, in_a_row=in_a_row, findings=(*state.findings, finding))


def figures(state: State) -> dict[str, Any]:
    """What a state tells to scripts."""
    return {"restarts": state.restarts, "findings": list(state.findings)}
