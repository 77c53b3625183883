"""What a format is: the keys under which a file keeps conversations, and what is said where one is missing."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar, NoReturn

from llmtrainer.base.config import Kind
from llmtrainer.base.errors import UserError
from llmtrainer.core.example import Comparison, Example, Message

ROLES = {
    "user": "user", "human": "user", "assistant": "assistant", "gpt": "assistant", "model": "assistant",
    "system": "system", "developer": "system", "tool": "tool", "observation": "tool", "function": "tool",
    "ipython": "tool", "function_call": "assistant", "tool_call": "assistant",
}  # fmt: skip
"""Who speaks, by the names that files have for it. `function_call` and `tool_call` are the assistant's calls."""


THOUGHT = ("thinking", "reasoning", "reasoning_content", "think")
"""Names of what an assistant thought before it spoke."""
CALLED = ("tool_calls", "function_call")
"""Names of what it calls."""
TOOLS = ("tools", "functions")
"""Names of the list of what may be called."""
BESIDE = ("system", *TOOLS)
"""What may stand beside a list of messages and belongs to it."""
MOST_WEIGHT = 1_000_000
"""Beyond it, float32 would lose every other token beside the one that weighs so much."""


class RecordFormat(Kind):
    """How a file writes something down. `auto` looks at the first records, says what they are, and shows one."""

    default_kind: ClassVar[str] = "auto"
    shorthand: ClassVar[str] = "kind"

    def matches(self, record: object) -> bool:
        """Whether a record looks like one of this format: by its keys and their types, not by what they say."""
        raise NotImplementedError

    def example(self, record: object) -> Example | Comparison:
        """What a record holds. UserError names the key that is missing or wrong, by its path inside the record; who
        reads the file adds file and line."""
        raise NotImplementedError


class Format(RecordFormat):
    """How a file writes a conversation down. `auto` looks at the first records, says what they are, and shows one."""

    folder: ClassVar[str] = "llmtrainer.data.formats"

    sample: ClassVar[tuple[Any, Example]]
    """A record, and what it becomes."""

    def example(self, record: object) -> Example:
        """The example that a record holds. UserError names the key that is missing or wrong, by its path inside the
        record; who reads the file adds file and line."""
        raise NotImplementedError


class ComparisonFormat(RecordFormat):
    """How a file writes down which answers are better. `auto` looks at the first records, says what they are, and
    shows one."""

    folder: ClassVar[str] = "llmtrainer.data.comparisons"

    sample: ClassVar[tuple[Any, Comparison]]
    """A record, and what it becomes."""

    def example(self, record: object) -> Comparison:
        """The comparison that a record holds. UserError names the key that is missing or wrong, by its path inside
        the record; who reads the file adds file and line."""
        raise NotImplementedError


def refused(what: str, key: str, why: str | None = None, fix: str | None = None) -> NoReturn:
    raise UserError(what, where=f"key `{key}`", why=why, fix=fix)


def mapping(value: object, path: str = "") -> Mapping[str, Any]:
    if isinstance(value, Mapping):
        return value
    refused(f"a record is {_named(value)} where an object is wanted", path or ".")


def items(value: object, path: str) -> Sequence[Any]:
    if isinstance(value, Sequence) and not isinstance(value, str | bytes):
        return value
    refused(f"`{path}` is {_named(value)} where a list is wanted", path)


def spoken(value: object, path: str) -> Sequence[Any]:
    """As `items`, of a conversation: somebody says something in it."""
    found = items(value, path)
    if not found:
        refused("a conversation has no message", path)
    return found


def needed(record: Mapping[str, Any], key: str, path: str = "") -> Any:
    """What stands under a key that has to be there."""
    if key in record:
        return record[key]
    refused(
        f"a record has no `{key}`", f"{path}{key}",
        f"it has: {', '.join(f'`{name}`' for name in list(record)[:12]) or 'nothing'}",
        "mend the record, or name the format that the file has: format=KIND (in a recipe data.format)",
    )


def text(value: object, path: str) -> str:
    if isinstance(value, str):
        return value
    refused(f"`{path}` is {_named(value)} where text is wanted", path)


def optional_text(record: Mapping[str, Any], key: str, path: str = "") -> str | None:
    """The text under a key; None where there is no such key, or null under it."""
    value = record.get(key)
    return None if value is None else text(value, f"{path}{key}")


def role(value: object, path: str) -> str:
    """The role that a name of the file stands for. Raises UserError for one that nobody knows."""
    name = text(value, path)
    if name not in ROLES:
        refused(f"nobody is called `{name}`", path, f"known: {', '.join(ROLES)}", "mend the record")
    return ROLES[name]


