"""Code that nobody trusts, run where it can do no harm: a process of its own without files, network, children or time.

Linux does the holding, without root and inside containers too: Landlock closes the files, a filter of system calls
(seccomp) everything else, limits bound memory and time. Landlock does not hide that a file is there, how large it is
and when it was changed. What this machine really keeps from the code is tried out before the first run, not assumed.
"""

from __future__ import annotations

import functools
import io
import json
import os
import platform
import selectors
import signal
import socket
import subprocess
import sys
import sysconfig
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, Any

from pydantic import Field

from llmtrainer.base.config import Config
from llmtrainer.base.errors import UserError
from llmtrainer.core import confined, scratch
from llmtrainer.core.syscalls import call_filter

MIB = 2**20
GLANCE = 0.02
"""Seconds between two looks at what the code holds in its folder."""


class Limits(Config):
    """What code in a sandbox may use. One that uses more is ended."""

    seconds: float = Field(default=10.0, gt=0.0, le=3600.0)
    """Time on the clock."""

    cpu_seconds: int = Field(default=5, ge=1)
    """Time that it computes."""

    memory_mib: int = Field(default=512, ge=64)
    """Address space, Python itself included (about 30 MiB)."""

    output_kib: int = Field(default=256, ge=1)
    """What it may print, and the longest value that a function may return."""

    disk_mib: int = Field(default=16, ge=1)
    """Files in its own folder, which is empty at first and deleted afterwards; those that it has open without a name
    count, too."""


@dataclass(frozen=True)
class Outcome:
    """What became of a run."""

    ended: str
    """`done`, or why it was stopped or died: `time`, `output`, `disk`, `memory`, `died`, `sandbox`."""
    output: bytes = b""
    """What it printed, up to the limit."""
    told: bytes = b""
    """The end of what it said about errors."""
    verdict: Mapping[str, Any] | None = None
    """What the tests' process told; nothing that the tested code can write."""


@dataclass(frozen=True)
class Checks:
    """Checks of functions, trusted as data of the user's."""

    tests: tuple[str, ...]
    """Pieces of Python that raise where something is wrong."""
    setup: str = ""
    """Python that comes before them, such as imports and helpers."""
    names: tuple[str, ...] = ()
    """The functions that they call and the code defines."""
    check: str | None = None
    """A function that the tests define, called with `entry` as its argument."""
    entry: str | None = None


class Sandbox:
    """Runs code within limits, and says what it cannot keep from the code on this machine."""

    def __init__(
        self, limits: Limits, required: bool = True, readable: Sequence[str] = (), quiet: float | None = None
    ) -> None:
        """required: refuse to run anything where something is not kept from the code. readable: folders that it may
        read beside Python's own library. quiet: seconds in which it must have printed something; None: it need not."""
        self.limits, self.required, self.readable, self.quiet = limits, required, tuple(readable), quiet
        self._filter = (call_filter(platform.machine()) if sys.platform == "linux" else None) or b""

    def with_limits(self, limits: Limits, quiet: float | None = None) -> Sandbox:
        """The same with other limits."""
        return Sandbox(limits, self.required, self.readable, quiet)

    def missing(self) -> tuple[str, ...]:
        """What code could do here although it must not: tried out, once for each process."""
        return _missing(self._filter)

    def require(self) -> None:
        """UserError where something is not kept from the code and the user has not allowed that."""
        if self.required and (missing := self.missing()):
            raise UserError(
                f"code in the sandbox could do what it must not: {', '.join(missing)}",
                where=f"{platform.system()} {platform.release()} on {platform.machine()}",
                why="the sandbox needs Linux 5.13 or newer with Landlock and seccomp, on x86_64 or aarch64; some "
                "containers switch them off",
                fix="run on such a machine; or, in a container or machine that holds nothing you would miss, "
                "isolation=best_effort",
            )

    def script(self, source: str, given: str = "") -> Outcome:
        """Run a program that reads `given` and prints."""
        with ExitStack() as stack:
            inputs = stack.enter_context(_holding(given.encode("utf-8", "replace")))
            watched = _Watched(self.limits, self.quiet)
            watched.start(stack, self._task("script", source=source), stdin=inputs)
            return watched.outcome()

    def check(self, source: str, tests: Checks) -> Outcome:
        """Run tests against the functions that `source` defines.

        The tests and what they expect are in another process than the code, which gets the arguments of each call and
        gives back plain values: it can neither see nor tell the verdict.
        """
        with ExitStack() as stack:
            ends = [stack.enter_context(io.FileIO(end)) for _ in range(3) for end in os.pipe()]
            asks, asked, replies, replied, verdict, told = (end.fileno() for end in ends)
            message = self.limits.output_kib * 1024
            watched = _Watched(self.limits, self.quiet)
            watched.start(
                stack, self._task("serve", source=source, requests=asks, replies=replied, message=8 * message),
                keep=(asks, replied),
            )
            watched.start(
                stack, self._task(
                    "test", tests=list(tests.tests), setup=tests.setup, names=list(tests.names), check=tests.check,
                    entry=tests.entry, requests=asked, replies=replies, verdict=told, message=message,
                ),
                keep=(asked, replies, told), verdict=verdict,
            )  # fmt: skip
            # Only the processes themselves hold their ends now, so that each sees when the other is gone.
            for end in (*ends[:4], ends[5]):
                end.close()
            return watched.outcome()

    def _task(self, do: str, **more: Any) -> dict[str, Any]:
        limits = self.limits
        return {
            "do": do, "required": self.required, "parent": os.getpid(), "filter": self._filter.hex(),
            "cpu_seconds": limits.cpu_seconds, "memory": limits.memory_mib * MIB, "disk": limits.disk_mib * MIB,
            "readable": [*_readable(), *self.readable], **more,
        }


