"""Field docstrings as help: what a value means, what it may be, and where it came from."""

from __future__ import annotations

import inspect
import json
import textwrap
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Literal, get_args, get_origin

from llmtrainer.base.kinds import kinds_in, name_of
from llmtrainer.base.part import Config, Kind, part_at
from llmtrainer.base.result import plain
from llmtrainer.base.text import item_type, members

REQUIRED = "(required)"
WIDTH = 100
_WORDS: dict[Any, str] = {
    str: "text", int: "whole number", float: "number", bool: "true | false", type(None): "null", Any: "anything",
}


@dataclass(frozen=True)
class Entry:
    """All there is to know about one key."""

    key: str
    value: Any
    """As YAML would have it; `(required)` where there is no default."""
    type: str
    help: str
    origin: str = "default"
    file: str | None = None
    """Of a kind: where its class is written."""

    def text(self) -> str:
        """Two lines or more: the value with its origin and type, then the help, indented."""
        shown = self.value if isinstance(self.value, str) else json.dumps(self.value, ensure_ascii=False)
        head = f"{self.key} = {shown}" + ("" if self.origin == "default" else f"    <- {self.origin}")
        lines = textwrap.wrap(f"{self.type}. {self.help}", WIDTH - 4)
        return "\n".join([head, *(f"    {line}" for line in lines)])


def entries(config: Config, origins: Mapping[str, str]) -> list[Entry]:
    """Every value of a config with its origin and its help, in the order of the fields."""
    return [
        Entry(item.key, item.value, item.type, item.help, origins.get(item.key, "default"), item.file)
        for item in _entries(type(config), config, "")
    ]


def key_entries(config_type: type[Config]) -> list[Entry]:
    """Every key of a config class with its default and its help; parts without a default show their default kind,
    items of a list of parts stand under `0`."""
    return list(_entries(config_type, None, ""))


def help_lines(config_type: type[Config]) -> list[str]:
    """`key_entries` for people, and first what the class is about."""
    return [textwrap.indent(entry.text(), "  ") for entry in key_entries(config_type)]


def type_name(annotation: Any) -> str:
    """What may be written there, in words: `whole number | null`, `list of text`, `kind of Objective`."""
    return " | ".join(_type_name(item) for item in members(annotation))


def summary(documented: Any) -> str:
    """The first paragraph of a docstring on one line; empty if there is none."""
    return " ".join((inspect.getdoc(documented) or "").split("\n\n")[0].split())


def _entries(owner: type[Config], config: Config | None, prefix: str, above: tuple[type, ...] = ()) -> Iterator[Entry]:
    """Of one part: `config` has its values, or it is None and they are the defaults."""
    if issubclass(owner, Kind):
        yield _kind_entry(owner, prefix)
    for name, field in owner.model_fields.items():
        key = prefix + name
        default = REQUIRED if field.is_required() else field.get_default(call_default_factory=True)
        value = default if config is None else config.__dict__[name]
        inner = list(_parts_below(field.annotation, value, whole=config is None))
        if not inner or (isinstance(value, tuple | dict) and config is None):
            yield Entry(key, plain(value), type_name(field.annotation), " ".join((field.description or "").split()))
        for below, part, part_type in inner:
            # Values end somewhere; a class that may hold its own kind does not.
            if part is not None or part_type not in (*above, owner):
                yield from _entries(part_type, part, f"{key}{below}.", (*above, owner))


def _parts_below(annotation: Any, value: Any, whole: bool) -> Iterator[tuple[str, Config | None, type[Config]]]:
    """The parts in a field: those that `value` holds or, if it holds none and `whole` is asked, what it may hold."""
    if isinstance(value, Config):
        yield "", value, type(value)
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, tuple) else ()
    held = [(f".{key}", item, type(item)) for key, item in items if isinstance(item, Config)]
    yield from held
    if whole and not held and not isinstance(value, Config):
        for below, possible in (("", annotation), (".0", item_type(annotation, "0"))):
            found = part_at(possible, (), {})
            if isinstance(found, type) and issubclass(found, Config):
                yield below, None, found


def _kind_entry(owner: type[Kind], prefix: str) -> Entry:
    kinds = f"kind of {owner.base().__name__}: {' | '.join(kinds_in(owner.folder))}, or a dotted path"
    name = REQUIRED if owner is owner.base() else name_of(owner, owner.folder)
    return Entry(f"{prefix}kind", name, kinds, summary(owner), file=inspect.getsourcefile(owner))


def _type_name(item: Any) -> str:
    origin, arguments = get_origin(item), get_args(item)
    if item in _WORDS:
        return _WORDS[item]
    if origin is Literal:
        return " | ".join(str(option) for option in arguments)
    if origin in (tuple, frozenset, list):
        alike = arguments[1:] in ((), (...,))
        return f"list of {type_name(arguments[0])}" if alike else f"[{', '.join(map(type_name, arguments))}]"
    if origin is not None and len(arguments) == 2:
        return f"{type_name(arguments[1])} by name"
    if isinstance(item, type) and issubclass(item, Kind):
        return f"kind of {item.__name__}"
    name = str(getattr(item, "__name__", item))
    return name if isinstance(item, type) and issubclass(item, Config) else name.lower()
