"""Conversations of which every text is known by a word of its own."""

from __future__ import annotations

import random
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

from llmtrainer.core.example import Example, Message

WORD = re.compile(r"zq\d+z")
WORDS = (
    "hello", "two words", "  ", "\n", "\n\n", "\u6625\u7720\u4e0d\u89c9\u6653", "\U0001f600", "a\u0301", "<|im_",
    "start|>", "### Response:\n", "x" * 40, "<", "|>", "12345", "\t", "</", "user", "assistant\n", "{{ x }}", '"',
    "\\n", "'",
)  # fmt: skip
TOOL = {
    "type": "function",
    "function": {
        "name": "look", "description": "Looks there.",
        "parameters": {
            "type": "object", "properties": {"at": {"type": "string", "description": "Where."}}, "required": ["at"],
        },
    },
}  # fmt: skip


@dataclass(frozen=True)
class Takes:
    """What conversations a template takes."""

    system: bool = False
    tools: bool = False
    reasoning: str = "never"
    """never, sometimes or always."""
    empty: bool = True


def call_of(number: str, at: str) -> dict[str, Any]:
    """A call of TOOL, as messages hold it."""
    return {"id": number, "type": "function", "function": {"name": "look", "arguments": {"at": at}}}


class Draw:
    """Conversations. Every text that is not blank holds a word that stands nowhere else: `zq` and a number."""

    def __init__(self, takes: Takes, names: Sequence[str], seed: str) -> None:
        self._takes, self._chance, self._count = takes, random.Random(seed), 0
        self._words = [*WORDS, *names]

    def text(self) -> str:
        if self._takes.empty and self._chance.random() < 0.05:
            return self._chance.choice(["", "", " ", "\n"])
        return self._some() + self._word() + self._some()

    def conversation(self) -> Example:
        chance, takes, messages = self._chance, self._takes, list[Message]()
        self._count, tools = 0, ()
        if takes.system and chance.random() < 0.4:
            messages.append(Message("system", self.text()))
        if takes.tools and chance.random() < 0.4:
            tools = (TOOL,)
        for _ in range(chance.randint(1, 3)):
            messages.append(Message("user", self.text()))
            while tools and chance.random() < 0.3:
                messages += self._called()
            messages.append(self._answer(self.text()))
        if chance.random() < 0.3:
            messages.append(Message("user", "and now?"))
        return Example(tuple(messages), tools)

    def _called(self) -> Iterator[Message]:
        number = f"call{self._count:05d}"
        call = call_of(number, f"{self._some()}{self._word()}{self._some()}")
        yield replace(self._answer(""), tool_calls=(call,))
        yield Message("tool", self._some() + self._word(), name="look", tool_call_id=number)

    def _answer(self, text: str) -> Message:
        share = {"never": 0.0, "sometimes": 0.4, "always": 1.0}[self._takes.reasoning]
        thinking = f"{self._some()}{self._word()}{self._some()}" if self._chance.random() < share else None
        weight = self._chance.choice([None, None, None, 1.0, 0.0, 0.5])
        return Message("assistant", text, thinking, weight=weight)

    def _word(self) -> str:
        self._count += 1
        return f"zq{self._count}z"

    def _some(self) -> str:
        return "".join(self._chance.choices(self._words, k=self._chance.choice([0, 0, 1, 2])))


def tame(example: Example) -> Example:
    """The same conversation, of each text its word alone: it can forge nothing."""

    def bare(text: str) -> str:
        found = WORD.search(text)
        return found[0] if found else text

    messages = []
    for message in example.messages:
        calls = []
        for call in message.tool_calls:
            arguments = {key: bare(value) for key, value in call["function"]["arguments"].items()}
            calls.append({**call, "function": {**call["function"], "arguments": arguments}})
        thinking = None if message.thinking is None else bare(message.thinking)
        messages.append(replace(message, content=bare(message.content), thinking=thinking, tool_calls=tuple(calls)))
    return replace(example, messages=tuple(messages))
