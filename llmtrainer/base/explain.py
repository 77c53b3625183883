"""Field docstrings as help: what a value means, what it may be, and where it came from."""

from __future__ import annotations

from typing import Any, Literal, get_args, get_origin

from llmtrainer.base.kinds import kinds_in
from llmtrainer.base.part import Config, Kind, part_at
from llmtrainer.base.text import members

_WORDS = {
    str: "text", int: "whole number", float: "number", bool: "true | false", type(None): "null", Any: "anything",
}


def type_name(annotation: Any) -> str:
    """What may be written there, in words: `whole number | null`, `list of text`, `kind of Objective`."""
    return " | ".join(_type_name(item) for item in members(annotation))


def _type_name(item: Any) -> str:
    origin, arguments = get_origin(item), get_args(item)
    if item in _WORDS:
        return _WORDS[item]
    if origin is Literal:
        return " | ".join(str(option) for option in arguments)
    if origin in (tuple, frozenset, list):
        return f"list of {type_name(arguments[0])}" if arguments[1:] in ((), (...,)) else (
            f"[{', '.join(map(type_name, arguments))}]")
    if origin is dict or (isinstance(origin, type) and issubclass(origin, dict)):
        return f"{type_name(arguments[1])} by name"
    if isinstance(item, type) and issubclass(item, Kind):
        return f"kind of {item.__name__}"
    return item.__name__ if isinstance(item, type) and issubclass(item, Config) else _lower(item)


def _lower(item: Any) -> str:
    return str(getattr(item, "__name__", item)).lower()
