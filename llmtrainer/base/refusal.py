"""What pydantic found wrong, told by dotted name, origin, what exists and the nearest name."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Literal, get_args, get_origin

from pydantic import ValidationError
from pydantic_core import ErrorDetails

from llmtrainer.base.errors import UserError
from llmtrainer.base.explain import type_name
from llmtrainer.base.part import Config, Kind, known_keys, part_at
from llmtrainer.base.text import item_type, members, nearest


def refusal(
    error: ValidationError, config_type: type[Config], data: Any, origins: Mapping[str, str]
) -> UserError:
    """The first thing to mend. Unknown keys come first: they are often why another one is missing."""
    found = error.errors(include_url=False)
    first = min(found, key=lambda item: item["type"] != "extra_forbidden")
    path = _place(first, data)
    dotted = ".".join(path)
    where = next(
        (origins[".".join(path[:n])] for n in range(len(path), 0, -1) if ".".join(path[:n]) in origins), None
    )
    if first["type"] == "extra_forbidden":
        return unknown_key(config_type, path, data, where)
    if first["type"] == "missing":
        wanted = type_name(_annotation(config_type, path, data))
        return UserError(
            f"`{dotted}` is missing", where=where, why=_help(config_type, path, data), fix=f"{dotted}=<{wanted}>"
        )
    cause = first.get("ctx", {}).get("error")
    if isinstance(cause, UserError):
        what = cause.what if not dotted or dotted in cause.what else f"`{dotted}`: {cause.what}"
        return UserError(what, where=cause.where or where, why=cause.why, fix=cause.fix)
    return _wrong_value(first, config_type, path, data, where)


def unknown_key(config_type: type[Config], path: Sequence[str], data: Any, where: str | None) -> UserError:
    """The refusal of a key that its part does not have."""
    owner = part_at(config_type, path[:-1], data)
    keys = known_keys(owner, value_at(data, path[:-1]))
    near = nearest(path[-1], keys)
    fix = f"did you mean `{near}`?" if near else None
    elsewhere = [name for name in all_keys(config_type, data) if name.rpartition(".")[2] == path[-1]]
    if near is None and elsewhere:
        fix = f"did you mean `{elsewhere[0]}`?"
    if isinstance(owner, type) and issubclass(owner, Config):
        fix = owner.known_elsewhere.get(path[-1], fix)
    why = f"{_name(owner)} has: {', '.join(keys)}" if keys else f"{type_name(owner)} has no keys"
    return UserError(f"unknown key `{'.'.join(path)}`", where=where, why=why, fix=fix)


def all_keys(annotation: Any, data: Any, prefix: str = "", above: tuple[Any, ...] = ()) -> list[str]:
    """Every dotted key there is, of the kinds that `data` chooses."""
    found: list[str] = []
    owner = part_at(annotation, (), data)
    if owner in above:      # a part may hold parts of its own class
        return found
    for key in known_keys(annotation, data):
        below = owner.model_fields[key].annotation if key in owner.model_fields else str
        found += [prefix + key, *all_keys(below, value_at(data, (key,)), f"{prefix}{key}.", (*above, owner))]
    return found


def _wrong_value(
    found: ErrorDetails, config_type: type[Config], path: Sequence[str], data: Any, where: str | None
) -> UserError:
    given, annotation = value_at(data, path), _annotation(config_type, path, data)
    shown = f"`{given}`" if isinstance(given, str) else f"{given!r}"
    message = found["msg"].removeprefix("Input ").removeprefix("Value error, ")
    structural = found["type"].endswith("_type") or found["type"] in ("literal_error", "is_instance_of")
    why = f"a value here is: {type_name(annotation)}" if structural and annotation is not None else message
    options = [str(option) for item in members(annotation) for option in get_args(item) if get_origin(item) is Literal]
    near = nearest(str(given), options)
    fix = f"did you mean `{near}`?" if near else None
    if isinstance(annotation, type) and issubclass(annotation, Kind) and isinstance(given, str):
        fix = f"write `{path[-1]}: {{kind: {given}}}`"
        if path[-1].isdecimal():
            fix = f"write `{{kind: {given}}}` in its place, as in {'.'.join(path[:-1])}='[{{kind: {given}}}]'"
    return UserError(f"`{'.'.join(path)}` is {shown}" if path else message, where=where, why=why, fix=fix)


def _annotation(config_type: type[Config], path: Sequence[str], data: Any) -> Any:
    """The annotation as written, all its alternatives included."""
    if not path:
        return config_type
    owner = part_at(config_type, path[:-1], data)
    if isinstance(owner, type) and issubclass(owner, Config):
        field = owner.model_fields.get(path[-1])
        return field.annotation if field is not None else None
    return item_type(owner, path[-1])


def _place(found: ErrorDetails, data: Any) -> tuple[str, ...]:
    """The dotted place of an error, without the names that pydantic adds for the alternatives of a union."""
    path: tuple[str, ...] = ()
    for step in found["loc"]:
        if _holds(value_at(data, path), step) or (found["type"] == "missing" and step == found["loc"][-1]):
            path = (*path, str(step))
    return path


def _holds(data: Any, step: str | int) -> bool:
    return step in data if isinstance(data, dict) else isinstance(data, list) and isinstance(step, int)


def value_at(data: Any, path: Sequence[str]) -> Any:
    """What was given at a dotted place, or None."""
    for key in path:
        if isinstance(data, dict):
            data = data.get(key)
        elif isinstance(data, list) and key.isdecimal() and int(key) < len(data):
            data = data[int(key)]
        else:
            return None
    return data


def _help(config_type: type[Config], path: Sequence[str], data: Any) -> str | None:
    owner = part_at(config_type, path[:-1], data)
    assert isinstance(owner, type) and issubclass(owner, Config)
    text = owner.model_fields[path[-1]].description
    return " ".join(text.split()) if text else None


def _name(owner: Any) -> str:
    return owner.__name__ if isinstance(owner, type) else str(owner)
