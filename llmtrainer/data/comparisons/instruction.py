"""Alpaca's form with two answers instead of one."""

from __future__ import annotations

from typing import Any, ClassVar

from llmtrainer.core.example import Comparison, Message
from llmtrainer.data.compared import MARGINS, NAMES, answer_of, margin_of
from llmtrainer.data.format import ComparisonFormat, identity, is_texts, mapping, needed, others, text
from llmtrainer.data.formats import instruction


class Instruction(ComparisonFormat):
    """`{"instruction", "input", "chosen", "rejected"}`, with `system` and `history` where it has them."""

    sample: ClassVar[tuple[Any, Comparison]] = (
        {"instruction": "Add.", "input": "2 and 3", "chosen": "5", "rejected": "6"},
        Comparison(
            (Message("user", "Add.\n\n2 and 3"),), ((Message("assistant", "5"),), (Message("assistant", "6"),))
        ),
    )

    def matches(self, record: object) -> bool:
        return is_texts(record, "instruction", "chosen", "rejected")

    def example(self, record: object) -> Comparison:
        whole = mapping(record)
        chosen, rejected = (text(needed(whole, key), key) for key in ("chosen", "rejected"))
        told = others(whole, "chosen", "rejected", "instances", "output", *MARGINS)
        asked = instruction.Instruction().example({**told, "output": chosen})
        return Comparison(
            asked.messages[:-1], (answer_of(chosen, "chosen"), answer_of(rejected, "rejected")),
            margin=margin_of(whole), tools=asked.tools, name=identity(whole, *NAMES), facts=asked.facts,
        )
