"""Where the text of users lands in a rendered conversation, told by characters that stand in no text."""

from __future__ import annotations

import json
import re
from bisect import bisect_left
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from llmtrainer.base.errors import UserError
from llmtrainer.core.example import Message

FIRST, LAST = 0xF0000, 0x10FFFD
"""The private planes 15 and 16: no character there has a meaning."""

_PRIVATE = re.compile(f"[{chr(FIRST)}-{chr(LAST)}]")

Owner = tuple[int, str]
"""A message's place and the field whose text a mark stands in."""


@dataclass(frozen=True)
class Read:
    """A rendered conversation, and where the marks stood in it."""

    text: str
    """Without the marks."""
    with_marks: str
    places: Mapping[Owner, tuple[int, ...]]
    """Of each field that was rendered: where its marks stood, in characters of `text`. Rising."""
    marks: tuple[int, ...]
    """Where each mark stands in `with_marks`. Rising."""
    cut: frozenset[Owner] = frozenset()
    """The fields of which a part was not rendered."""
    said: tuple[tuple[int, int], ...] = ()
    """From where to where each text or reasoning of a message was written, in characters of `text`."""

    def lacks(self, owner: Owner) -> bool:
        """Whether a field was not rendered, or not all of it."""
        return owner not in self.places or owner in self.cut

    def place(self, place: int) -> int:
        """A place in `with_marks` as a place in `text`."""
        return place - bisect_left(self.marks, place)


class Marker:
    """Puts marks into the texts of one conversation: at both ends of each message's texts, inside its blanks, since
    templates strip; and inside every name of a control token, which so stops being one."""

    def __init__(self, names: Names, taken: set[str]) -> None:
        self._names = names
        self._free = (chr(code) for code in range(FIRST, LAST + 1) if chr(code) not in taken)
        self.of: dict[str, Owner | None] = {}
        self._texts: dict[Owner, list[tuple[str, str, int]]] = {}
        """Of each field, for every text in it: the marks at both its ends, and how many letters it has."""

    def text(self, text: str, owner: Owner | None = None) -> str:
        """The text with its marks. Without an owner, only where a name of a control token could begin or end."""
        core = text.strip()
        if not core:
            return text
        start = len(text) - len(text.lstrip())
        stop = start + len(core)
        places = [start + place + 1 for place in self._names.starts(core)]
        if owner is not None or self._names.could_open(core):
            places.append(start)
        if owner is not None or self._names.could_close(core):
            places.append(stop)
        parts, last = [], 0
        for place in sorted(set(places)):
            parts += [text[last:place], self._mark(owner)]
            last = place
        if owner is not None:
            self._texts.setdefault(owner, []).append((parts[1], parts[-1], _letters(core)))
        return "".join([*parts, text[last:]])

    def value(self, value: Any, owner: Owner | None = None) -> Any:
        """JSON with every text in it marked. Keys have no owner."""
        if isinstance(value, str):
            return self.text(value, owner)
        if isinstance(value, Mapping):
            return {self.text(str(key)): self.value(item, owner) for key, item in value.items()}
        if isinstance(value, list | tuple):
            return [self.value(item, owner) for item in value]
        return value

    def read(self, rendered: str) -> Read:
        """Take the marks out again."""
        if not self.of:
            return Read(rendered, rendered, {}, ())
        parts = self._parts(rendered)
        places: dict[Owner, list[int]] = {}
        marks: list[int] = []
        length = 0
        for part, mark in zip(parts[::2], parts[1::2], strict=False):
            length += len(part)
            marks.append(length + len(marks))
            owner = self.of[mark]
            if owner is not None:
                places.setdefault(owner, []).append(length)
        found = {owner: tuple(where) for owner, where in places.items()}
        text, seen = "".join(parts[::2]), frozenset(parts[1::2])
        spans = {owner: text[where[0] : where[-1]] for owner, where in found.items()}
        cut = frozenset(owner for owner, span in spans.items() if self._is_cut(owner, seen, span))
        return Read(text, rendered, found, tuple(marks), cut, tuple(self._said(parts[1::2], marks)))

    def _said(self, seen: Sequence[str], marks: Sequence[int]) -> Iterator[tuple[int, int]]:
        """`marks`: where each of the marks `seen` stands among text and marks."""
        ends = {
            first: last for owner, texts in self._texts.items() if owner[1] in ("content", "thinking")
            for first, last, _ in texts
        }
        begun: dict[str, int] = {}
        for number, (mark, place) in enumerate(zip(seen, marks, strict=True)):
            if mark in begun:
                yield begun.pop(mark), place - number
            if mark in ends:
                begun[ends[mark]] = place - number

    def _is_cut(self, owner: Owner, seen: frozenset[str], written: str) -> bool:
        """Whether an end of a field is missing, or letters between its ends. `written`: what stands between the first
        and the last of its marks."""
        whole = [first in seen and last in seen for first, last, _ in self._texts[owner]]
        if owner[1] not in ("content", "thinking"):
            return not all(whole)
        # Reasoning stands under several names, of which a template reads one.
        return not any(whole) or _letters(written) < max(letters for *_, letters in self._texts[owner])

    def _parts(self, rendered: str) -> list[str]:
        """Text and marks by turns."""
        parts, last = [], 0
        for match in _PRIVATE.finditer(rendered):
            if match[0] in self.of:     # others are characters of somebody's text
                parts += [rendered[last : match.start()], match[0]]
                last = match.end()
        return [*parts, rendered[last:]]

    def _mark(self, owner: Owner | None) -> str:
        mark = next(self._free, None)
        if mark is None:
            raise UserError(
                "a conversation names control tokens too often",
                why=f"more than {LAST - FIRST:,} times: nothing is left to tell them from the template's",
                fix="leave the record out: data.bad_records=drop",
            )
        self.of[mark] = owner
        return mark


