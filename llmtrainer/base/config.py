"""Configuration: YAML and dotted overrides become one frozen pydantic model; a kind is a file name."""

from __future__ import annotations

import re
from collections.abc import Collection, Sequence
from pathlib import Path
from typing import Any, TypeVar

from pydantic import ValidationError
from pydantic.json_schema import GenerateJsonSchema

from llmtrainer.base.errors import UserError
from llmtrainer.base.part import Config, Kind, count_as_read, forget_reads, known_keys, leaves, part_at, unread
from llmtrainer.base.refusal import all_keys, refusal, unknown_key, value_at
from llmtrainer.base.result import plain
from llmtrainer.base.text import (
    COMMAND_LINE,
    Text,
    is_text,
    item_type,
    nearest,
    read_flow,
    read_yaml_file,
    top_of_yaml,
    write_yaml,
)

__all__ = [
    "Config", "Kind", "count_as_read", "dump", "forget_reads", "is_data", "leaves", "load", "load_with_origins",
    "schema", "sorted_words", "unread",
]

Some = TypeVar("Some", bound=Config)


def load(
    config_type: type[Some],
    file: str | Path | None = None,
    overrides: Sequence[str] = (),
    words: Sequence[str] = (),
) -> Some:
    """The config that a YAML file, then bare words, then `key=value` overrides describe; what comes later wins.

    Raises UserError with the dotted name, its origin, what exists and the nearest name.
    """
    return load_with_origins(config_type, file, overrides, words)[0]


def load_with_origins(
    config_type: type[Some],
    file: str | Path | None = None,
    overrides: Sequence[str] = (),
    words: Sequence[str] = (),
) -> tuple[Some, dict[str, str]]:
    """As `load`, with the origin of every value by dotted name: `default`, `recipe.yaml:7` or `command line`."""
    data, origins = read_yaml_file(Path(file)) if file is not None else ({}, {})
    given = {_spelled(config_type, override.partition("=")[0], data) for override in overrides}
    for name, value in _by_word(config_type, words, given).items():
        _put(data, origins, (name,), value, {name: COMMAND_LINE})
    for override in overrides:
        key, equals, text = override.partition("=")
        if not equals:
            raise UserError(f"`{override}` is no override", where=COMMAND_LINE, fix=f"write `{override}=value`")
        _override(config_type, data, origins, _spelled(config_type, key, data), text)
    try:
        config = config_type.model_validate(data)
    except ValidationError as error:
        raise refusal(error, config_type, data, origins) from None
    forget_reads(config)
    return config, {name: _origin(config_type, name, data, origins) for name, _ in leaves(config)}


def sorted_words(
    config_type: type[Config], arguments: Sequence[str]
) -> tuple[Path | None, list[str], list[str]]:
    """A command line as (file, overrides, bare words).

    A first word that ends in .yaml or .yml is the file, unless it is an override, or holds data where the verb reads
    some. A word is an override only if what stands before its first `=` is a key; `--key value` and `--key=value`
    always are. What follows `--` is bare. A word that is nearly an override is refused, lest a misspelled key become
    a prompt. Where a config ends in a command, its first bare word and all after it are left as they are.
    """
    rest, file, overrides, words = list(arguments), None, list[str](), list[str]()
    bare: list[str] = []
    if "--" in rest and not config_type.ends_in_command:
        rest, bare = rest[: rest.index("--")], rest[rest.index("--") + 1 :]
    if rest and rest[0].endswith((".yaml", ".yml")) and not _is_no_file(config_type, rest[0]):
        file = Path(rest.pop(0))
    data = _as_far_as_known(config_type, file, [] if config_type.ends_in_command else rest)
    while rest:
        word = rest.pop(0)
        key, equals, _ = word.partition("=")
        if word == "--" and config_type.ends_in_command:
            return file, overrides, rest
        if word.startswith("--"):
            overrides.append(word[2:] if equals else f"{word[2:]}={_value_of(config_type, word, rest, data)}")
        elif equals and _is_key(config_type, key, data):
            overrides.append(word)
        elif equals and _is_name(key) and (near := nearest(key, all_keys(config_type, data), cutoff=0.8)):
            raise UserError(
                f"unknown key `{key}`", where=COMMAND_LINE, why=f"as a word, `{word}` would be taken as it stands",
                fix=f"did you mean `{near}`? If it is no key: `-- '{word}'`",
            )
        elif config_type.ends_in_command:
            return file, overrides, [word, *rest]
        else:
            words.append(word)
    return file, overrides, words + bare