@dataclass
class _Run:
    process: subprocess.Popen[bytes]
    folder: str
    do: str
    """What it does: `script`, `serve` or `test`."""
    disk: int
    """Bytes that it may hold, what it was given among them."""

    @property
    def decides(self) -> bool:
        """Whether the run is over when it is."""
        return self.do != "serve"


@dataclass
class _Watched:
    """Processes that are read and timed until one that decides has ended."""

    limits: Limits
    quiet: float | None
    runs: list[_Run] = field(default_factory=list)
    pipes: dict[int, tuple[str, int]] = field(default_factory=dict)
    """Descriptor -> what it says, and how many bytes of it may come."""
    said: dict[str, bytearray] = field(default_factory=dict)

    def start(
        self, stack: ExitStack, task: dict[str, Any], *, stdin: IO[bytes] | None = None, keep: Sequence[int] = (),
        verdict: int | None = None,
    ) -> None:
        """Start one more process. `keep`: descriptors that it has beside its own three. `verdict`: where its verdict
        comes from."""
        folder = os.path.realpath(tempfile.mkdtemp(prefix="llmtrainer-sandbox-"))
        stack.callback(scratch.remove, folder)
        began, begins = (stack.enter_context(io.FileIO(*end)) for end in zip(os.pipe(), "rw", strict=True))
        task = {**task, "folder": folder, "begins": begins.fileno()}
        job = stack.enter_context(_holding(json.dumps(task).encode()))
        given = sum(os.fstat(file.fileno()).st_size for file in (job, stdin) if file is not None)
        process = subprocess.Popen(
            [sys.executable, "-I", "-S", "-B", "-X", "utf8", str(Path(confined.__file__)), str(job.fileno())],
            stdin=subprocess.DEVNULL if stdin is None else stdin, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
            env={}, cwd="/", pass_fds=(job.fileno(), begins.fileno(), *keep), start_new_session=True,
        )  # fmt: skip
        stack.callback(_end, process)
        begins.close()
        self.runs.append(_Run(process, folder, task["do"], self.limits.disk_mib * MIB + given))
        assert process.stdout is not None and process.stderr is not None
        limit = self.limits.output_kib * 1024
        self.pipes[process.stdout.fileno()] = ("output" if task["do"] == "script" else "printed", limit)
        self.pipes[process.stderr.fileno()] = (f"told by {task['do']}", 8 * limit)
        self.pipes[began.fileno()] = (f"begun by {task['do']}", 1)
        if verdict is not None:
            self.pipes[verdict] = ("verdict", limit)

    def outcome(self) -> Outcome:
        """Read until the process that decides has ended, or something is over its limit."""
        ended = self._read()
        verdict = self._verdict()
        if verdict is not None and verdict.get("why") == "died":
            self._let_die()
        by_itself = {run.decides: run.process.poll() for run in self.runs}
        for run in self.runs:
            run.process.kill()
        codes = {run.decides: run.process.wait() for run in self.runs}
        told = bytes(self.said.get("told by script", b"") + self.said.get("told by serve", b""))[-2000:]
        if ended == "done" and any(self._stillborn(run, codes[run.decides]) for run in self.runs):
            ended = "sandbox"
        elif ended == "done":
            ended = self._why(codes[True], told)
            if ended == "done" and (code := by_itself.get(False)) and self._why(code, told) != "died":
                ended = self._why(code, told)
        return Outcome(ended, bytes(self.said.get("output", b"")), told, verdict)

    def _stillborn(self, run: _Run, code: int) -> bool:
        """Whether it ended before the code began. Its exit code alone does not say: code chooses its own."""
        return code != -signal.SIGKILL and not self.said.get(f"begun by {run.do}")

    def _verdict(self) -> Mapping[str, Any] | None:
        try:
            found = json.loads(self.said.get("verdict", b"") or b"null")
        except ValueError:      # it was ended in the middle of a word
            return None
        return found if isinstance(found, dict) else None

    def _let_die(self) -> None:
        """Wait for a process that is dying: its pipes close before its exit code is there."""
        for run in self.runs:
            with suppress(subprocess.TimeoutExpired):
                run.process.wait(0.5)

    @staticmethod
    def _why(code: int, told: bytes) -> str:
        if code == 0:
            return "done"
        if code in (-signal.SIGXCPU, -signal.SIGKILL):
            return "time"
        if code == -signal.SIGXFSZ:
            return "disk"
        return "memory" if b"MemoryError" in told else "died"

    def _read(self) -> str:
        deadline = time.monotonic() + self.limits.seconds
        silent = looked = time.monotonic()
        with selectors.DefaultSelector() as selector:
            for descriptor in self.pipes:
                selector.register(descriptor, selectors.EVENT_READ)
            while True:
                for key, _ in selector.select(GLANCE):
                    name, limit = self.pipes[key.fd]
                    data = os.read(key.fd, 65536)
                    if not data:
                        selector.unregister(key.fd)
                        continue
                    said = self.said.setdefault(name, bytearray())
                    said += data
                    silent = time.monotonic()
                    if len(said) > limit:
                        del said[limit:]
                        return "output"
                # Only when nothing more can come from it is a process over; its end alone may leave words in a pipe.
                over = not selector.get_map() or all(run.process.poll() is not None for run in self.runs if run.decides)
                now = time.monotonic()
                if over or now > looked + GLANCE:
                    if any(scratch.exceeds(run.disk, run.folder, run.process) for run in self.runs):
                        return "disk"
                    looked = time.monotonic()
                if over:
                    self._rest(selector)
                    return "done"
                if now > deadline or (self.quiet is not None and now > silent + self.quiet):
                    return "time"

    def _rest(self, selector: selectors.BaseSelector) -> None:
        for key, _ in selector.select(0):
            name, limit = self.pipes[key.fd]
            said = self.said.setdefault(name, bytearray())
            os.set_blocking(key.fd, False)
            while len(said) <= limit:
                try:
                    data = os.read(key.fd, 65536)
                except BlockingIOError:
                    break
                if not data:
                    break
                said += data


