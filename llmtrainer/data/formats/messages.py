"""OpenAI's form: a list of messages, and the tools that may be called."""

from __future__ import annotations

from typing import Any, ClassVar

from llmtrainer.core.example import Example, Message
from llmtrainer.data.format import (
    BESIDE,
    CALLED,
    Format,
    are_messages,
    identity,
    mapping,
    message,
    needed,
    opened,
    others,
    spoken,
    tools,
)


class Messages(Format):
    """`{"messages": [{"role", "content"}, ...], "system", "tools": [...]}`. The content may be a list of parts;
    an assistant may have `tool_calls` or the older `function_call` (arguments an object or its JSON text) and
    `thinking`, `reasoning` or `reasoning_content`; `weight` (or `train`) says how much a message is learned."""

    messages: str = "messages"
    """The key of the list."""

    sample: ClassVar[tuple[Any, Example]] = (
        {"messages": [{"role": "user", "content": "How hot is it?"}, {"role": "assistant", "content": "17 degrees."}]},
        Example((Message("user", "How hot is it?"), Message("assistant", "17 degrees."))),
    )

    def matches(self, record: object) -> bool:
        return isinstance(record, dict) and are_messages(record.get(self.messages), "role", ("content", *CALLED))

    def example(self, record: object) -> Example:
        whole = mapping(record)
        found = spoken(needed(whole, self.messages), self.messages)
        spoke = [message(item, f"{self.messages}.{place}") for place, item in enumerate(found)]
        return Example(
            opened(spoke, whole), tools(whole), name=identity(whole, "prompt_id", "id"),
            facts=others(whole, self.messages, *BESIDE, "prompt_id", "id"),
        )
