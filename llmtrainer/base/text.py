"""Text into values: the annotation of a field decides what a scalar is, never the look of the text."""

from __future__ import annotations

import difflib
import io
import json
import re
import types
from collections.abc import Iterable, Mapping
from functools import lru_cache
from pathlib import Path
from typing import Annotated, Any, Literal, Union, get_args, get_origin

from llmtrainer.base.errors import UserError

COMMAND_LINE = "command line"

_NULL = {"~", "null", "Null", "NULL"}
_BOOL = {"true": True, "True": True, "TRUE": True, "false": False, "False": False, "FALSE": False}
_INT = re.compile(r"[-+]?[0-9]+(_[0-9]+)*")
_FLOAT = re.compile(r"[-+]?(\.[0-9]+|[0-9]+(_[0-9]+)*(\.[0-9]*)?)([eE][-+]?[0-9]+)?")
_TAGS = {
    f"tag:yaml.org,2002:{name}"
    for name in ("null", "bool", "int", "float", "str", "map", "seq", "timestamp", "value")
}


class Text(str):
    """A scalar as it was written, without quotes: what it means is not known before its annotation is."""

    __slots__ = ()


def read_yaml(text: str, name: str) -> tuple[dict[str, Any], dict[str, str]]:
    """The mapping a YAML document holds, its bare scalars still Text, and the origin `name:line` of every value
    by dotted name. Refuses duplicate keys, tags and everything that is no mapping."""
    from ruamel.yaml.error import MarkedYAMLError, YAMLError

    try:
        root = _composed(text)
    except MarkedYAMLError as error:
        line = f":{error.problem_mark.line + 1}" if error.problem_mark else ""
        raise UserError(f"`{name}` is no YAML: {error.problem}", where=f"{name}{line}") from None
    except YAMLError as error:
        raise UserError(f"`{name}` is no YAML: {str(error).splitlines()[0]}", where=name) from None
    if root is None:
        return {}, {}
    origins: dict[str, str] = {}
    value = _built(root, name, (), origins, frozenset())
    if not isinstance(value, dict):
        raise UserError(f"`{name}` holds no keys", where=f"{name}:1", fix="write `key: value`, one a line")
    return value, origins


@lru_cache(maxsize=8)
def _composed(text: str) -> Any:
    """ruamel's tree of a document, which nobody may change: a recipe is read several times, at 0.1 ms a line."""
    from ruamel.yaml import YAML

    return YAML(typ="safe", pure=True).compose(text)


def read_yaml_file(path: Path) -> tuple[dict[str, Any], dict[str, str]]:
    """As `read_yaml`, from a UTF-8 file."""
    try:
        return read_yaml(path.read_text(encoding="utf-8"), str(path))
    except (FileNotFoundError, NotADirectoryError):
        beside = [item.name for item in path.parent.glob("*.y*ml")] if path.parent.is_dir() else []
        raise UserError(f"there is no file `{path}`", fix=did_you_mean(path.name, beside)) from None
    except (IsADirectoryError, PermissionError) as error:
        raise UserError(f"`{path}` cannot be read: {error.strerror}") from None
    except UnicodeDecodeError as error:
        raise UserError(f"`{path}` is not UTF-8", where=f"{path}, byte {error.start:,}") from None


def top_of_yaml(path: Path) -> dict[str, bool] | None:
    """The keys at the top of a YAML file, and whether a list stands under each; the key "" for a file that is a list
    itself. None where it is not to be told. Reads no further than it must: such a file may be large."""
    from ruamel.yaml import YAML
    from ruamel.yaml.error import YAMLError
    from ruamel.yaml.events import MappingStartEvent, ScalarEvent, SequenceStartEvent

    found: dict[str, bool] = {}
    depth, key = 0, None
    try:
        with path.open(encoding="utf-8") as stream:
            for event in YAML(typ="safe", pure=True).parse(stream):
                begins, ends = isinstance(event, MappingStartEvent | SequenceStartEvent), "End" in type(event).__name__
                if depth == 0 and isinstance(event, SequenceStartEvent):
                    return {"": True}
                if depth == 1 and not ends:
                    if key is not None:
                        found[key], key = isinstance(event, SequenceStartEvent), None
                    elif isinstance(event, ScalarEvent):
                        key = str(event.value)
                depth += begins - (ends and depth > 0)
    except (YAMLError, OSError, UnicodeDecodeError, RecursionError):
        return None
    return found


