"""Whole dialogues as text, with the names of who speaks in front."""

from __future__ import annotations

import re
from typing import Any, ClassVar

from llmtrainer.core.example import Comparison, Message
from llmtrainer.data.compared import MARGINS, NAMES, Turns, margin_of
from llmtrainer.data.format import (
    BESIDE,
    ComparisonFormat,
    identity,
    is_texts,
    mapping,
    needed,
    opened,
    others,
    refused,
    text,
    tools,
)

_TURN = re.compile(r"(?:^|\n\n)(Human|Assistant):")
_ROLES = {"Human": "user", "Assistant": "assistant"}


class HumanAssistant(ComparisonFormat):
    """`{"chosen", "rejected"}`, each a whole dialogue `\\n\\nHuman: ...\\n\\nAssistant: ...`. They become messages:
    what both begin with is the prompt, and what the assistant says last the answer."""

    sample: ClassVar[tuple[Any, Comparison]] = (
        {"chosen": "\n\nHuman: 2 + 3?\n\nAssistant: 5", "rejected": "\n\nHuman: 2 + 3?\n\nAssistant: 6"},
        Comparison((Message("user", "2 + 3?"),), ((Message("assistant", "5"),), (Message("assistant", "6"),))),
    )

    def matches(self, record: object) -> bool:
        if not is_texts(record, "chosen", "rejected"):
            return False
        assert isinstance(record, dict)
        return "prompt" not in record and all(
            _TURN.match(record[key].lstrip()) is not None for key in ("chosen", "rejected")
        )

    def example(self, record: object) -> Comparison:
        whole = mapping(record)
        one, other = (_dialogue(text(needed(whole, key), key), key) for key in ("chosen", "rejected"))
        alike = 0
        while alike < min(len(one), len(other)) - 1 and one[alike] == other[alike]:
            alike += 1
        # Turns of a person that differ belong to no prompt; from there on, each side is an answer of several turns.
        if alike == 0:
            refused("the two dialogues have no turn in common", "chosen", "what both begin with is the prompt")
        return Comparison(
            opened(one[:alike], whole), (one[alike:], other[alike:]), margin=margin_of(whole), tools=tools(whole),
            name=identity(whole, *NAMES), facts=others(whole, "chosen", "rejected", *BESIDE, *MARGINS, *NAMES),
        )


def _dialogue(told: str, key: str) -> Turns:
    head, *rest = _TURN.split(told.lstrip())
    if head.strip() or not rest:
        refused("a dialogue does not begin with `Human:`", key)
    found = tuple(
        Message(_ROLES[who], said.strip()) for who, said in zip(rest[::2], rest[1::2], strict=True)
    )
    if found[-1].role != "assistant":
        refused("a dialogue does not end with an answer", key)
    return found
