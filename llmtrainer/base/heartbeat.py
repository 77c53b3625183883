"""Signs of life: what a process of a run is doing, in a small file for whoever watches it.

`control/heartbeats/rank-0.beat` holds the phase it is in, rewritten in place whenever a phase begins: microseconds.
`rank-0.stall` appears once a phase lasts longer than `STILL_SECONDS`, and says more: where every thread stands, and
the last collectives. `rank-0.stack` is written by faulthandler where the process dies of a signal or is asked by one.
"""

from __future__ import annotations

import faulthandler
import json
import mmap
import os
import signal
import socket
import sys
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from llmtrainer.base.process import process_started
from llmtrainer.base.stack import Place, places_of, places_raised

STILL_SECONDS = 1.5
"""A phase that lasts longer is described, in case it never ends."""
LOOK_SECONDS = 0.5
"""How often the thread that describes it looks."""
DUMP_SIGNAL = signal.SIGUSR2
"""Has a process write its stack even where no Python code can run."""
_LINE = 160


@dataclass(frozen=True)
class Collective:
    """One exchange between ranks, as torch recorded it."""

    group: str
    """Of the ranks that take part, by torch's name."""
    number: int
    """Counted by each rank for itself within the group, from 1: equal numbers belong together."""
    name: str
    """`all_reduce`, `all_gather`, ..."""
    shapes: tuple[tuple[int, ...], ...]
    dtypes: tuple[str, ...]
    pending: bool
    """Begun and not done."""

    @property
    def what(self) -> str:
        """`all_reduce of float [7]`."""
        shapes = ", ".join(str(list(shape)) for shape in self.shapes)
        return f"{self.name} of {', '.join(self.dtypes).lower()} {shapes}".strip()


@dataclass(frozen=True)
class Beat:
    """What a rank does now."""

    rank: int
    ranks: int
    pid: int
    host: str
    started: str
    """Tells the process from a later one of the same number."""
    count: int
    """Phases begun."""
    step: int
    """The step under way, from 1; 0 before the first."""
    phase: str
    since: float
    """Seconds since 1970, UTC."""


@dataclass(frozen=True)
class Stall:
    """What a rank says of itself while one of its phases lasts."""

    count: int
    """Of the beat that it belongs to."""
    time: float
    longest: float | None
    """Seconds that this phase took at most so far; None if it was not seen often enough to say."""
    collectives: tuple[Collective, ...]
    """The last ones, oldest first."""
    stack: tuple[Place, ...]
    """Of the thread that trains, innermost first."""
    threads: Mapping[str, tuple[Place, ...]]
    """The other threads by name."""
    resident: int
    """Bytes of memory."""
    raised: bool = False
    """Told by a process that ends with an error: the stack is where it was raised."""


class Heartbeat:
    """Writes this process's signs of life. Off, it costs a call."""

    def __init__(
        self, folder: Path | None, rank: int = 0, ranks: int = 1,
        collectives: Callable[[], Sequence[Collective]] = tuple,
    ) -> None:  # fmt: skip
        self._folder = folder
        self._rank, self._ranks = rank, ranks
        self._collectives = collectives
        self._page: mmap.mmap | None = None
        self._count, self._step, self._phase, self._since = 0, 0, "start", time.time()
        self._began = time.monotonic()
        self._longest: dict[str, float] = {}
        self._seen: dict[str, int] = {}
        self._done = threading.Event()
        self._thread: threading.Thread | None = None
        self._trains = 0
        self._stack: Any = None     # Any: a file object of faulthandler's
        self._reports_crashes = False

    def __enter__(self) -> Self:
        if self._folder is None:
            return self
        self._folder.mkdir(parents=True, exist_ok=True)
        for suffix in ("stall", "stack"):
            self._path(suffix).unlink(missing_ok=True)
        facts = [self._rank, self._ranks, os.getpid(), socket.gethostname(), process_started(os.getpid()) or ""]
        with self._path("beat").open("w+b") as file:
            # A page of memory that is the file: writing a phase is no call of the system's.
            file.write(b" " * _LINE + b"\n" + json.dumps(facts).encode() + b"\n")
            file.flush()
            self._page = mmap.mmap(file.fileno(), 0)
        self._trains = threading.get_ident()
        self._stack = self._path("stack").open("w")
        self._reports_crashes = not faulthandler.is_enabled()
        if self._reports_crashes:
            faulthandler.enable(self._stack)
        if hasattr(faulthandler, "register"):
            faulthandler.register(DUMP_SIGNAL, self._stack)
        self._write()
        self._thread = threading.Thread(target=self._describe, name="heartbeat", daemon=True)
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._thread is None or self._folder is None:
            return
        self._done.set()
        self._thread.join()
        if kind is not None:
            with suppress(OSError):
                self._tell(error)
        if hasattr(faulthandler, "register"):
            faulthandler.unregister(DUMP_SIGNAL)
        if self._reports_crashes:
            faulthandler.disable()
        self._stack.close()
        assert self._page is not None
        self._page.close()
        self._page = None
        if kind is None:
            for suffix in ("beat", "stall", "stack"):
                self._path(suffix).unlink(missing_ok=True)
            with suppress(OSError):
                self._folder.rmdir()    # the last one

    def beat(self, phase: str, step: int | None = None) -> None:
        """A phase begins."""
        now = time.monotonic()
        took, before = now - self._began, self._phase
        # The first step compiles, loads and allocates: what it takes is no measure of the next.
        if self._step > 1:
            self._seen[before] = self._seen.get(before, 0) + 1
            self._longest[before] = max(self._longest.get(before, 0.0), took)
        self._began, self._phase, self._since = now, phase, time.time()
        self._step = self._step if step is None else step
        self._count += 1
        if self._page is not None:
            self._write()

    def _write(self) -> None:
        # The number stands at both ends: a reader that finds them different has met a line half written.
        line = f"{self._count} {self._step} {self._phase} {self._since:.3f} {self._count}"
        assert self._page is not None
        self._page[:_LINE] = line.ljust(_LINE)[:_LINE].encode()

    def _describe(self) -> None:
        told = -1
        while not self._done.wait(LOOK_SECONDS):
            if time.monotonic() - self._began > STILL_SECONDS:
                told = self._count
                with suppress(OSError, RuntimeError):
                    self._tell()
            elif told >= 0 and told != self._count:
                self._path("stall").unlink(missing_ok=True)
                told = -1

    def _tell(self, error: BaseException | None = None) -> None:
        """Where every thread stands; after an error, where that was raised."""
        count, phase = self._count, self._phase
        stacks = _stacks()
        names = {thread.ident: thread.name for thread in threading.enumerate()}
        own = self._trains, threading.get_ident()
        threads = {names.get(ident, str(ident)): stack for ident, stack in stacks.items() if ident not in own}
        longest = self._longest[phase] if self._seen.get(phase, 0) > 1 else None
        stack = places_raised(error) if error is not None else stacks.get(self._trains, ())
        found = tuple(self._collectives())
        if self._count != count:
            return
        stall = Stall(count, time.time(), longest, found, stack, threads, _resident(), error is not None)
        aside = self._path("partial")
        aside.write_text(json.dumps(asdict(stall)), encoding="utf-8")
        os.replace(aside, self._path("stall"))

    def _path(self, suffix: str) -> Path:
        assert self._folder is not None
        return self._folder / f"rank-{self._rank}.{suffix}"


