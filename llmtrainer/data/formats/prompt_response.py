"""A prompt and its response as they stand, joined without a template."""

from __future__ import annotations

from typing import Any, ClassVar

from llmtrainer.core.example import Example, Message
from llmtrainer.data.format import Format, identity, is_texts, mapping, needed, others, require_plain, text


class PromptResponse(Format):
    """`{"prompt_id", "prompt", "response"}`, all texts. They are encoded apart and joined, as a base model reads
    them: end the prompt with a newline where the response is to begin on a line of its own."""

    prompt: str = "prompt"
    """The key of what is read."""

    response: str = "response"
    """The key of what is learned."""

    sample: ClassVar[tuple[Any, Example]] = (
        {"prompt_id": 7, "prompt": "2 + 3 =\n", "response": "5"},
        Example((Message("user", "2 + 3 =\n"), Message("assistant", "5")), plain=True, name="7"),
    )

    def matches(self, record: object) -> bool:
        return is_texts(record, self.prompt, self.response)

    def example(self, record: object) -> Example:
        whole = mapping(record)
        prompt = text(needed(whole, self.prompt), self.prompt)
        response = text(needed(whole, self.response), self.response)
        require_plain(whole, "a prompt with its response")
        return Example(
            (Message("user", prompt), Message("assistant", response)), plain=True,
            name=identity(whole, "prompt_id", "id"), facts=others(whole, self.prompt, self.response, "prompt_id", "id"),
        )  # fmt: skip
