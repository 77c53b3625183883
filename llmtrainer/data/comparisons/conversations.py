"""ShareGPT's form: turns with `from` and `value`, and two answers to the last."""

from __future__ import annotations

from typing import Any, ClassVar

from llmtrainer.base.errors import UserError
from llmtrainer.core.example import Comparison, Message
from llmtrainer.data.compared import MARGINS, NAMES, answer_of, margin_of, prompt_of
from llmtrainer.data.format import (
    BESIDE,
    ComparisonFormat,
    are_messages,
    are_turns,
    identity,
    mapping,
    needed,
    others,
    refused,
    spoken,
    tools,
)  # fmt: skip


class Conversations(ComparisonFormat):
    """`{"conversations": [{"from": "human", "value": ...}, ...], "chosen", "rejected"}`. An answer is a text, a turn
    such as `{"from": "gpt", "value": ...}`, or a list of turns."""

    conversations: str = "conversations"
    """The key of the turns that both answers follow. The first is a person's, or the system's."""

    skip_system: bool = False
    """Leave turns of the system out."""

    sample: ClassVar[tuple[Any, Comparison]] = (
        {
            "conversations": [{"from": "human", "value": "2 + 3?"}], "chosen": {"from": "gpt", "value": "5"},
            "rejected": {"from": "gpt", "value": "6"},
        },
        Comparison((Message("user", "2 + 3?"),), ((Message("assistant", "5"),), (Message("assistant", "6"),))),
    )  # fmt: skip

    def matches(self, record: object) -> bool:
        return (
            isinstance(record, dict) and are_messages(record.get(self.conversations), "from", ("value",))
            and all(isinstance(record.get(key), str) or are_turns(record.get(key)) for key in ("chosen", "rejected"))
        )  # fmt: skip

    def example(self, record: object) -> Comparison:
        whole = mapping(record)
        key = self.conversations
        found, _ = prompt_of(list(spoken(needed(whole, key), key)), key, whole, as_messages=True)
        prompt = tuple(message for message in found if not (self.skip_system and message.role == "system"))
        first = next((message for message in prompt if message.role != "system"), None)
        if first is None or first.role != "user":
            raise UserError(
                "a conversation does not begin with a person", where=f"key `{key}`",
                why="there is nobody to answer" if first is None else f"the first to speak is {first.role}",
                fix="mend the record",
            )
        if prompt[-1].role == "assistant":
            refused("a conversation ends with an answer, and the two to compare follow it", key)
        answers = tuple(answer_of(needed(whole, name), name) for name in ("chosen", "rejected"))
        return Comparison(
            prompt, answers, margin=margin_of(whole), tools=tools(whole), name=identity(whole, *NAMES),
            facts=others(whole, key, "chosen", "rejected", *BESIDE, *MARGINS, *NAMES),
        )
