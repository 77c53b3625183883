"""Alpaca's form: an instruction, what it is about, and the answer."""

from __future__ import annotations

from typing import Any, ClassVar

from llmtrainer.core.example import Example, Message
from llmtrainer.data.format import (
    BESIDE,
    Format,
    identity,
    is_texts,
    items,
    mapping,
    needed,
    opened,
    optional_text,
    others,
    refused,
    text,
    tools,
)


class Instruction(Format):
    """`{"instruction", "input", "output"}`, with `system` and earlier turns in `history` ([[question, answer], ...])
    where it has them. The input, if there is one, follows the instruction after `between`. `{"instruction",
    "instances": [{"input", "output"}]}` is taken too."""

    instruction: str = "instruction"
    """The key of what to do."""

    input: str = "input"
    """The key of what to do it with; it may be missing or empty."""

    output: str = "output"
    """The key of the answer."""

    between: str = "\n\n"
    """What stands between an instruction and its input: an empty line. `"\\n\\n### Input:\\n"`: what the template
    alpaca was published with."""

    sample: ClassVar[tuple[Any, Example]] = (
        {"instruction": "Add.", "input": "2 and 3", "output": "5"},
        Example((Message("user", "Add.\n\n2 and 3"), Message("assistant", "5"))),
    )

    def matches(self, record: object) -> bool:
        if not is_texts(record, self.instruction):
            return False
        assert isinstance(record, dict)
        return isinstance(record.get(self.output), str) or isinstance(record.get("instances"), list)

    def example(self, record: object) -> Example:
        whole = mapping(record)
        asked = text(needed(whole, self.instruction), self.instruction)
        inner, path = whole, ""
        if self.output not in whole and "instances" in whole:
            instances = items(whole["instances"], "instances")
            if len(instances) != 1:
                refused(
                    f"a record has {len(instances)} instances", "instances", "a record is one example",
                    "write one record for each of them",
                )
            inner, path = mapping(instances[0], "instances.0"), "instances.0."
        about = optional_text(inner, self.input, path)
        answer = text(needed(inner, self.output, path), f"{path}{self.output}")
        messages = [*_history(whole), Message("user", f"{asked}{self.between}{about}" if about else asked)]
        used = (self.instruction, self.input, self.output, "instances", "history", *BESIDE, "prompt_id", "id")
        messages = [*messages, Message("assistant", answer)]
        return Example(
            opened(messages, whole), tools(whole), name=identity(whole, "prompt_id", "id"), facts=others(whole, *used)
        )  # fmt: skip


def _history(record: Any) -> list[Message]:
    found: list[Message] = []
    for place, item in enumerate(items(record.get("history") or [], "history")):
        path = f"history.{place}"
        pair = items(item, path)
        if len(pair) != 2:
            refused(f"`{path}` has {len(pair)} texts", path, "an earlier turn is a question and its answer")
        found += [Message("user", text(pair[0], f"{path}.0")), Message("assistant", text(pair[1], f"{path}.1"))]
    return found
