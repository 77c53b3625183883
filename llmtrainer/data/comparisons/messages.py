"""Two whole conversations that begin alike, or a prompt of messages and two answers."""

from __future__ import annotations

from typing import Any, ClassVar

from llmtrainer.core.example import Comparison, Message
from llmtrainer.data.compared import MARGINS, NAMES, Turns, answer_of, better_key, margin_of, prompt_of
from llmtrainer.data.format import (
    BESIDE,
    ComparisonFormat,
    are_turns,
    identity,
    mapping,
    needed,
    opened,
    others,
    refused,
    tools,
    turns,
)  # fmt: skip


class Messages(ComparisonFormat):
    """`{"chosen": [messages], "rejected": [messages]}`, where both begin with the same turns, which are the prompt;
    a `prompt` that is a text is then only another way to say the first of them. Or `{"prompt": [messages], "chosen",
    "rejected"}`, where the answers are what follows: texts, messages or lists of them."""

    prompt: str = "prompt"
    """The key of the prompt, where there is one."""

    better: str | None = None
    """The key of the better answer or conversation. Left out: `chosen`, or `selected`."""

    worse: str = "rejected"
    """The key of the worse."""

    sample: ClassVar[tuple[Any, Comparison]] = (
        {
            "chosen": [{"role": "user", "content": "2 + 3?"}, {"role": "assistant", "content": "5"}],
            "rejected": [{"role": "user", "content": "2 + 3?"}, {"role": "assistant", "content": "6"}],
        },
        Comparison((Message("user", "2 + 3?"),), ((Message("assistant", "5"),), (Message("assistant", "6"),))),
    )  # fmt: skip

    def matches(self, record: object) -> bool:
        if not isinstance(record, dict) or are_turns(record.get("conversations")):
            return False
        both = [record.get(better_key(record, self.better)), record.get(self.worse)]
        if are_turns(record.get(self.prompt)):
            return all(isinstance(item, str) or are_turns(item) for item in both)
        return isinstance(record.get(self.prompt, ""), str) and all(are_turns(item) for item in both)

    def example(self, record: object) -> Comparison:
        whole = mapping(record)
        better = better_key(whole, self.better)
        given = [needed(whole, key) for key in (better, self.worse)]
        told = whole.get(self.prompt)
        if told is not None and not isinstance(told, str):
            prompt, _ = prompt_of(told, self.prompt, whole, as_messages=True)
            sides = [answer_of(item, key) for item, key in zip(given, (better, self.worse), strict=True)]
            for twice in (prompt, turns(told, self.prompt)):    # told twice, with the text of the system or without
                repeat = [side[: len(twice)] == twice and len(side) > len(twice) for side in sides]
                if all(repeat):
                    sides = [side[len(twice) :] for side in sides]
                    break
                if any(repeat):
                    refused("one of the two answers begins with the prompt", self.prompt, "the other does not")
        else:
            for item, key in zip(given, (better, self.worse), strict=True):
                if isinstance(item, str):
                    refused(f"`{key}` is text where messages are wanted", key)
            prompt, sides = _divided([turns(item, key) for item, key in zip(given, (better, self.worse), strict=True)])
            if not prompt and told:
                prompt, _ = prompt_of(told, self.prompt, whole, as_messages=True)
            elif prompt:
                prompt = opened(prompt, whole)
        if not prompt:
            refused("the two conversations have no turn in common", better, "what both begin with is the prompt")
        for side, key in zip(sides, (better, self.worse), strict=True):
            if not any(message.role == "assistant" for message in side):
                refused("an answer has no message of the assistant", key)
        return Comparison(
            prompt, tuple(sides), margin=margin_of(whole), tools=tools(whole), name=identity(whole, *NAMES),
            facts=others(whole, self.prompt, better, self.worse, *BESIDE, *MARGINS, *NAMES),
        )


def _divided(sides: list[Turns]) -> tuple[Turns, list[Turns]]:
    """The turns that two conversations begin with, and what is left of each: the last answer at least."""
    one, other = sides
    alike = 0
    while alike < min(len(one), len(other)) and one[alike] == other[alike]:
        alike += 1
    for side in sides:
        last = next((place for place in reversed(range(len(side))) if side[place].role == "assistant"), len(side))
        alike = min(alike, last)
    return one[:alike], [one[alike:], other[alike:]]