def opened(messages: Sequence[Message], record: Mapping[str, Any]) -> tuple[Message, ...]:
    """A conversation with the `system` text that stands beside it in front. UserError where it has another already."""
    said = optional_text(record, "system")
    first = messages[0] if messages and messages[0].role == "system" else None
    if not said or (first is not None and first.content == said):
        return tuple(messages)
    if first is not None:
        refused("a record has two system texts", "system", "the first message has another one", "keep one of them")
    return (Message("system", said), *messages)


def require_plain(record: Mapping[str, Any], kind: str) -> None:
    """Refuse what texts that are joined without a template have no place for: it would be lost."""
    if key := next((key for key in BESIDE if record.get(key)), None):
        refused(
            f"a record has `{key}`, and {kind} has no place for it", key,
            "its texts are joined as they are, without a template",
            "write the record as messages, {\"messages\": [...]}, or remove the key",
        )


def tools(record: Mapping[str, Any], key: str | None = None) -> tuple[Mapping[str, Any], ...]:
    """The functions that the assistant may call, under `tools` or the older `functions`: a list of objects, or the JSON
    text of one. A bare function is put into OpenAI's envelope."""
    key = key or next((key for key in TOOLS if record.get(key)), TOOLS[0])
    value = record.get(key)
    if isinstance(value, str):
        value = parsed(value, key) if value.strip() else None
    if value is None:
        return ()
    found = [mapping(item, f"{key}.{place}") for place, item in enumerate(items(value, key))]
    return tuple(item if "function" in item else {"type": "function", "function": dict(item)} for item in found)


def calls(value: object, path: str) -> tuple[Mapping[str, Any], ...]:
    """Tool calls as OpenAI writes them, with the arguments as an object: from such a list, a bare `{"name",
    "arguments"}`, several of them, or the JSON text of any of these."""
    if isinstance(value, str):
        value = parsed(value, path) if value.strip() else []
    if value is None:
        return ()
    if isinstance(value, Mapping):
        return (_call(value, path),)
    return tuple(_call(item, f"{path}.{place}") for place, item in enumerate(items(value, path)))


def _call(value: object, path: str) -> Mapping[str, Any]:
    call = mapping(value, path)
    inner = mapping(call["function"], f"{path}.function") if "function" in call else call
    below = f"{path}.function" if "function" in call else path
    name = text(needed(inner, "name", f"{below}."), f"{below}.name")
    arguments = needed(inner, "arguments", f"{below}.")
    if isinstance(arguments, str):
        arguments = parsed(arguments, f"{below}.arguments") if arguments.strip() else {}
    found = {"type": "function", "function": {"name": name, "arguments": mapping(arguments, f"{below}.arguments")}}
    return {"id": call["id"], **found} if call.get("id") is not None else found


def parsed(value: str, path: str) -> Any:
    """A value that stands in the file as JSON text."""
    try:
        return json.loads(value)
    except (ValueError, RecursionError) as error:
        refused(f"`{path}` is no JSON", path, f"{error}: {value[:60]!r}")


def message(value: object, path: str) -> Message:
    """One message under OpenAI's keys; the content a text, null, or a list of parts."""
    record = mapping(value, path)
    name = needed(record, "role", f"{path}.")
    if "content" not in record and not any(record.get(key) for key in CALLED):
        needed(record, "content", f"{path}.")
    content, thinking, made = _parts(record.get("content"), f"{path}.content")
    if name in ("function_call", "tool_call"):
        content, made = "", calls(content, f"{path}.content")
    return Message(
        role(name, f"{path}.role"), content, _thought(record, path, thinking), (*_called(record, path), *made),
        optional_text(record, "name", f"{path}."), optional_text(record, "tool_call_id", f"{path}."),
        _weight(record, path),
    )


def turn(value: object, path: str) -> Message:
    """One message under ShareGPT's keys: `from` and `value`; what else it may have is called as OpenAI calls it."""
    record = mapping(value, path)
    who = needed(record, "from", f"{path}.")
    said, made = text(needed(record, "value", f"{path}."), f"{path}.value"), _called(record, path)
    if who in ("function_call", "tool_call"):
        said, made = "", (*made, *calls(said, f"{path}.value"))
    return Message(
        role(who, f"{path}.from"), said, _thought(record, path, None), made, optional_text(record, "name", f"{path}."),
        optional_text(record, "tool_call_id", f"{path}."), _weight(record, path),
    )


