"""The folder of a process in a sandbox: how much the process holds there, and how all of it is removed."""

from __future__ import annotations

import itertools
import math
import os
import signal
import stat
import subprocess
import time
import uuid
from collections.abc import Iterator
from contextlib import contextmanager, suppress

BLOCK = 4096
"""Bytes that an empty file costs."""
PATIENCE = 0.5
"""Seconds to wait until every thread of a process stands still. One that does not then is inside a system call."""


def exceeds(limit: int, folder: str, process: subprocess.Popen[bytes]) -> bool:
    """Whether a process holds more bytes in its folder than it may."""
    held, moved = _held(folder, process)
    if moved:   # nothing hides by being renamed while others are counted
        with _still(process):
            held, _ = _held(folder, process)
    return held > limit


def remove(folder: str) -> None:
    """Remove a folder, however deep its folders are nested and whatever they forbid.

    What lies deeper is moved up before it is removed: no path grows too long, and no level holds a descriptor.
    """
    fresh = (f"{uuid.uuid4().hex}-{number}" for number in itertools.count())
    with suppress(OSError):
        os.chmod(folder, 0o700)
        top = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
        try:
            while names := os.listdir(top):
                for name in names:
                    _remove_or_flatten(name, top, fresh)
        finally:
            os.close(top)
        os.rmdir(folder)


def _remove_or_flatten(name: str, top: int, fresh: Iterator[str]) -> None:
    if not _open_up(name, top):
        os.unlink(name, dir_fd=top)
        return
    inner = os.open(name, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW, dir_fd=top)
    try:
        for child in os.listdir(inner):
            _open_up(child, inner)      # a folder that may not be written may not be moved either
            os.rename(child, next(fresh), src_dir_fd=inner, dst_dir_fd=top)
    finally:
        os.close(inner)
    os.rmdir(name, dir_fd=top)


def _open_up(name: str, within: int) -> bool:
    """Whether it is a folder; if so, one that its owner may do everything with."""
    mode = os.stat(name, dir_fd=within, follow_symlinks=False).st_mode
    if stat.S_ISDIR(mode) and mode & 0o700 != 0o700:
        os.chmod(name, 0o700, dir_fd=within)
    return stat.S_ISDIR(mode)


def _held(folder: str, process: subprocess.Popen[bytes]) -> tuple[float, bool]:
    """Bytes that a process holds, in files with a name and without, and whether something moved while they were
    counted."""
    named, moved = _named(folder)
    # The number of a process that was waited for may be another one's.
    nameless, closed = _nameless(folder, process.pid) if process.returncode is None else (0, False)
    return named + nameless, moved or closed


def _named(folder: str) -> tuple[float, bool]:
    """Bytes of the files in a folder. One that nobody can look into, closed or nested too deep, has no measure."""
    total, moved, waiting = 0, False, [folder]
    while waiting:
        try:
            with os.scandir(waiting.pop()) as entries:
                for entry in entries:
                    try:
                        if entry.is_dir(follow_symlinks=False):
                            waiting.append(entry.path)
                        total += _size(entry.stat(follow_symlinks=False))
                    except FileNotFoundError:
                        moved = True
        except (FileNotFoundError, NotADirectoryError):
            moved = True
        except OSError:
            return math.inf, moved
    return total, moved


def _nameless(folder: str, pid: int) -> tuple[float, bool]:
    """Bytes of removed files that a process has open, in any of its threads; without measure where it has one in
    memory alone."""
    sizes: dict[int, int] = {}
    moved = False
    for thread in _listed(f"/proc/{pid}/task"):
        for descriptor in _listed(f"{thread}/fd"):
            try:
                found = os.stat(descriptor)
            except FileNotFoundError:
                moved = True
            except OSError:
                continue
            else:
                if stat.S_ISREG(found.st_mode) and not found.st_nlink:
                    sizes[found.st_ino] = _size(found)
    if _mapped(folder, pid) - set(sizes):
        return math.inf, True
    return sum(sizes.values()), moved


def _mapped(folder: str, pid: int) -> set[int]:
    """Numbers of the removed files of a folder that a process has in its memory."""
    found = set()
    with suppress(OSError), open(f"/proc/{pid}/maps", "rb") as lines:
        for line in lines:
            if line.endswith(b" (deleted)\n") and os.fsencode(f" {folder}/") in line:
                found.add(int(line.split(maxsplit=5)[4]))
    return found


def _listed(folder: str) -> list[str]:
    """What lies there; nothing where the process is gone, or the machine has no /proc."""
    try:
        return [f"{folder}/{name}" for name in os.listdir(folder)]
    except OSError:
        return []


def _size(found: os.stat_result) -> int:
    return max(BLOCK, found.st_size, 512 * found.st_blocks)


@contextmanager
def _still(process: subprocess.Popen[bytes]) -> Iterator[None]:
    """A process stands still, or is over, as long as this lasts."""
    process.send_signal(signal.SIGSTOP)
    try:
        until = time.monotonic() + PATIENCE
        while not _stands(process.pid) and time.monotonic() < until:
            time.sleep(0.001)
        yield
    finally:
        process.send_signal(signal.SIGCONT)


def _stands(pid: int) -> bool:
    if not hasattr(os, "waitid"):
        return True
    try:
        return os.waitid(os.P_PID, pid, os.WSTOPPED | os.WEXITED | os.WNOWAIT | os.WNOHANG) is not None
    except ChildProcessError:   # it is over, and was waited for
        return True
