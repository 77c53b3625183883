"""A record that is a list of texts: somebody asks, the other answers, in turn."""

from __future__ import annotations

from typing import Any, ClassVar

from llmtrainer.core.example import Example, Message
from llmtrainer.data.format import Format, items, refused, text


class Turns(Format):
    """`[question, answer, question, answer, ...]`, one list a record, as YAML corpora of short chats have them. A
    turn at the end that nobody answers is left unlearned."""

    sample: ClassVar[tuple[Any, Example]] = (
        ["How hot is it?", "17 degrees."],
        Example((Message("user", "How hot is it?"), Message("assistant", "17 degrees."))),
    )

    def matches(self, record: object) -> bool:
        return isinstance(record, list) and len(record) >= 2 and all(isinstance(item, str) for item in record)

    def example(self, record: object) -> Example:
        found = items(record, ".")
        if len(found) < 2:
            refused(f"a chat has {len(found)} turns", ".", "it has a question and its answer at least")
        roles = ("user", "assistant")
        return Example(tuple(Message(roles[place % 2], text(item, str(place))) for place, item in enumerate(found)))
