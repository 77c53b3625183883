"""What one conversation is, between a file's own keys and the tokens of a template."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True)
class Message:
    """One turn of a conversation."""

    role: str
    """system, user, assistant or tool; whatever else a template knows."""
    content: str
    thinking: str | None = None
    """What an assistant thought before it answered."""
    tool_calls: tuple[Mapping[str, Any], ...] = ()
    """Calls as OpenAI writes them: {"id", "type": "function", "function": {"name", "arguments"}}, the arguments an
    object and not its text."""
    name: str | None = None
    """Who speaks, where a role has several: the tool that answers."""
    tool_call_id: str | None = None
    """The call that a tool's message answers."""
    weight: float | None = None
    """How much its tokens count as targets. None: 1 for an assistant, 0 for the others."""


@dataclass(frozen=True)
class Example:
    """The canonical record of fine-tuning: what a format makes of a user's keys, and a template of tokens."""

    messages: tuple[Message, ...]
    tools: tuple[Mapping[str, Any], ...] = ()
    """JSON descriptions of the functions that the assistant may call."""
    plain: bool = False
    """Prompt and response as they stand, without a template: two messages, user and assistant, each encoded apart
    and joined (a base model's completion)."""
    name: str | None = None
    """The record's own id (`prompt_id`), where it has one."""
    facts: Mapping[str, Any] = field(default_factory=dict)
    """What else the record holds that somebody may ask for, as it stood."""


@dataclass(frozen=True)
class Comparison:
    """Answers to one prompt, the better before the worse; or one answer and what somebody thought of it."""

    prompt: tuple[Message, ...]
    """The turns that every answer follows."""
    answers: tuple[tuple[Message, ...], ...]
    """At least two, the best first; or, with `liked` or a grade, one. Empty where there are `ids`."""
    liked: bool | None = None
    """Whether the only answer was liked (KTO). None: answers are compared with each other."""
    grade: tuple[int, int] | None = None
    """The classes that the only answer may belong to, from the first to below the second."""
    paired: bool = False
    """Whether answers stand in pairs, the better before the worse, of which each is compared within itself alone."""
    margin: float | None = None
    """By how much the first is better, where the record says so."""
    scores: tuple[float, ...] = ()
    """What each answer scored, falling, where the record says so."""
    ids: tuple[tuple[int, ...], ...] = ()
    """Where another program has tokenised the record: ids of the prompt, then of each answer."""
    tools: tuple[Mapping[str, Any], ...] = ()
    plain: bool = False
    """As of Example: prompt and answers as they stand, without a template."""
    name: str | None = None
    facts: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class TokenRow:
    """An example as ids, with how much each id counts as a target."""

    tokens: tuple[int, ...]
    weights: tuple[float, ...]
    """As many as tokens: 0 what is only read, 1 what is learned."""