def _letters(text: str) -> int:
    """How many characters are no blanks: templates strip, and some join words anew."""
    return len("".join(text.split()))


class Names:
    """Names of control tokens, to be looked for in text."""

    def __init__(self, names: Sequence[str]) -> None:
        ordered = sorted(names, key=lambda name: (-len(name), name))
        self.pattern = re.compile("|".join(map(re.escape, ordered)) or r"(?!)")
        self._overlapping = re.compile(f"(?={self.pattern.pattern})")
        self._heads = {name[:cut] for name in names for cut in range(1, len(name))}
        self._tails = {name[cut:] for name in names for cut in range(1, len(name))}
        self._longest = max(map(len, names), default=0)

    def starts(self, text: str) -> Iterator[int]:
        """Where a name begins, names inside each other included."""
        return (match.start() for match in self._overlapping.finditer(text))

    def could_open(self, text: str) -> bool:
        """Whether the text begins with what could end a name."""
        return any(text[:length] in self._tails for length in range(1, min(self._longest, len(text) + 1)))

    def could_close(self, text: str) -> bool:
        """Whether the text ends with what could begin a name."""
        return any(text[-length:] in self._heads for length in range(1, min(self._longest, len(text) + 1)))


@dataclass(frozen=True)
class Form:
    """How a template reads messages."""

    parts: bool = False
    """A content is a list of parts, [{"type": "text", "text": ...}], and no text."""
    arguments_as_text: bool = False
    """A call's arguments are the text of their JSON, and no object."""


def as_values(
    messages: Sequence[Message], marker: Marker | None = None, form: Form = Form()
) -> list[dict[str, Any]]:
    """Messages as templates read them, marked if there is a marker. What a message lacks is not there."""
    return [_as_value(place, message, marker, form) for place, message in enumerate(messages)]


def fields_of(message: Message) -> Iterator[str]:
    """The fields of a message that hold text to be rendered."""
    if message.content.strip():
        yield "content"
    if message.thinking is not None and message.thinking.strip():
        yield "thinking"
    for number in range(len(message.tool_calls)):
        yield f"tool call {number + 1}"


def characters(value: Any) -> Iterator[str]:
    """Every text in a JSON value."""
    if isinstance(value, str):
        yield value
    elif isinstance(value, Mapping):
        for key, item in value.items():
            yield str(key)
            yield from characters(item)
    elif isinstance(value, list | tuple):
        for item in value:
            yield from characters(item)


def _as_value(place: int, message: Message, marker: Marker | None, form: Form) -> dict[str, Any]:
    def own(text: str, field: str) -> str:
        return text if marker is None else marker.text(text, (place, field))

    def foreign(value: Any) -> Any:
        return _plain(value) if marker is None else marker.value(value)

    content = own(message.content, "content")
    told: dict[str, Any] = {
        "role": message.role, "content": [{"type": "text", "text": content}] if form.parts else content
    }
    if message.thinking is not None:
        told |= {name: own(message.thinking, "thinking") for name in ("reasoning_content", "thinking")}
    if message.tool_calls:
        told["tool_calls"] = [
            _call(call, marker, (place, f"tool call {number + 1}")) for number, call in enumerate(message.tool_calls)
        ]
        if form.arguments_as_text:
            told["tool_calls"] = [_with_text(call) for call in told["tool_calls"]]
    if message.name is not None:
        told["name"] = foreign(message.name)
    if message.tool_call_id is not None:
        told["tool_call_id"] = foreign(message.tool_call_id)
    return told


def _call(call: Mapping[str, Any], marker: Marker | None, owner: Owner) -> dict[str, Any]:
    if marker is None:
        return dict(_plain(call))
    told = {key: marker.value(value) for key, value in call.items() if key != "function"}
    function = call.get("function")
    if not isinstance(function, Mapping):
        return {key: marker.value(value, owner) for key, value in call.items()}
    marked = {key: marker.value(value, owner) for key, value in function.items()}
    return {key: marked if key == "function" else told[key] for key in call}


def _with_text(call: Mapping[str, Any]) -> dict[str, Any]:
    function = call.get("function")
    if not isinstance(function, Mapping) or isinstance(function.get("arguments"), str):
        return dict(call)
    arguments = json.dumps(function.get("arguments", {}), ensure_ascii=False)
    return {**call, "function": {**function, "arguments": arguments}}


def _plain(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {str(key): _plain(item) for key, item in value.items()}
    return [_plain(item) for item in value] if isinstance(value, list | tuple) else value