def dump(config: Config) -> str:
    """YAML that loads back equal. Every value is written, defaults and None included."""
    return write_yaml(config.plain())


def schema(config_type: type[Config]) -> dict[str, Any]:
    """JSON schema (draft 2020-12) of the YAML file: help texts included, one alternative per kind of a folder."""
    found = config_type.model_json_schema(schema_generator=_Schema)
    return {"$schema": "https://json-schema.org/draft/2020-12/schema", **found}


class _Schema(GenerateJsonSchema):
    def encode_default(self, dft: Any) -> Any:
        return plain(dft)   # a unit as the text that a recipe has


def _by_word(config_type: type[Config], words: Sequence[str], given: Collection[str]) -> dict[str, Any]:
    """Bare words by the names of the fields they fill. A field that is `given` as `key=value` takes none: one of
    the two would be lost."""
    rest, found = list(words), dict[str, Any]()
    for name in config_type.words:
        if name in given:
            continue
        annotation = config_type.model_fields[name].annotation
        if rest and item_type(annotation, "0") is not None:
            found[name], rest = [Text(word) for word in rest], []
        elif rest:
            word = rest.pop(0)
            # A prompt that reads `null` is that word; for a number the annotation still decides.
            found[name] = word if is_text(annotation) else Text(word)
    if rest:
        raise _no_such_word(config_type, rest[0])
    return found


def _no_such_word(config_type: type[Config], word: str) -> UserError:
    names = config_type.words
    why = f"the words here are: {', '.join(names)}" if names else "no bare words are taken here"
    key, equals, _ = word.partition("=")
    if equals and _is_key(config_type, key, {}):
        return UserError(
            f"`{word}` is one word too many", where=COMMAND_LINE,
            why=f"{why}; behind `--` a setting is taken for a word as well", fix=f"put {word} before the `--`",
        )
    if equals and _is_name(key):
        return unknown_key(config_type, key.split("."), {}, COMMAND_LINE)
    return UserError(f"`{word}` is one word too many", where=COMMAND_LINE, why=why)


def _override(
    config_type: type[Config], data: dict[str, Any], origins: dict[str, str], key: str, text: str
) -> None:
    path = tuple(key.split("."))
    annotation = part_at(config_type, path, data)
    owner = part_at(config_type, path[:-1], data)
    if annotation is None and owner is not None and not known_keys(owner, {}):
        # Said here for a key below a plain value; below a part, a later override may choose a kind that has it.
        raise unknown_key(config_type, path, data, COMMAND_LINE)
    value: Any = Text(text)
    given = {key: COMMAND_LINE}
    if text.startswith(("[", "{")) and not is_text(annotation):
        value, given = read_flow(text, key, COMMAND_LINE)
    for length in range(1, len(path)):
        # `tokenizer: runs/tok` and `tokenizer.path=x` speak of the same part.
        above, part = value_at(data, path[:length]), part_at(config_type, path[:length], data)
        if isinstance(above, str) and isinstance(part, type) and issubclass(part, Config) and part.shorthand:
            origin = origins[".".join(path[:length])]
            short = (*path[:length], part.shorthand)
            _put(data, origins, path[:length], {}, {})
            _put(data, origins, short, above, {".".join(short): origin})
    _put(data, origins, path, value, given)


