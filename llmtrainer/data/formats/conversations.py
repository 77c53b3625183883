"""ShareGPT's form: a list of turns with `from` and `value`."""

from __future__ import annotations

from typing import Any, ClassVar

from llmtrainer.core.example import Example, Message
from llmtrainer.data.format import (
    BESIDE,
    Format,
    are_messages,
    identity,
    mapping,
    needed,
    opened,
    others,
    spoken,
    tools,
    turn,
)


class Conversations(Format):
    """`{"conversations": [{"from": "human", "value": ...}, {"from": "gpt", ...}], "system", "tools"}`. Others who
    speak: system, function_call (JSON of a call, or of several), observation or tool (what the call gave). A turn may
    have `weight`, reasoning and calls under the names that `messages` knows."""

    conversations: str = "conversations"
    """The key of the list."""

    sample: ClassVar[tuple[Any, Example]] = (
        {"conversations": [{"from": "human", "value": "How hot is it?"}, {"from": "gpt", "value": "17 degrees."}]},
        Example((Message("user", "How hot is it?"), Message("assistant", "17 degrees."))),
    )

    def matches(self, record: object) -> bool:
        return isinstance(record, dict) and are_messages(record.get(self.conversations), "from", ("value",))

    def example(self, record: object) -> Example:
        whole = mapping(record)
        found = spoken(needed(whole, self.conversations), self.conversations)
        messages = [turn(item, f"{self.conversations}.{place}") for place, item in enumerate(found)]
        return Example(
            opened(messages, whole), tools(whole), name=identity(whole, "prompt_id", "id"),
            facts=others(whole, self.conversations, *BESIDE, "prompt_id", "id"),
        )
