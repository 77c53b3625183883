"""The parts a configuration is made of: Config, Kind, and how to walk over what they hold."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping, Sequence
from contextvars import ContextVar
from typing import Any, ClassVar, Self

from pydantic import (
    BaseModel,
    ConfigDict,
    GetJsonSchemaHandler,
    PrivateAttr,
    ValidatorFunctionWrapHandler,
    model_serializer,
    model_validator,
)
from pydantic_core import CoreSchema

from llmtrainer.base.errors import UserError
from llmtrainer.base.kinds import find_kind, kinds_in, name_of
from llmtrainer.base.text import item_type, members, typed

_described: ContextVar[frozenset[type]] = ContextVar("_described", default=frozenset())
"""Bases of kinds whose schema is being made."""
_attribute = object.__getattribute__    # bound once: every read of a setting comes through here


class Config(BaseModel):
    """A frozen, strict description. Text under a field is that field's only documentation.

    Reading a field is recorded, so that a setting which nobody read can be refused instead of ignored.
    """

    model_config = ConfigDict(
        frozen=True, extra="forbid", strict=True, allow_inf_nan=False, use_attribute_docstrings=True
    )

    words: ClassVar[tuple[str, ...]] = ()
    """Fields that a command line may give as bare words, in order; a tuple at the end takes all that are left."""
    shorthand: ClassVar[str | None] = None
    """The field that a bare text fills where this part is wanted: `tokenizer: runs/tok`."""
    known_elsewhere: ClassVar[Mapping[str, str]] = {}
    """Keys of other trainers that somebody may write here -> what to write instead."""
    file_is_word: ClassVar[bool] = False
    """Whether a first word `x.yaml` is the first of `words` and not this config's own file, as it is for a verb
    about a recipe."""
    ends_in_command: ClassVar[bool] = False
    """Whether the first bare word begins the command line of another verb: all that follows belongs to it, its keys
    included."""

    _reads: set[str] = PrivateAttr(default_factory=set)

    @model_validator(mode="before")
    @classmethod
    def _typed(cls, value: Any) -> Any:
        if isinstance(value, str) and cls.shorthand is not None:
            value = {cls.shorthand: value}
        if not isinstance(value, dict):
            return value
        fields = cls.model_fields
        # str(): a key from YAML is a Text, and pydantic is to see plain ones.
        return {
            str(key): typed(fields[key].annotation, item) if key in fields else item for key, item in value.items()
        }

    @model_serializer(mode="plain")
    def plain(self) -> dict[str, Any]:
        """What YAML and JSON can say, `kind` included; loads back equal. Not counted as reading."""
        return {name: _plain(value) for name, value in self.__dict__.items()}

    def changed(self) -> list[str]:
        """Names of the fields that were set to something else than their default. Not counted as reading."""
        fields = type(self).model_fields
        return [
            name for name, value in self.__dict__.items()
            if name in self.model_fields_set and value != fields[name].get_default(call_default_factory=True)
        ]

    def __getattribute__(self, name: str) -> Any:
        if name[0] != "_" and name in type(self).__pydantic_fields__:
            private = _attribute(self, "__pydantic_private__")
            if private is not None:     # None while pydantic still builds the instance
                private["_reads"].add(name)
        return _attribute(self, name)

    @classmethod
    def __get_pydantic_json_schema__(cls, core: CoreSchema, handler: GetJsonSchemaHandler) -> dict[str, Any]:
        schema = handler(core)
        return schema if cls.shorthand is None else {"anyOf": [schema, {"type": "string"}]}

    # pydantic would compare the private `_reads` too: of two equal recipes, the one in use would differ.
    def __eq__(self, other: object) -> bool:
        return type(self) is type(other) and self.__dict__ == other.__dict__

    def __hash__(self) -> int:
        return hash((type(self), *map(_hashable, self.__dict__.values())))


class Kind(Config):
    """A component chosen by `kind`: a file name in `folder`, or a dotted path to a module or class."""

    folder: ClassVar[str]
    """The package that holds the kinds. The class that sets it is the base of its kinds, and none itself."""
    default_kind: ClassVar[str | None] = None

    @model_validator(mode="wrap")
    @classmethod
    def _choose(cls, value: Any, handler: ValidatorFunctionWrapHandler) -> Self:
        if isinstance(value, str) and cls.shorthand is not None:
            value = {cls.shorthand: value}
        if not isinstance(value, dict):
            return handler(value)
        chosen, rest = cls.chosen(value), {key: item for key, item in value.items() if key != "kind"}
        return handler(rest) if chosen is cls else chosen.model_validate(rest)

    @classmethod
    def chosen(cls, data: Mapping[str, Any]) -> type[Self]:
        """The class that `data` describes: by its `kind`, else by the default of the folder."""
        is_base = cls is cls.base()
        kind = data.get("kind") or (cls.default_kind if is_base else None)
        if kind is not None:
            found = find_kind(cls.base(), cls.folder, str(kind))
            if not issubclass(found, cls):
                raise UserError(f"`kind` is `{kind}`, and only `{name_of(cls, cls.folder)}` fits here")
            return found
        if is_base:
            known = kinds_in(cls.folder)
            raise UserError(
                f"`kind` is missing, which {cls.__name__} is meant",
                why=f"{cls.folder} has: {', '.join(known) or 'none'}",
                fix=f"kind: {known[0]}" if known else None,
            )
        return cls

    @classmethod
    def base(cls) -> type[Kind]:
        """The class that sets `folder`, of which this one is a kind."""
        return next(item for item in cls.__mro__ if "folder" in item.__dict__)

    @property
    def kind(self) -> str:
        """What a recipe writes to get this class."""
        return name_of(type(self), self.folder)

    @model_serializer(mode="plain")
    def plain(self) -> dict[str, Any]:
        """As of every Config, with `kind` in front."""
        return {"kind": self.kind, **{name: _plain(value) for name, value in self.__dict__.items()}}

    @classmethod
    def __get_pydantic_json_schema__(cls, core: CoreSchema, handler: GetJsonSchemaHandler) -> dict[str, Any]:
        if cls is not cls.base():
            return _with_kind(cls, handler.resolve_ref_schema(handler(core)))
        if cls in (above := _described.get()):    # a kind that holds others of its sort: the reference is enough
            return {"description": cls.__doc__, "type": "object"}
        token = _described.set(above | {cls})
        found = [find_kind(cls, cls.folder, name) for name in kinds_in(cls.folder)]
        try:
            schemas = [(item, handler.resolve_ref_schema(handler(item.__pydantic_core_schema__))) for item in found]
        finally:
            _described.reset(token)
        foreign = {"type": "object", "properties": {"kind": {"pattern": r"\."}}, "required": ["kind"]}
        text = [] if cls.shorthand is None else [{"type": "string"}]
        kinds = [_with_kind(item, schema) for item, schema in schemas]
        return {"description": cls.__doc__, "oneOf": [*kinds, foreign, *text]}


def leaves(config: Config, prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Every value by dotted name, in the order of the fields, `kind` first. Tuples and mappings of parts are
    entered (a tuple counts from 0), any other is one value. Not counted as reading."""
    if isinstance(config, Kind):
        yield prefix + "kind", config.kind
    for name, value in config.__dict__.items():
        parts = list(_parts(value))
        if not parts:
            yield prefix + name, value
        for key, part in parts:
            yield from leaves(part, f"{prefix}{name}{key}.")


