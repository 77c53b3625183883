"""A conversation as text, of which is known what the template wrote and what users did."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass

from llmtrainer.tokenizer.marks import Read


@dataclass(frozen=True)
class Control:
    """A control token that the template wrote, in characters of the rendered text."""

    start: int
    stop: int
    token: int
    before: int = 0
    """Blanks in front that it takes into itself."""
    behind: int = 0


@dataclass(frozen=True)
class Rendered:
    """A conversation as text, of which is proved what the template wrote and what users did."""

    text: str
    read: Read
    controls: tuple[Control, ...]

    def of_message(self, place: int) -> list[int]:
        """Where marks of a message's texts stood, rising."""
        found = [where for (owner, _), where in self.read.places.items() if owner == place]
        return sorted(place for where in found for place in where)


def parts_of(rendered: Rendered, cuts: Sequence[int]) -> tuple[list[str | int], list[int]]:
    """Control ids and the text between them, cut where asked, and where each begins."""
    found: list[str | int] = []
    starts: list[int] = []

    def add_text(start: int, stop: int) -> None:
        edges = [start, *(cut for cut in cuts if start < cut < stop), stop]
        for first, last in itertools.pairwise(edges):
            if first < last:
                found.append(rendered.text[first:last])
                starts.append(first)

    done = 0
    for item in rendered.controls:
        # The blanks that a control token takes are a prompt's own, or an answer's own, on either side of a cut.
        add_text(done, max([done, item.start - item.before, *(cut for cut in cuts if cut <= item.start)]))
        found.append(item.token)
        starts.append(item.start)
        done = min([item.stop + item.behind, *(cut for cut in cuts if cut >= item.stop)])
    add_text(done, len(rendered.text))
    return found, starts


def behind_common(text: str, other: str) -> str:
    """What is left of a text behind all that it has in common with the beginning of another."""
    low, high = 0, min(len(text), len(other))
    while low < high:
        middle = (low + high + 1) // 2
        low, high = (middle, high) if text.startswith(other[:middle]) else (low, middle - 1)
    return text[low:]


def difference(one: str, other: str) -> str:
    """Where two texts part, for people."""
    place = len(one) - len(behind_common(one, other))
    return f"{one[max(place - 20, 0) : place + 30]!r} against {other[max(place - 20, 0) : place + 30]!r}"
