"""This process among others: what torchrun says about it, how it waits, and how it is asked to stop."""

from __future__ import annotations

import ctypes
import os
import signal
import sys
import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from types import FrameType, TracebackType
from typing import Any, Self

from llmtrainer.base.errors import UserError


def rank() -> int:
    """Place of this process among all, from 0."""
    return _number("RANK", 0)


def world_size() -> int:
    """How many processes train together."""
    return _number("WORLD_SIZE", 1)


def local_rank() -> int:
    """Place of this process among those of this machine, from 0."""
    return _number("LOCAL_RANK", 0)


def wait_passively() -> None:
    """Let the threads of a product sleep while they wait for each other. Call it before torch is imported.

    By default they spin. Where another program has a core, each product then waits for a thread that is not
    running: a small model was measured ten times slower beside one busy process, and no faster on a quiet
    machine. Changes no result. Whoever set the variable knows better.
    """
    os.environ.setdefault("OMP_WAIT_POLICY", "passive")


def ask_cublas_for_equal_bits() -> None:
    """Have CUDA's matrix products give the same bits every time: a workspace of fixed size, which cuBLAS looks up
    under this name alone, before its first product."""
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")


OUTCOMES = "LLMTRAINER_OUTCOMES"
"""The variable that names the folder where a process says how it ended."""
LAUNCHED = "LLMTRAINER_LAUNCHED"
"""The variable that says that `launch` shows this process's result and errors."""


_asked: dict[str, str] = {}


def take_requests() -> None:
    """Take what was asked of this process out of its environment: a command that it starts itself is not meant."""
    _asked.update({name: os.environ.pop(name) for name in (OUTCOMES, LAUNCHED) if name in os.environ})


def outcome_folder() -> Path | None:
    """Where whoever started this process wants to read how it ended; None if nobody does."""
    return Path(_asked[OUTCOMES]) if OUTCOMES in _asked else None


def launched() -> bool:
    """Whether this is one process of a job that `launch` started and speaks for."""
    return LAUNCHED in _asked


def end_with_parent() -> None:
    """Have the kernel kill this process when the one that started it dies, where it can (Linux).

    A process of a job that lost its launcher would hold the run's lock, and wait for its siblings for ever.
    """
    if sys.platform == "linux":
        PR_SET_PDEATHSIG = 1
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)


def record_collectives() -> None:
    """Have torch remember its last collectives, so that a hang can be explained. Call it before torch is imported.

    Changes no result. Whoever set the variable knows better.
    """
    if "WORLD_SIZE" in os.environ:
        os.environ.setdefault("TORCH_FR_BUFFER_SIZE", "64")


def cores() -> int:
    """Processor cores that this process may use, as its affinity and its control group say."""
    allowed = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    quota = Path("/sys/fs/cgroup/cpu.max")
    try:
        amount, _, period = quota.read_text(encoding="ascii").strip().partition(" ")
        return min(allowed, max(int(amount) // int(period), 1)) if amount != "max" else allowed
    except (OSError, ValueError, ZeroDivisionError):
        return allowed


def threads_for(processes: int) -> dict[str, str]:
    """The variable for the threads of each of several processes on this machine; empty if the user set it.

    Two processes of two threads each on two cores were measured twenty times slower than of one thread each.
    """
    return {} if "OMP_NUM_THREADS" in os.environ else {"OMP_NUM_THREADS": str(max(cores() // processes, 1))}


def process_state(pid: int) -> str | None:
    """How the system has a process: `R` running, `S` waiting, `D` waiting for a device, `T` stopped; None if there is
    no such process any more."""
    try:
        return _stat(pid)[0]
    except (FileNotFoundError, ProcessLookupError):
        pass
    if Path("/proc/self/stat").exists():
        return None
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return None
    except PermissionError:
        pass
    return "S"


def process_started(pid: int) -> str | None:
    """When a process began, in the system's own count: tells it from a later one with the same number. None if there
    is no such process, empty where the system does not say."""
    state = process_state(pid)
    if state is None or state == "Z":
        return None
    try:
        return _stat(pid)[19]
    except OSError:
        return ""


def processor_seconds(pid: int) -> float:
    """What a process has computed so far; 0 where the system does not say."""
    try:
        told = _stat(pid)
        return (int(told[11]) + int(told[12])) / os.sysconf("SC_CLK_TCK")
    except OSError:
        return 0.0


def is_alive(pid: int, started: str) -> bool:
    """Whether this very process still runs."""
    return process_started(pid) == started


def _stat(pid: int) -> list[str]:
    # The name of the program stands in brackets and may hold blanks and brackets itself.
    return Path(f"/proc/{pid}/stat").read_text(encoding="utf-8", errors="replace").rpartition(")")[2].split()


@contextmanager
def variables(values: Mapping[str, str]) -> Iterator[None]:
    """Let processes that are started within the block inherit these variables."""
    before = {name: os.environ.get(name) for name in values}
    os.environ.update(values)
    try:
        yield
    finally:
        for name, value in before.items():
            os.environ.pop(name, None) if value is None else os.environ.__setitem__(name, value)


def with_variables(values: Mapping[str, str]) -> dict[str, str]:
    """This process's environment and these, for a process that is to be started."""
    return {**os.environ, **values}


def _number(name: str, alone: int) -> int:
    text = os.environ.get(name, str(alone))
    if not text.isdecimal():
        raise UserError(
            f"the variable {name} is `{text}`, no whole number", where="environment",
            why="torchrun sets it to say how many processes there are", fix=f"unset {name}",
        )
    return int(text)


class StopRequests:
    """While it is entered, a request to stop is noted instead of obeyed, so that a step can end and be saved.

    Requests are SIGTERM, SIGINT (the second Ctrl-C interrupts at once) and the file `stop` in a control folder,
    whose text, if it has any, is added to the reason. The file is removed when the block ends in order, and kept
    when it ends with an error: a process that is started again then still knows. Off the main thread only the
    file counts, because Python delivers signals to the main thread alone.
    """

    def __init__(self, control: Path | None = None) -> None:
        self._file = control / "stop" if control is not None else None
        self._reason: str | None = None
        self._before: dict[signal.Signals, Any] = {}     # Any: a handler is a function, a number or None

    @property
    def requested(self) -> str | None:
        """Why to stop: `SIGTERM`, `SIGINT`, `control/stop`, or None. The first request gives the reason."""
        if self._reason is None and self._file is not None and self._file.exists():
            said = self._file.read_text(encoding="utf-8", errors="replace").strip()
            self._reason = f"control/stop: {said}" if said else "control/stop"
        return self._reason

    def request(self, reason: str) -> None:
        """Ask from within the process."""
        self._reason = self._reason or reason

    def __enter__(self) -> Self:
        if threading.current_thread() is threading.main_thread():
            for number in (signal.SIGTERM, signal.SIGINT):
                self._before[number] = signal.signal(number, self._note)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for number, handler in self._before.items():
            # None: the handler was not set from Python, and cannot be set again from there.
            signal.signal(number, signal.SIG_DFL if handler is None else handler)
        self._before.clear()
        if kind is None and self._file is not None and self.requested is not None:
            self._file.unlink(missing_ok=True)

    def _note(self, number: int, frame: FrameType | None) -> None:
        if number == signal.SIGINT and self._reason is not None:
            raise KeyboardInterrupt
        self.request(signal.Signals(number).name)