def unread(config: Config, prefix: str = "") -> list[str]:
    """Dotted names of the fields that were set to something else than their default, and never read since
    `forget_reads`. The defaults do not count: a saved recipe spells them all out, and must run again."""
    reads = _private(config)["_reads"]
    found: list[str] = []
    for name in config.changed():
        parts = _parts(config.__dict__[name])
        below = [dotted for key, part in parts for dotted in unread(part, f"{prefix}{name}{key}.")]
        found += below or ([] if name in reads else [prefix + name])
    return found


def count_as_read(*configs: Config) -> None:
    """Let every field of these count as read, though whoever reads it will do so later, or may be spared it."""
    for config in configs:
        for name in type(config).model_fields:
            getattr(config, name)


def count_elsewhere_read(config: Config, missed: Collection[str], prefix: str = "") -> None:
    """Let every field count as read that another process has read of its copy: all but those that `unread` named
    there."""
    for name, value in config.__dict__.items():
        for key, part in _parts(value):
            count_elsewhere_read(part, missed, f"{prefix}{name}{key}.")
        if prefix + name not in missed:
            _private(config)["_reads"].add(name)


def forget_reads(config: Config) -> None:
    """From here on, count anew what is read."""
    _private(config)["_reads"].clear()
    for value in config.__dict__.values():
        for _, part in _parts(value):
            forget_reads(part)


