"""A dialog of roles, or a context with its target."""

from __future__ import annotations

from typing import Any, ClassVar

from llmtrainer.core.example import Example, Message
from llmtrainer.data.format import (
    BESIDE,
    Format,
    are_messages,
    identity,
    is_texts,
    mapping,
    message,
    needed,
    opened,
    others,
    require_plain,
    spoken,
    text,
    tools,
)


class Dialog(Format):
    """`{"dialog": [{"role", "content"}, ...]}`, `{"user", "assistant"}`, or `{"context", "target"}`, where the
    context is joined with its target without a template."""

    sample: ClassVar[tuple[Any, Example]] = (
        {"dialog": [{"role": "user", "content": "How hot is it?"}, {"role": "assistant", "content": "17 degrees."}]},
        Example((Message("user", "How hot is it?"), Message("assistant", "17 degrees."))),
    )

    def matches(self, record: object) -> bool:
        if is_texts(record, "context", "target") or is_texts(record, "user", "assistant"):
            return True
        return isinstance(record, dict) and are_messages(record.get("dialog"), "role", ("content",))

    def example(self, record: object) -> Example:
        whole = mapping(record)
        name = identity(whole, "prompt_id", "id")
        facts = others(whole, "dialog", "context", "target", "user", "assistant", *BESIDE, "prompt_id", "id")
        for read, learned, plain in (("context", "target", True), ("user", "assistant", False)):
            if read in whole or learned in whole:
                asked, answered = (text(needed(whole, key), key) for key in (read, learned))
                if plain:
                    require_plain(whole, "a context with its target")
                spoke = (Message("user", asked), Message("assistant", answered))
                return Example(opened(spoke, whole), tools(whole), plain, name, facts)
        found = spoken(needed(whole, "dialog"), "dialog")
        said = [message(item, f"dialog.{place}") for place, item in enumerate(found)]
        return Example(opened(said, whole), tools(whole), name=name, facts=facts)
