"""One answer, and whether somebody liked it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

from llmtrainer.core.example import Comparison, Message
from llmtrainer.data.compared import NAMES, Turns, answer_of, is_label, label, prompt_of, system_of
from llmtrainer.data.format import (
    ComparisonFormat,
    are_turns,
    identity,
    mapping,
    needed,
    others,
    refused,
    tools,
    turns,
)  # fmt: skip

ANSWERS = ("completion", "response", "answer")
LABELS = ("label", "liked", "kto_tag")
DIALOGUES = ("messages", "conversations")


class Liked(ComparisonFormat):
    """`{"prompt", "completion", "label"}`, where the label is true for an answer that was liked (KTO). Prompt and
    completion are texts, joined as they stand, or messages; or `{"messages", "label"}`, whose last turn is the answer.
    `response` and `answer` are names for the completion, `liked` and `kto_tag` for the label."""

    as_messages: bool = False
    """Whether the chat template stands around a prompt and a completion that are texts."""

    sample: ClassVar[tuple[Any, Comparison]] = (
        {"prompt": "2 + 3 = ", "completion": "5", "label": True},
        Comparison((Message("user", "2 + 3 = "),), ((Message("assistant", "5"),),), liked=True, plain=True),
    )

    def matches(self, record: object) -> bool:
        if not isinstance(record, dict) or not is_label(record.get(_first(record, LABELS))):
            return False
        if any(are_turns(record.get(key)) for key in DIALOGUES):
            return True
        sides = (record.get("prompt"), record.get(_first(record, ANSWERS)))
        return all(isinstance(side, str) or are_turns(side) for side in sides)

    def example(self, record: object) -> Comparison:
        whole = mapping(record)
        tag = _first(whole, LABELS)
        liked = label(needed(whole, tag), tag)
        dialogue = next((key for key in DIALOGUES if key in whole), None)
        prompt: Turns
        if dialogue is not None:
            *before, last = turns(whole[dialogue], dialogue)
            if last.role != "assistant":
                refused("a conversation does not end with the answer that the label is of", dialogue)
            if not before:
                refused("a conversation has nothing that is answered", dialogue)
            prompt, plain = tuple(before), False
            if (system := system_of(whole)) and prompt[0].role != "system":
                prompt = (Message("system", system), *prompt)
            answer: Turns = (last,)
            used: tuple[str, ...] = (dialogue,)
        else:
            key = _first(whole, ANSWERS)
            answer = answer_of(needed(whole, key), key)
            prompt, plain = prompt_of(
                needed(whole, "prompt"), "prompt", system_of(whole),
                as_messages=self.as_messages or not isinstance(whole[key], str),
            )
            used = ("prompt", key)
        return Comparison(
            prompt, (answer,), liked=liked, tools=tools(whole), plain=plain, name=identity(whole, *NAMES),
            facts=others(whole, *used, tag, "system", "tools", *NAMES),
        )


def _first(record: Mapping[str, Any], keys: tuple[str, ...]) -> str:
    return next((key for key in keys if key in record), keys[0])
