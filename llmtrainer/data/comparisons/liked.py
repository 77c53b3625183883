"""One answer, and whether somebody liked it."""

from __future__ import annotations

from typing import Any, ClassVar

from llmtrainer.core.example import Comparison, Message
from llmtrainer.data.compared import NAMES, first_key, has_one_answer, is_label, label, one_answer
from llmtrainer.data.format import BESIDE, ComparisonFormat, identity, mapping, needed, others, tools

LABELS = ("label", "liked", "kto_tag")


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
        if not isinstance(record, dict) or not is_label(record.get(first_key(record, LABELS))):
            return False
        return has_one_answer(record)

    def example(self, record: object) -> Comparison:
        whole = mapping(record)
        tag = first_key(whole, LABELS)
        liked = label(needed(whole, tag), tag)
        prompt, answer, plain, used = one_answer(whole, as_messages=self.as_messages, what="label")
        return Comparison(
            prompt, (answer,), liked=liked, tools=tools(whole), plain=plain, name=identity(whole, *NAMES),
            facts=others(whole, *used, tag, *BESIDE, *NAMES),
        )