def part_at(annotation: Any, path: Sequence[str], data: Any) -> Any:
    """What `annotation` holds at `path`: a Config class if one stands there, else the annotation there, else None.
    `data`, as far as it is given, chooses the kinds on the way."""
    chosen = _config_in(annotation, data)
    if not path:
        return chosen or annotation
    key, below = path[0], None
    if chosen is None:
        below = item_type(annotation, key)
    elif key in chosen.model_fields:
        below = chosen.model_fields[key].annotation
    elif key == "kind" and issubclass(chosen, Kind):
        below = str
    if below is None:
        return None
    return part_at(below, path[1:], _child(data, key))


def known_keys(annotation: Any, data: Any) -> list[str]:
    """The keys of a part, `kind` included; empty if `annotation` is of no part."""
    chosen = part_at(annotation, (), data)
    if not (isinstance(chosen, type) and issubclass(chosen, Config)):
        return []
    return [*(["kind"] if issubclass(chosen, Kind) else []), *chosen.model_fields]


def _config_in(annotation: Any, data: Any) -> type[Config] | None:
    """The Config class among the alternatives of an annotation, of the kind that `data` chooses."""
    for item in members(annotation):
        if isinstance(item, type) and issubclass(item, Config):
            try:
                return item.chosen(data if isinstance(data, dict) else {}) if issubclass(item, Kind) else item
            except UserError:
                return item     # the wrong kind is told by the loader, once
    return None


def _child(data: Any, key: str) -> Any:
    if isinstance(data, dict):
        return data.get(key)
    return data[int(key)] if isinstance(data, list) and key.isdecimal() and int(key) < len(data) else None


def _private(config: Config) -> dict[str, Any]:
    private = config.__pydantic_private__
    assert private is not None
    return private


def _parts(value: Any) -> Iterator[tuple[str, Config]]:
    """The parts a field holds, each with what its dotted name has after the field's."""
    if isinstance(value, Config):
        yield "", value
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, tuple) else ()
    for key, item in items:
        for below, part in _parts(item):
            yield f".{key}{below}", part


def _plain(value: Any) -> Any:
    match value:
        case None | bool() | int() | float() | str():
            return value
        case Config():
            return value.plain()
        case tuple() | list():
            return [_plain(item) for item in value]
        case frozenset():
            return sorted(map(_plain, value))
        case dict():
            return {_plain(key): _plain(item) for key, item in value.items()}
        case _:
            return str(value)


def _hashable(value: Any) -> Any:
    if isinstance(value, dict):
        return frozenset((key, _hashable(item)) for key, item in value.items())
    return tuple(map(_hashable, value)) if isinstance(value, list | tuple) else value


def _with_kind(cls: type[Kind], schema: dict[str, Any]) -> dict[str, Any]:
    """The schema of one kind. `kind` must be there, unless it is what a part without `kind` means."""
    kind = name_of(cls, cls.folder)
    required = [*([] if kind == cls.default_kind else ["kind"]), *schema.get("required", ())]
    properties = {"kind": {"const": kind}, **schema.get("properties", {})}
    return {**schema, "properties": properties, "required": list(dict.fromkeys(required))}
