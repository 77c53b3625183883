"""TensorBoard: event files that `tensorboard --logdir runs` shows. Written here, so that nothing need be installed."""

from __future__ import annotations

import struct
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any, ClassVar

from llmtrainer.base.rundir import RunDir
from llmtrainer.training.tracking import Tracker

_POLYNOMIAL = 0x82F63B78
"""Castagnoli's, bits reversed (RFC 3720, appendix B.4)."""


class TensorBoard(Tracker):
    """One file of events for each time that the run is begun or continued, in the run directory."""

    rewinds: ClassVar[bool] = True

    path: str | None = None
    """The folder. By default `tensorboard` in the run directory."""

    def open(self, run: RunDir, recipe: Mapping[str, Any], name: str, first: int) -> EventFile:
        return EventFile(Path(self.path) if self.path else run.path / "tensorboard", first)


class EventFile:
    """Records of TensorFlow (length, its checksum, content, its checksum), each with an `Event` message.

    Fields of Event: 1 wall time (double), 2 step (int64), 3 version of the file (string), 5 summary, 7 session log.
    A summary repeats field 1, a value, of which 1 is the tag and 2 the number (float). A session log that starts at
    a step makes readers forget that step and all behind it in older files.
    """

    def __init__(self, folder: Path, first: int) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        now = time.time()
        # Readers take the files of a folder in the order of their names, and a name begins with the second.
        self._file = _fresh(folder, int(now)).open("xb")
        self._record(_double(1, now) + _bytes(3, b"brain.Event:2"))
        self._record(_double(1, now) + _number(2, first) + _bytes(7, _number(1, 1)))

    def write(self, step: int, values: Mapping[str, float]) -> None:
        """One event with all values of a step."""
        parts = (
            _bytes(1, _bytes(1, name.encode()) + b"\x15" + struct.pack("<f", value)) for name, value in values.items()
        )
        self._record(_double(1, time.time()) + _number(2, step) + _bytes(5, b"".join(parts)))
        self._file.flush()

    def close(self) -> None:
        self._file.close()

    def _record(self, content: bytes) -> None:
        length = struct.pack("<Q", len(content))
        self._file.write(length + _masked(length) + content + _masked(content))


def _fresh(folder: Path, second: int) -> Path:
    """A name that is behind all others in the folder."""
    last = max((int(path.name.split(".")[3]) for path in folder.glob("events.out.tfevents.*.llmtrainer")), default=0)
    return folder / f"events.out.tfevents.{max(second, last + 1):010d}.llmtrainer"


def _number(field: int, value: int) -> bytes:
    return bytes([field << 3]) + _varint(value)


def _double(field: int, value: float) -> bytes:
    return bytes([field << 3 | 1]) + struct.pack("<d", value)


def _bytes(field: int, content: bytes) -> bytes:
    return bytes([field << 3 | 2]) + _varint(len(content)) + content


def _varint(value: int) -> bytes:
    found = bytearray()
    while value > 0x7F:
        found.append(value & 0x7F | 0x80)
        value >>= 7
    return bytes([*found, value])


def _masked(content: bytes) -> bytes:
    value = crc32c(content)
    return struct.pack("<I", ((value >> 15 | value << 17) + 0xA282EAD8) & 0xFFFFFFFF)


def crc32c(content: bytes) -> int:
    """The checksum of RFC 3720."""
    value = 0xFFFFFFFF
    for byte in content:
        value = _TABLE[(value ^ byte) & 0xFF] ^ value >> 8
    return value ^ 0xFFFFFFFF


def _table() -> list[int]:
    found = []
    for value in range(256):
        for _ in range(8):
            value = value >> 1 ^ (_POLYNOMIAL if value & 1 else 0)
        found.append(value)
    return found


_TABLE = _table()
