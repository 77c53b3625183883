"""Places in a running program, and which of them are the program's own."""

from __future__ import annotations

import sysconfig
import traceback
from collections.abc import Iterable
from dataclasses import dataclass
from types import FrameType


@dataclass(frozen=True)
class Place:
    """One frame of a stack."""

    file: str
    line: int
    function: str

    def __str__(self) -> str:
        return f"{self.file}:{self.line} in {self.function}"


def places_of(frame: FrameType) -> tuple[Place, ...]:
    """The stack of a thread, innermost first."""
    return tuple(
        Place(item.f_code.co_filename, line, item.f_code.co_name) for item, line in traceback.walk_stack(frame)
    )


def place_raised(error: BaseException) -> Place | None:
    """Where an error was raised: the innermost own line."""
    return own_place(places_raised(error))


def places_raised(error: BaseException) -> tuple[Place, ...]:
    """The calls that led to an error, innermost first."""
    frames = traceback.extract_tb(error.__traceback__)
    return tuple(Place(item.filename, item.lineno or 0, item.name) for item in reversed(frames))


def own_place(stack: Iterable[Place]) -> Place | None:
    """The innermost place that is neither Python's nor a library's; the innermost of all if there is none."""
    places = list(stack)
    return next((place for place in places if is_own(place)), places[0] if places else None)


def is_own(place: Place) -> bool:
    """Whether a place is in this package or in the user's own code."""
    if place.file.startswith("<"):
        return False
    paths = sysconfig.get_paths()
    library = place.file.startswith((paths["stdlib"], paths["platstdlib"], paths["purelib"], paths["platlib"]))
    return "/llmtrainer/" in place.file or not library
