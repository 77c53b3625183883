"""Which format a file has, told by its first records."""

from __future__ import annotations

import itertools
import json
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass
from functools import cache
from typing import Any, Generic, TypeVar

from llmtrainer.base.errors import UserError
from llmtrainer.base.kinds import find_kind, kinds_in
from llmtrainer.core.example import Comparison, Example, Message
from llmtrainer.data import stdlib
from llmtrainer.data.document import Reading, SourceFile
from llmtrainer.data.format import Format, RecordFormat
from llmtrainer.data.records import Record, first_value, holding

FIRST = 16
"""Records that a file is known by."""
_SHOWN = 160
"""Characters of a text in what is printed."""


Known = TypeVar("Known", bound=RecordFormat)


@dataclass(frozen=True)
class Detected(Generic[Known]):
    """What a file was found to be."""

    format: Known
    how: str
    """For people: the format, how it is known, and the first example."""


def detect(wanted: Known, found: Iterable[Record], *, bad_may_drop: bool = False) -> Detected[Known] | None:
    """The format of a file with these records: the one that is wanted, or, for `auto`, the only one that the first
    records fit. None for a file without records. `bad_may_drop`: a record that fits no format does not count. Raises
    UserError where none or several fit."""
    first = list(itertools.islice(found, FIRST))
    known: tuple[Known, ...] = formats(type(wanted).base())
    if bad_may_drop:
        first = [record for record in first if any(item.matches(record.value) for item in known)] or first
    if not first:
        return None
    chosen = wanted if wanted.kind != "auto" else _only(known, first)
    record, example = _shown_first(chosen, first, bad_may_drop)
    how = "as named" if wanted.kind != "auto" else f"known by {', '.join(_keys(record.value))}"
    return Detected(chosen, f"format {chosen.kind} ({how}); {record.place}, becomes:\n{shown(example)}")


def _shown_first(format: RecordFormat, first: list[Record], bad_may_drop: bool) -> tuple[Record, Any]:
    """The first record that can be shown, and its example; of none the fault of the first."""
    for record in first if bad_may_drop else ():
        try:
            return record, placed(format, record)
        except UserError:    # counted when its turn comes
            continue
    return first[0], placed(format, first[0])


def conversations_in(
    name: str, files: Sequence[SourceFile], fields: tuple[str, ...], warn: Callable[[str], None]
) -> list[SourceFile]:
    """Of the files that `name` stands for, those that hold conversations; none where they are documents of text.

    Told by the first record there is: an object without a text under `fields`, or a list that a format fits. YAML
    may be anything, so that a format must fit its objects as well. Source code is text, unless the questions about
    the standard library are asked for by their name.
    """
    if stdlib.means_questions(name):
        return list(files)
    known = [file for file in files if file.path.suffix != ".py"]
    first, file = next(((value, file) for file in known if (value := first_value(file)) is not None), (None, None))
    if isinstance(first, dict) and Reading(fields).chosen(list(first)):
        return []
    certain = isinstance(first, dict) and file is not None and file.path.suffix not in (".yaml", ".yml")
    return holding(files, warn) if certain or any(format.matches(first) for format in formats()) else []


def placed(format: RecordFormat, record: Record) -> Any:
    """What a record holds, in the format's own class; an error says where the record stands."""
    if isinstance(record.value, UserError):
        raise record.value
    try:
        return format.example(record.value)
    except UserError as error:
        error.where = record.place if error.where is None else f"{record.place}, {error.where}"
        raise


def shown(example: Example | Comparison) -> str:
    """An example for people, a line a message, long texts shortened."""
    if isinstance(example, Comparison):
        return _compared(example)
    lines = ["  without a template: what is read, then what is learned"] if example.plain else []
    lines += _tools(example) + [_line(message) for message in example.messages]
    return "\n".join(lines)


def _compared(comparison: Comparison) -> str:
    if comparison.ids:
        prompt, *answers = (len(ids) for ids in comparison.ids)
        return f"  {prompt:,} tokens of the prompt; then, the best first, {', '.join(f'{n:,}' for n in answers)}"
    lines = ["  without a template: what is read, then each answer"] if comparison.plain else []
    lines += _tools(comparison) + [_line(message) for message in comparison.prompt]
    for place, answer in enumerate(comparison.answers):
        if comparison.liked is not None:
            title = "liked" if comparison.liked else "not liked"
        elif comparison.grade is not None:
            title = f"graded {_classes(*comparison.grade)}"
        elif comparison.paired:
            title = f"pair {place // 2 + 1}, the {'worse' if place % 2 else 'better'}"
        elif comparison.scores:
            title = f"answer {place + 1}, score {comparison.scores[place]:g}"
        else:
            title = f"answer {place + 1}, the {'best' if place == 0 else 'next'}"
        lines += [f"  -- {title}", *(_line(message) for message in answer)]
    return "\n".join(lines)