def read_beats(folder: Path) -> dict[int, Beat]:
    """The last sign of life of every rank. One that is just being written is left out."""
    found: dict[int, Beat] = {}
    for path in folder.glob("rank-*.beat"):
        with suppress(OSError, ValueError):
            line, _, facts = path.read_bytes().partition(b"\n")
            count, step, phase, since, again = line.decode().split()
            rank, ranks, pid, host, started = json.loads(facts)
            if count == again:
                found[rank] = Beat(rank, ranks, pid, host, started, int(count), int(step), phase, float(since))
    return dict(sorted(found.items()))


def read_stall(folder: Path, rank: int) -> Stall | None:
    """What a rank says of the phase it is in; None if it says nothing."""
    try:
        data = json.loads((folder / f"rank-{rank}.stall").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    collectives = tuple(
        Collective(
            item["group"], item["number"], item["name"], tuple(map(tuple, item["shapes"])), tuple(item["dtypes"]),
            item["pending"],
        )
        for item in data["collectives"]
    )  # fmt: skip
    return Stall(
        data["count"], data["time"], data["longest"], collectives, _read_places(data["stack"]),
        {name: _read_places(stack) for name, stack in data["threads"].items()}, data["resident"],
        data["raised"],
    )


def read_stack(folder: Path, rank: int) -> tuple[Place, ...]:
    """The stack that faulthandler wrote of the thread at fault, innermost first; empty if it wrote none."""
    try:
        text = (folder / f"rank-{rank}.stack").read_text(encoding="utf-8", errors="replace")
    except OSError:
        return ()
    found: list[Place] = []
    # A thread at fault comes first, but may run no Python: a library's own. The main thread comes last.
    threads = [part for part in text.strip().split("\n\n") if '  File "' in part] or [""]
    chosen = next((part for part in threads if part.lstrip().startswith("Current thread")), threads[-1])
    for line in chosen.splitlines():
        words = line.strip()
        if words.startswith('File "'):
            file, _, rest = words.removeprefix('File "').partition('", line ')
            number, _, function = rest.partition(" in ")
            if number.isdecimal():
                found.append(Place(file, int(number), function))
    return tuple(found)


def _read_places(items: Sequence[Mapping[str, Any]]) -> tuple[Place, ...]:
    return tuple(Place(item["file"], item["line"], item["function"]) for item in items)


def _stacks() -> dict[int, tuple[Place, ...]]:
    """Where every thread but this one stands, by its number. No frame is held once this has returned."""
    # A frame keeps alive what its function computed: of a training step, gigabytes. This thread's own, kept in a
    # variable, would be a circle that only the garbage collector ends, with the frames of all others in it.
    here = threading.get_ident()
    return {ident: places_of(frame) for ident, frame in sys._current_frames().items() if ident != here}


def _resident() -> int:
    try:
        pages = int(Path("/proc/self/statm").read_text(encoding="ascii").split()[1])
        return pages * os.sysconf("SC_PAGE_SIZE")
    except (OSError, ValueError, IndexError):
        return 0