def read_flow(text: str, dotted: str, origin: str) -> tuple[Any, dict[str, str]]:
    """The value of `[...]` or `{...}` written on a command line, and origins for every name below `dotted`."""
    data, inner = read_yaml(f"value: {text}", origin)
    return data["value"], {dotted + key.removeprefix("value"): origin for key in inner}


def write_yaml(data: dict[str, Any]) -> str:
    """Block YAML of plain values that `read_yaml` reads back, each text quoted where it would be something else."""
    return _written(json.dumps(data))


@lru_cache(maxsize=8)
def _written(data: str) -> str:
    """From JSON: a recipe is written where a run begins, and its text is asked for by whatever says what made it."""
    from ruamel.yaml import YAML
    from ruamel.yaml.representer import SafeRepresenter

    class Representer(SafeRepresenter):
        """A class of its own: representers belong to a class, and ruamel's may be in use elsewhere."""

    Representer.add_representer(str, _represented)
    yaml, stream = YAML(typ="safe", pure=True), io.StringIO()
    yaml.Representer = Representer
    yaml.default_flow_style = False
    yaml.sort_base_mapping_type_on_output = False   # type: ignore[assignment]   # ruamel leaves it untyped
    yaml.width = 2**20      # no folding: a folded text is hard to search for
    yaml.allow_unicode = True
    yaml.dump(json.loads(data), stream)
    return stream.getvalue()


def _represented(representer: Any, text: str) -> Any:    # Any: ruamel leaves both untyped
    # Outside double quotes some characters are line ends to YAML, U+0085 among them, and come back as a blank.
    style = None if text.isprintable() else '"'
    return representer.represent_scalar("tag:yaml.org,2002:str", text, style=style)


def _built(node: Any, file: str, at: tuple[str, ...], origins: dict[str, str], above: frozenset[int]) -> Any:
    """A node of ruamel's tree as dicts, lists and scalars."""
    line = f"{file}:{node.start_mark.line + 1}"
    if str(node.tag) not in _TAGS or id(node) in above:
        what = "contains itself" if id(node) in above else f"has the tag `{node.tag}`"
        raise UserError(f"`{'.'.join(at) or file}` {what}", where=line, why="a config file holds plain data")
    origins.setdefault(".".join(at), line)
    if isinstance(node.value, str):
        if node.style is not None:
            return str(node.value)
        return Text(node.value) if node.value else None
    above = above | {id(node)}
    if node.id == "sequence":
        return [_built(item, file, (*at, str(i)), origins, above) for i, item in enumerate(node.value)]
    found: dict[str, Any] = {}
    for key_node, value_node in node.value:
        if not isinstance(key_node.value, str):
            raise UserError("a key must be text", where=f"{file}:{key_node.start_mark.line + 1}")
        key, place = str(key_node.value), (*at, key_node.value)
        line = f"{file}:{key_node.start_mark.line + 1}"
        if key in found:
            first = origins[".".join(place)]
            raise UserError(f"`{'.'.join(place)}` is given twice", where=f"{first} and {line}", fix="keep one")
        origins[".".join(place)] = line
        found[key] = _built(value_node, file, place, origins, above)
    return found


def members(annotation: Any) -> tuple[Any, ...]:
    """The alternatives of an annotation: (int, NoneType) for `int | None`."""
    origin = get_origin(annotation)
    if origin is Annotated:
        return members(get_args(annotation)[0])
    if origin in (Union, types.UnionType):
        return tuple(inner for item in get_args(annotation) for inner in members(item))
    return (annotation,)


