"""A prompt and its completion: texts, or messages."""

from __future__ import annotations

from typing import Any, ClassVar

from llmtrainer.core.example import Example, Message
from llmtrainer.data.format import (
    BESIDE,
    Format,
    are_messages,
    identity,
    is_texts,
    items,
    mapping,
    message,
    needed,
    opened,
    others,
    refused,
    require_plain,
    text,
    tools,
)


class PromptCompletion(Format):
    """`{"prompt", "completion"}`. Two texts are joined without a template; two lists of messages are one
    conversation, of which the completion alone is learned."""

    prompt: str = "prompt"
    """The key of what is read."""

    completion: str = "completion"
    """The key of what is learned."""

    sample: ClassVar[tuple[Any, Example]] = (
        {"prompt": "2 + 3 = ", "completion": "5"},
        Example((Message("user", "2 + 3 = "), Message("assistant", "5")), plain=True),
    )

    def matches(self, record: object) -> bool:
        if is_texts(record, self.prompt, self.completion):
            return True
        keys = (self.prompt, self.completion)
        return isinstance(record, dict) and all(are_messages(record.get(key), "role", ("content",)) for key in keys)

    def example(self, record: object) -> Example:
        whole = mapping(record)
        prompt, completion = needed(whole, self.prompt), needed(whole, self.completion)
        plain = isinstance(prompt, str)
        if isinstance(completion, str) != plain:
            refused(
                "prompt and completion are not of one kind", self.completion,
                "both are texts, or both are lists of messages",
            )
        messages: tuple[Message, ...]
        if plain:
            require_plain(whole, "a prompt with its completion")
            messages = Message("user", prompt), Message("assistant", text(completion, self.completion))
        else:
            read = (message(item, f"{self.prompt}.{place}") for place, item in enumerate(items(prompt, self.prompt)))
            learned = (
                message(item, f"{self.completion}.{place}")
                for place, item in enumerate(items(completion, self.completion))
            )
            messages = opened((*(_unlearned(item) for item in read), *learned), whole)
        used = (self.prompt, self.completion, *BESIDE, "prompt_id", "id")
        return Example(
            messages, () if plain else tools(whole), plain, identity(whole, "prompt_id", "id"), others(whole, *used)
        )


def _unlearned(item: Message) -> Message:
    """A message of the prompt: an assistant's earlier answer is read, and not learned again."""
    return Message(item.role, item.content, item.thinking, item.tool_calls, item.name, item.tool_call_id, 0.0)
