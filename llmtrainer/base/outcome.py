"""How a process ended, in a file for the one that started it: of many exit codes a job keeps only one."""

from __future__ import annotations

import json
import os
import socket
import time
import traceback
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from llmtrainer.base.errors import DONE, STOPPED
from llmtrainer.base.process import end_with_parent, launched, outcome_folder, rank, take_requests
from llmtrainer.base.stack import place_raised

_GONE = (
    "Connection closed by peer", "Connection reset by peer", "Broken pipe", "Timed out waiting", "Socket closed",
    "remote process exited", "DistBackendError", "DistNetworkError",
)  # fmt: skip
"""What gloo, NCCL and torch's store say when the other side is not there any more."""


@dataclass(frozen=True)
class Outcome:
    """The end of one process. Without `exit_code` it has begun, and nobody knows more."""

    rank: int
    pid: int
    host: str
    time: float
    """Seconds since 1970, UTC."""
    exit_code: int | None = None
    """As the contract has it: 0 done, 1 a defect, 2 to be mended by the user, 3 stopped on request."""
    text: str = ""
    """What a person would have read: the result, or the error."""
    result: dict[str, Any] | None = None
    """The verb's figures, as `--json` prints them."""
    error: dict[str, str | None] | None = None
    """what, where, why, fix, and what `described` adds."""

    @property
    def failed(self) -> bool:
        return self.exit_code is not None and self.exit_code not in (DONE, STOPPED)

    @property
    def lost_a_neighbour(self) -> bool:
        """Whether what it raised only says that another rank is gone."""
        return self.failed and any(sign in self.text for sign in _GONE)


def begin() -> None:
    """Say that this process has begun. Does nothing where nobody asked."""
    take_requests()
    if launched():
        end_with_parent()
    _write(None, "", None, None)


def end(
    exit_code: int, text: str, *, result: Mapping[str, Any] | None = None,
    error: Mapping[str, str | None] | None = None,
) -> None:  # fmt: skip
    """Say how this process ends. Does nothing where nobody asked."""
    _write(exit_code, text, result, error)


def described(error: BaseException) -> dict[str, str | None]:
    """What an outcome says of an error beside its text: its type, where it was raised and by which calls."""
    place = place_raised(error)
    trace = "".join(traceback.format_exception(error))
    return {"type": type(error).__name__, "line": None if place is None else str(place), "traceback": trace}


def read_outcomes(folder: Path) -> dict[int, Outcome]:
    """Every outcome in a folder by rank."""
    found = [Outcome(**json.loads(path.read_text(encoding="utf-8"))) for path in sorted(folder.glob("rank-*.json"))]
    return {outcome.rank: outcome for outcome in sorted(found, key=lambda outcome: outcome.rank)}


def _write(
    exit_code: int | None, text: str, result: Mapping[str, Any] | None, error: Mapping[str, str | None] | None
) -> None:
    folder = outcome_folder()
    if folder is None:
        return
    outcome = Outcome(
        rank(), os.getpid(), socket.gethostname(), time.time(), exit_code, text,
        None if result is None else dict(result), None if error is None else dict(error),
    )
    path = folder / f"rank-{outcome.rank}.json"
    aside = path.with_suffix(".partial")
    try:
        aside.write_text(json.dumps(asdict(outcome), ensure_ascii=False), encoding="utf-8")
        os.replace(aside, path)
    except OSError:
        # The disk may be what failed, or the folder be gone with who asked: the exit code still stands.
        return
