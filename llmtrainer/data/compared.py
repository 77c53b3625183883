"""What the formats of comparisons share: prompts of texts or messages, answers, scores and labels under many names."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from llmtrainer.core.example import Message
from llmtrainer.data.format import BESIDE, are_turns, needed, opened, refused, text, turns

Turns = tuple[Message, ...]

NAMES = ("prompt_id", "id")
BETTER = ("chosen", "selected")
"""What the better of two answers is called."""
SCORES = (("score_chosen", "score_rejected"), ("chosen_score", "rejected_score"))
MARGINS = ("margin", *(name for names in SCORES for name in names))
"""Keys of a record that say by how much the better answer is better."""


ONE_ANSWER = ("completion", "response", "answer")
"""What the answer is called of a record that has one."""
DIALOGUES = ("messages", "conversations")


def has_one_answer(record: Mapping[str, Any]) -> bool:
    """Whether a record has a prompt and one answer, or a conversation that ends with one."""
    if any(are_turns(record.get(key)) for key in DIALOGUES):
        return True
    sides = (record.get("prompt"), record.get(first_key(record, ONE_ANSWER)))
    return all(isinstance(side, str) or are_turns(side) for side in sides)


def one_answer(
    record: Mapping[str, Any], *, as_messages: bool, what: str
) -> tuple[Turns, Turns, bool, tuple[str, ...]]:
    """(prompt, answer, whether they are read as they stand, keys that say so) of a record with one answer, which has a
    `what`: a label, a grade."""
    dialogue = next((key for key in DIALOGUES if key in record), None)
    if dialogue is None:
        key = first_key(record, ONE_ANSWER)
        answer = answer_of(needed(record, key), key)
        prompt, plain = prompt_of(
            needed(record, "prompt"), "prompt", record, as_messages=as_messages or not isinstance(record[key], str)
        )
        return prompt, answer, plain, ("prompt", key)
    *before, last = turns(record[dialogue], dialogue)
    if last.role != "assistant":
        refused(f"a conversation does not end with the answer that the {what} is of", dialogue)
    if not before:
        refused("a conversation has nothing that is answered", dialogue)
    return opened(before, record), (last,), False, (dialogue,)


def first_key(record: Mapping[str, Any], keys: tuple[str, ...]) -> str:
    """The first of these keys that a record has; the first of all where it has none."""
    return next((key for key in keys if key in record), keys[0])


def better_key(record: object, named: str | None) -> str:
    """The key of the better answer: the one that is named, else the first usual one that the record has."""
    if named is not None:
        return named
    return next((key for key in BETTER if isinstance(record, Mapping) and key in record), BETTER[0])


def prompt_of(value: object, path: str, record: Mapping[str, Any], *, as_messages: bool) -> tuple[Turns, bool]:
    """(turns, whether they are read as they stand) of a record's prompt: a text, or messages under OpenAI's keys or
    ShareGPT's. The `system` beside it is its first turn; a text with that or with tools beside it is a message."""
    if isinstance(value, str):
        plain = not as_messages and not any(record.get(key) for key in BESIDE)
        return opened((Message("user", value),), record), plain
    return opened(turns(value, path), record), False


def answer_of(value: object, path: str) -> Turns:
    """The turns of an answer: a text, a message, or a list of them, of which one at least is the assistant's."""
    if isinstance(value, str):
        return (Message("assistant", value),)
    if not isinstance(value, Mapping | list | tuple):
        refused(f"`{path}` is no answer", path, "it is a text, a message, or a list of messages with their roles")
    found = turns(value, path)
    if not any(message.role == "assistant" for message in found):
        refused("an answer has no message of the assistant", path)
    return found


def margin_of(record: Mapping[str, Any]) -> float | None:
    """By how much the better answer is better: `margin`, or the difference of the two scores."""
    if record.get("margin") is not None:
        return number(record["margin"], "margin")
    for better, worse in SCORES:
        if record.get(better) is not None and record.get(worse) is not None:
            return number(record[better], better) - number(record[worse], worse)
    return None


def number(value: object, path: str) -> float:
    """A finite number, which a table may hold as text."""
    try:
        found = math.nan if isinstance(value, bool) else float(value) if isinstance(value, int | float | str) else None
    except ValueError:
        found = None
    if found is None or not math.isfinite(found):
        refused(f"`{path}` is {value!r} where a number is wanted", path)
    return found


def label(value: object, path: str) -> bool:
    """Whether an answer was liked: true or false, or 1 or 0."""
    if isinstance(value, bool):
        return value
    if isinstance(value, int | float) and value in (0, 1):
        return bool(value)
    if isinstance(value, str) and value.strip().lower() in ("true", "false", "1", "0"):
        return value.strip().lower() in ("true", "1")
    refused(f"`{path}` is {value!r} where true or false is wanted", path, "true: the answer was liked")


def is_label(value: object) -> bool:
    if isinstance(value, str):
        return value.strip().lower() in ("true", "false")
    return isinstance(value, bool | int | float) and value in (0, 1)


def told(value: object, path: str) -> str:
    """A text that says something."""
    found = text(value, path)
    if not found.strip():
        refused(f"`{path}` says nothing", path)
    return found