def _classes(low: int, high: int) -> str:
    return f"class {low}" if high == low + 1 else f"class {low} to {high - 1}"


def _tools(example: Example | Comparison) -> list[str]:
    return [f"  tools: {', '.join(_name(tool) for tool in example.tools)}"] if example.tools else []


def _line(message: Message) -> str:
    told = message.content
    if message.thinking:
        told = f"({short(message.thinking)}) {told}"
    for call in message.tool_calls:
        told += f"{_name(call)}({json.dumps(call['function']['arguments'], ensure_ascii=False)})"
    return f"  {message.role}: {short(told)}"


def plain(example: Example) -> dict[str, Any]:
    """An example as JSON can say it."""
    return asdict(example)


def _only(known: tuple[Known, ...], first: list[Record]) -> Known:
    fits = [format for format in known if all(format.matches(record.value) for record in first)]
    if len(fits) == 1:
        return fits[0]
    if not fits:
        _require_one(known, first)
    odd = next((record for record in first if not any(format.matches(record.value) for format in known)), first[0])
    if (meant := _meant(known, first, odd)) is not None:
        placed(meant, odd)    # says which key is missing or wrong
    keys = ", ".join(_keys(odd.value))
    if not fits:
        raise UserError(
            "no format fits these records", where=odd.place, why=f"this one has {keys}",
            fix=f"name the format, format=KIND (in a recipe data.format): {', '.join(item.kind for item in known)}",
        )
    names = " or ".join(f"format={item.kind}" for item in fits)
    raise UserError(
        f"{len(fits)} formats fit these records", where=odd.place, why=f"they have {keys}",
        fix=f"name the one that is meant (in a recipe data.format): {names}",
    )


def _require_one(known: tuple[Known, ...], first: list[Record]) -> None:
    """Refuse records of which each fits a format, and all of them none."""
    kinds = [[format.kind for format in known if format.matches(record.value)] for record in first]
    if not all(kinds):
        return
    other = next(place for place, found in enumerate(kinds) if not set(found) & set(kinds[0]))
    raise UserError(
        "the records are of different formats", where=first[other].place,
        why=f"this one is {' or '.join(kinds[other])}, and {first[0].place} is {' or '.join(kinds[0])}",
        fix="one format a file: keep the others in files of their own, and name all of them",
    )


def _meant(known: tuple[Known, ...], first: list[Record], odd: Record) -> Known | None:
    """The format of a file in which one of the first records is wrong: the only one that any of them fits; or where
    none fits any, the only one that has a name for a key of the wrong one."""
    fits = [format for format in known if any(format.matches(record.value) for record in first)]
    if not fits and isinstance(odd.value, dict):
        named = ((format, vars(format).values()) for format in known)
        fits = [format for format, keys in named if any(key in odd.value for key in keys)]
    return fits[0] if len(fits) == 1 else None


@cache
def formats(base: type[Any] = Format) -> tuple[Any, ...]:
    """Every format of a folder, with its own names of keys."""
    return tuple(find_kind(base, base.folder, kind)() for kind in kinds_in(base.folder) if kind != "auto")


def _keys(value: Any) -> list[str]:
    if isinstance(value, dict):
        return [f"`{key}`" for key in list(value)[:12]] or ["no key"]
    return [f"a list of {len(value)}"] if isinstance(value, list) else [f"a {type(value).__name__}"]


def short(text: str) -> str:
    """A text for people, on one line and not too long."""
    line = text.replace("\n", "\\n")
    line = "".join(letter if letter.isprintable() else "?" for letter in line)
    return line if len(line) <= _SHOWN else f"{line[:_SHOWN]} ... ({len(text):,} characters)"


def _name(tool: Any) -> str:
    inner = tool.get("function") if isinstance(tool.get("function"), dict) else tool
    return str(inner.get("name", "?"))