def typed(annotation: Any, value: Any) -> Any:
    """`value` with every Text in it turned into what `annotation` wants there, lists into tuples, and text into
    paths. What does not fit is handed on as it is: to refuse it is pydantic's part."""
    wanted = members(annotation)
    if isinstance(value, Text):
        return _scalar(wanted, value)
    for item in wanted:
        origin, arguments = get_origin(item) or item, get_args(item)
        if isinstance(value, list | tuple) and origin in (tuple, frozenset):
            return origin(typed(_item_type(arguments, place), inner) for place, inner in enumerate(value))
        if isinstance(value, dict) and isinstance(origin, type) and issubclass(origin, Mapping):
            key_type, value_type = arguments or (str, Any)
            return {typed(key_type, Text(key)): typed(value_type, inner) for key, inner in value.items()}
    if Any in wanted and isinstance(value, dict):
        return {str(key): typed(Any, inner) for key, inner in value.items()}
    if Any in wanted and isinstance(value, list):
        return [typed(Any, inner) for inner in value]
    # An empty path would be the working directory: left as text, it is refused.
    if isinstance(value, str) and value and Path in wanted and str not in wanted:
        return Path(value)
    return value


def item_type(annotation: Any, key: str) -> Any:
    """What stands at `key` inside a tuple or a mapping, or None if `annotation` is neither."""
    for item in members(annotation):
        origin, arguments = get_origin(item) or item, get_args(item)
        if origin in (tuple, frozenset) and key.isdecimal():
            return _item_type(arguments, int(key))
        if isinstance(origin, type) and issubclass(origin, Mapping):
            return arguments[1] if arguments else Any
    return None


def is_text(annotation: Any) -> bool:
    """Whether a bare text fits as it stands and no list, mapping or part does."""
    wanted = members(annotation)
    return bool({str, Path} & set(wanted)) and all(isinstance(item, type) and item in _PLAIN for item in wanted)


def nearest(word: str, options: Iterable[str], cutoff: float = 0.5) -> str | None:
    """The option most like `word`, if any is: a share of `cutoff` of their letters agrees."""
    # 0.5 still finds a name of two letters with one of them wrong; difflib's own 0.6 does not.
    return next(iter(difflib.get_close_matches(word, list(options), n=1, cutoff=cutoff)), None)


def did_you_mean(word: str, options: Iterable[str]) -> str | None:
    """The `fix` of an error about an unknown name."""
    near = nearest(word, options)
    return f"did you mean `{near}`?" if near else None


_PLAIN = (str, Path, type(None), int, float, bool)


def _item_type(arguments: tuple[Any, ...], place: int) -> Any:
    """The annotation at `place` in `tuple[X, ...]`, `tuple[X, Y]` or `frozenset[X]`, given what is in brackets."""
    if not arguments:
        return Any
    return arguments[0] if arguments[1:] in ((), (...,)) else arguments[min(place, len(arguments) - 1)]


def _scalar(wanted: tuple[Any, ...], text: Text) -> Any:
    """What the bare text means where `wanted` stands. The order is that of narrowness: None, a listed option,
    a boolean, a number, then text."""
    if Any in wanted:
        wanted = (type(None), bool, int, float, str)
    if type(None) in wanted and text in _NULL:
        return None
    for option in (option for item in wanted if get_origin(item) is Literal for option in get_args(item)):
        if text == (str(option).lower() if isinstance(option, bool | None) else str(option)):
            return option
    if bool in wanted and text in _BOOL:
        return _BOOL[text]
    if int in wanted and _INT.fullmatch(text):
        return int(text)
    if float in wanted and _FLOAT.fullmatch(text):
        return float(text)
    if str in wanted:
        return str(text)
    for item in wanted:
        arguments = get_args(item)
        if get_origin(item) is tuple and arguments[1:] == (...,) and text not in _NULL:
            return tuple(typed(arguments[0], Text(piece.strip())) for piece in text.split(","))
    return Path(text) if Path in wanted and text else str(text)
