"""events.jsonl: what happened in a run, one JSON object a line, append only."""

from __future__ import annotations

import json
import os
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from types import TracebackType
from typing import Any, BinaryIO, Self

from llmtrainer.base.errors import UserError
from llmtrainer.base.result import plain

Event = dict[str, Any]
"""`kind` and `time` (seconds since 1970, UTC) first, then whatever the kind has to tell."""


class EventLog:
    """The one writer of an events file.

    A line that a crash left unfinished is removed at the start: it never was an event. A line that is whole but
    for its newline stays. Without a path, events are made and not kept: another process writes those of the run.
    """

    def __init__(self, path: Path | None) -> None:
        self.path = path
        if path is not None:
            path.parent.mkdir(parents=True, exist_ok=True)
            _mend(path)
        self._file = (path or Path(os.devnull)).open("ab")

    def append(self, kind: str, **values: Any) -> Event:    # Any: whatever JSON can say of it
        """Write one event and hand it to the system. Numbers that are not finite become null."""
        event = {"kind": kind, "time": round(time.time(), 3), **plain(values)}
        line = json.dumps(event, ensure_ascii=False, allow_nan=False)
        self._file.write(line.encode() + b"\n")
        self._file.flush()
        return event

    def close(self) -> None:
        self._file.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


def read_events(path: Path) -> list[Event]:
    """All events so far. A last line that is still being written is left out; any other bad line is a UserError."""
    try:
        with path.open("rb") as file:
            return [event for event, _ in _events(file, path, 1)]
    except FileNotFoundError:
        raise UserError(f"there is no `{path}`", fix="name a run directory that has begun to train") from None


def steps(path: Path) -> list[Event]:
    """One `step` event per step, ascending. A continued run repeats some: the last line counts."""
    found = {event["step"]: event for event in read_events(path) if event["kind"] == "step"}
    return [found[step] for step in sorted(found)]


def follow(
    path: Path, *, until: Callable[[], bool] = lambda: False, poll_seconds: float = 0.5
) -> Iterator[Event]:
    """Events as they are written, from the first on, also if the file is not there yet. Ends when `until` says so
    and everything written before has been given."""
    offset, line = 0, 1
    while True:
        ending = until()    # asked before reading, so that what was written before is not missed
        if path.exists():
            with path.open("rb") as file:
                file.seek(offset)
                for event, size in _events(file, path, line):
                    offset, line = offset + size, line + 1
                    yield event
        if ending:
            return
        time.sleep(poll_seconds)


def _events(file: BinaryIO, path: Path, first: int) -> Iterator[tuple[Event, int]]:
    """Events with their size in bytes, up to the last newline; `first` is the number of the first line."""
    for number, line in enumerate(file, start=first):
        if not line.endswith(b"\n"):
            return
        event = _event(line)
        if event is None:
            raise UserError(
                "this line is no event", where=f"{path}:{number}",
                why="every line is one JSON object with `kind` and `time`", fix="remove the line",
            )
        yield event, len(line)


def _event(line: bytes) -> Event | None:
    try:
        value = json.loads(line)
    except ValueError:
        return None
    return value if isinstance(value, dict) and "kind" in value else None


def _mend(path: Path) -> None:
    """Make the file end with a newline: by adding it if the last line is whole, else by cutting that line off."""
    if not path.exists() or path.stat().st_size == 0:
        return
    with path.open("r+b") as file:
        end = file.seek(0, os.SEEK_END)
        start = _start_of_last_line(file, end)
        file.seek(start)
        last = file.read()
        if last and _event(last) is not None:
            file.write(b"\n")
        elif last:
            file.truncate(start)


def _start_of_last_line(file: BinaryIO, end: int, block: int = 1 << 16) -> int:
    """Where the bytes after the last newline begin. Read from the back: the file may be long."""
    while end > 0:
        start = max(0, end - block)
        file.seek(start)
        found = file.read(end - start).rfind(b"\n")
        if found >= 0:
            return start + found + 1
        end = start
    return 0