def _put(
    data: dict[str, Any], origins: dict[str, str], path: tuple[str, ...], value: Any, given: dict[str, str]
) -> None:
    """Set one value, and forget where what it replaces came from."""
    dotted = ".".join(path)
    for name in [name for name in origins if name == dotted or name.startswith(dotted + ".")]:
        del origins[name]
    origins.update(given)
    holder: Any = data
    for place, key in enumerate(path[:-1]):
        below = value_at(holder, (key,))
        if below is None or below == "null":
            below = {}
            holder[key] = below
        if not isinstance(below, dict | list):
            above = ".".join(path[: place + 1])
            raise UserError(f"`{dotted}` cannot be set", where=COMMAND_LINE, why=f"`{above}` is `{below}`")
        holder = below
    if isinstance(holder, dict):
        holder[path[-1]] = value
    elif path[-1].isdecimal() and int(path[-1]) < len(holder):
        holder[int(path[-1])] = value
    else:
        raise UserError(
            f"`{dotted}` cannot be set", where=COMMAND_LINE, why=f"the list has {len(holder):,} items, counted from 0"
        )


def _origin(config_type: type[Config], name: str, data: Any, origins: dict[str, str]) -> str:
    """Where a leaf was given: under its own name, in pieces inside it, or as the bare text of its part."""
    if name in origins:
        return origins[name]
    *above, last = name.split(".")
    if isinstance(value_at(data, above), str) and part_at(config_type, above, data).shorthand == last:
        return origins[".".join(above)]
    return next((origin for key, origin in origins.items() if key.startswith(name + ".")), "default")


def _spelled(config_type: type[Config], key: str, data: Any) -> str:
    """The key, with underscores for dashes unless it is known with dashes, as a name in a mapping may be."""
    known = part_at(config_type, key.split("."), data) is not None
    return key if known else key.replace("-", "_")


def _is_name(text: str) -> bool:
    return re.fullmatch(r"\w+([.-]\w+)*", text) is not None


def _is_key(config_type: type[Config], key: str, data: Any) -> bool:
    """Whether `key` is known, or lies inside a known part: `optim.shedule.peak` is a key misspelled, no word."""
    path = _spelled(config_type, key, data).split(".")
    head = part_at(config_type, path[:1], data)
    return head is not None and (len(path) == 1 or bool(known_keys(head, {})))


def _is_no_file(config_type: type[Config], word: str) -> bool:
    """Whether a word that ends like a file of keys is none: a word of the verb, an override, or data."""
    key, equals, _ = word.partition("=")
    if config_type.file_is_word or word.startswith("--") or (equals and _is_key(config_type, key, {})):
        return True
    return bool(config_type.words) and is_data(config_type, Path(word))


def is_data(config_type: type[Config], path: Path) -> bool:
    """Whether a YAML file holds records and no settings: its top is a list, or has lists under keys that no setting
    is called."""
    if (top := top_of_yaml(path)) is None:
        return False
    known = all_keys(config_type, {})
    return "" in top or (
        any(top.values()) and not any(key in known or nearest(key, known, cutoff=0.8) for key in top)
    )


def _as_far_as_known(config_type: type[Config], file: Path | None, arguments: Sequence[str]) -> dict[str, Any]:
    """The file with every `kind` of the command line in it: what decides which keys exist."""
    data, origins = read_yaml_file(file) if file is not None else ({}, {})
    for place, word in enumerate(arguments):
        key, equals, text = word.lstrip("-").partition("=")
        text = text if equals else "".join(arguments[place + 1 : place + 2])
        if key.endswith(".kind") and (equals or word.startswith("--")):
            _override(config_type, data, origins, _spelled(config_type, key, data), text)
    return data


def _value_of(config_type: type[Config], option: str, rest: list[str], data: Any) -> str:
    """The value of `--key value`; a switch may stand alone."""
    key = _spelled(config_type, option[2:], data)
    annotation = part_at(config_type, key.split("."), data)
    if annotation is None:
        raise unknown_key(config_type, key.split("."), data, COMMAND_LINE)
    # A switch may be followed by a word or an override, which is no value of it.
    if annotation is bool and not (rest and rest[0].lower() in ("true", "false")):
        return "true"
    if rest and not rest[0].startswith("--"):
        return rest.pop(0)
    raise UserError(f"`{option}` has no value", where=COMMAND_LINE, fix=f"`{option} VALUE` or `{key}=VALUE`")
