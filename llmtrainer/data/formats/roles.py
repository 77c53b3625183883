"""A record that is itself the list of messages."""

from __future__ import annotations

from typing import Any, ClassVar

from llmtrainer.core.example import Example, Message
from llmtrainer.data.format import Format, are_messages, message, spoken


class Roles(Format):
    """`[{"role", "content", "think"}, ...]`, one list a record; `think` is what the assistant thought first."""

    sample: ClassVar[tuple[Any, Example]] = (
        [{"role": "user", "content": "2 + 3?"}, {"role": "assistant", "content": "5", "think": "Two and three."}],
        Example((Message("user", "2 + 3?"), Message("assistant", "5", thinking="Two and three."))),
    )

    def matches(self, record: object) -> bool:
        return are_messages(record, "role", ("content",))

    def example(self, record: object) -> Example:
        return Example(tuple(message(item, str(place)) for place, item in enumerate(spoken(record, "."))))
