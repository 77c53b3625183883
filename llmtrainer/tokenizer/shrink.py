"""The smallest conversation that shows a fault, for people to look at."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace

from llmtrainer.core.example import Example, Message

ATTEMPTS = 200
_TOOL = ({"type": "function", "function": {"name": "a", "parameters": {}}},)


def smallest(example: Example, fails: Callable[[Example], bool]) -> Example:
    """What is left when no message, tool, reasoning or call can go, and no text be one letter, without the fault
    going too. Tries at most ATTEMPTS conversations (Zeller 2002, delta debugging, in its greedy form)."""
    left = ATTEMPTS
    again = True
    while again and left > 0:
        again = False
        for smaller in _smaller(example):
            left -= 1
            if fails(smaller):
                example, again = smaller, True
                break
            if left <= 0:
                break
    return example


def _smaller(example: Example) -> Iterator[Example]:
    messages = example.messages
    half = len(messages) // 2
    if half > 1:
        yield replace(example, messages=messages[:half])
        yield replace(example, messages=messages[half:])
    for place in range(len(messages) if len(messages) > 1 else 0):
        yield replace(example, messages=(*messages[:place], *messages[place + 1 :]))
    if example.tools:
        yield replace(example, tools=())
        if len(example.tools) > 1:
            yield replace(example, tools=example.tools[:1])
        if example.tools != _TOOL:
            yield replace(example, tools=_TOOL)
    for place, message in enumerate(messages):
        for simpler in _simpler(message):
            yield replace(example, messages=(*messages[:place], simpler, *messages[place + 1 :]))


def _simpler(message: Message) -> Iterator[Message]:
    if message.thinking is not None:
        yield replace(message, thinking=None)
        if len(message.thinking) > 1:
            yield replace(message, thinking="a")
    if message.tool_calls:
        yield replace(message, tool_calls=message.tool_calls[:-1])
    if len(message.content) > 1:
        yield replace(message, content="a")
        half = len(message.content) // 2
        yield replace(message, content=message.content[:half])
        yield replace(message, content=message.content[half:])
    if message.content:
        yield replace(message, content="")