@contextmanager
def _holding(data: bytes) -> Iterator[IO[bytes]]:
    """A file without a name, at its beginning."""
    with tempfile.TemporaryFile() as file:
        file.write(data)
        file.seek(0)
        yield file


def _end(process: subprocess.Popen[bytes]) -> None:
    process.kill()
    process.wait()
    for stream in (process.stdout, process.stderr):
        if stream is not None:
            stream.close()


def _readable() -> list[str]:
    """What Python needs to import its own library."""
    library = sysconfig.get_paths()["stdlib"]
    system = ("/lib", "/lib64", "/usr/lib", "/usr/lib64", "/etc/ld.so.cache", "/dev/null", "/dev/urandom")
    return sorted({os.path.realpath(path) for path in (library, *system) if os.path.exists(path)})


_PROBE = """
import json, os
from os import environ
found = []
def tries(name, what):
    try:
        what()
    except BaseException:
        return
    found.append(name)
def fork():
    if os.fork() == 0:
        os._exit(0)
def connect():
    import socket
    socket.create_connection(("127.0.0.1", PORT), timeout=1.0)
tries("read files outside its folder", lambda: open(SECRET).read())
tries("write files outside its folder", lambda: open(SECRET + ".written", "w").write("x"))
tries("change the mode of files outside its folder", lambda: os.chmod(SECRET, 0o644))
tries("reach the network", connect)
tries("start processes", fork)
tries("send signals to other processes", lambda: os.kill(PARENT, 0))
tries("use more memory than it may", lambda: bytearray(MEMORY))
if set(environ) - {"LC_CTYPE"}:
    found.append("see the environment")
print(json.dumps(found), flush=True)
tries("", lambda: os.execv("/bin/sh", ["sh", "-c", "echo started"]))
"""


@functools.cache
def _missing(code: bytes) -> tuple[str, ...]:
    limits = Limits(seconds=30.0, memory_mib=128)
    with _secret() as secret, socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        listener.listen()
        names = {"SECRET": secret, "PORT": listener.getsockname()[1], "PARENT": os.getpid(), "MEMORY": 256 * MIB}
        source = "\n".join(f"{name} = {value!r}" for name, value in names.items()) + _PROBE
        outcome = Sandbox(limits, required=False).script(source)
    try:
        lines = outcome.output.decode().splitlines()
        found = [*json.loads(lines[0]), *(["start programs"] if "started" in lines[1:] else [])]
    except (ValueError, IndexError):
        return (f"end before it was tried out ({outcome.ended}: {outcome.told.decode(errors='replace')[-200:]})",)
    return tuple(map(str, found))


@contextmanager
def _secret() -> Iterator[str]:
    with tempfile.TemporaryDirectory(prefix="llmtrainer-secret-") as folder:
        path = Path(folder) / "secret"
        path.write_text("secret")
        yield str(path)