def either(value: object, path: str) -> Message:
    """One message under OpenAI's keys or ShareGPT's."""
    record = mapping(value, path)
    theirs = "role" not in record and ("from" in record or "value" in record)
    return turn(record, path) if theirs else message(record, path)


def turns(value: object, path: str) -> tuple[Message, ...]:
    """A list of messages under OpenAI's keys or ShareGPT's; or one alone."""
    if isinstance(value, Mapping):
        return (either(value, path),)
    return tuple(either(item, f"{path}.{place}") for place, item in enumerate(spoken(value, path)))


def are_turns(value: object) -> bool:
    """Whether a value is a message or a list of them, under OpenAI's keys or ShareGPT's."""
    found = [value] if isinstance(value, Mapping) else value
    return are_messages(found, "role", ("content", *CALLED)) or are_messages(found, "from", ("value",))


def _weight(record: Mapping[str, Any], path: str) -> float | None:
    """How much a message is learned, under any of the names for it."""
    for key in ("weight", "train", "loss"):
        value = record.get(key)
        if value is None:
            continue
        if not isinstance(value, bool | int | float) or not 0.0 <= value <= MOST_WEIGHT:
            why = f"it is true, false or a number from 0 to {MOST_WEIGHT:,}"
            refused(f"`{path}.{key}` is {value!r}", f"{path}.{key}", why)
        return float(value)
    return None


def _thought(record: Mapping[str, Any], path: str, in_parts: str | None) -> str | None:
    """The reasoning of a message: in a part of its content, or under one of the names for it. UserError where two of
    them differ: one would be lost."""
    found = {key: optional_text(record, key, f"{path}.") for key in THOUGHT} | {"content": in_parts}
    texts = {key: said for key, said in found.items() if said}
    if len(set(texts.values())) > 1:
        refused(
            f"a message has reasoning in {' and '.join(f'`{key}`' for key in texts)}, and they differ", path,
            "a message has one", "keep one of them",
        )
    return next(iter(texts.values()), next((said for said in found.values() if said is not None), None))


def _called(record: Mapping[str, Any], path: str) -> tuple[Mapping[str, Any], ...]:
    """The calls beside a message's content: `tool_calls`, or the one `function_call` of OpenAI's older form."""
    return tuple(call for key in CALLED for call in calls(record.get(key), f"{path}.{key}"))


def _parts(value: object, path: str) -> tuple[str, str | None, tuple[Mapping[str, Any], ...]]:
    """(what is said, what is thought, what is called) of a content: a text, null, or parts with a `type`."""
    if value is None or isinstance(value, str):
        return value or "", None, ()
    said, thought = "", ""
    made: list[Mapping[str, Any]] = []
    for place, item in enumerate(items(value, path)):
        here = f"{path}.{place}"
        part = mapping(item, here)
        kind = needed(part, "type", f"{here}.")
        key = next((key for key in (kind, "text", "value") if isinstance(key, str) and key in part), "text")
        inside = needed(part, key, f"{here}.")
        if kind == "text":
            said += text(inside, f"{here}.{key}")
        elif kind in ("reasoning", "thinking"):
            thought += text(inside, f"{here}.{key}")
        elif kind in ("tool_call", "function_call"):
            made += calls(inside, f"{here}.{key}")
        else:
            refused(f"a part of type {kind!r} is no text", f"{here}.type", "known: text, reasoning, tool_call")
    return said, thought or None, tuple(made)


def others(record: Mapping[str, Any], *used: str) -> dict[str, Any]:
    """What else a record holds."""
    return {key: value for key, value in record.items() if key not in used}


def identity(record: Mapping[str, Any], *keys: str) -> str | None:
    """The record's own id: the first of these keys that it has."""
    return next((str(record[key]) for key in keys if record.get(key) is not None), None)


def is_texts(record: object, *keys: str) -> bool:
    """Whether a record is an object with a text under each of these keys."""
    return isinstance(record, Mapping) and all(isinstance(record.get(key), str) for key in keys)


def are_messages(value: object, who: str, what: tuple[str, ...]) -> bool:
    """Whether a value is a list of objects that say who speaks, and one of the other keys."""
    return (
        isinstance(value, list | tuple) and bool(value)
        and all(isinstance(item, Mapping) and who in item and any(key in item for key in what) for item in value)
    )  # fmt: skip


def _named(value: object) -> str:
    names: dict[type, str] = {
        str: "text", int: "a number", float: "a number", bool: "true or false", list: "a list", dict: "an object",
    }  # fmt: skip
    return "null" if value is None else names.get(type(value), f"a {type(value).__name__}")
