"""Whom a policy may talk with for several turns: a game, tools, a person."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal, Protocol

from pydantic import Field

from llmtrainer.base.config import Kind
from llmtrainer.core.rollout import Prompt


@dataclass(frozen=True)
class Feedback:
    """What an environment says to one turn of a policy."""

    done: bool
    """Whether the conversation is over. The text is then not shown to the policy any more."""
    text: str = ""
    """What the policy reads before its next turn. Its tokens are not learned."""
    role: Literal["user", "tool"] = "user"
    """Who says it, for a chat template."""
    reward: float | None = None
    """What the turn earned. None: the environment gives no reward for it."""
    error: bool = False
    """Whether the turn was one that the environment could not use, such as a call of no known tool."""


class Episode(Protocol):
    """One conversation with an environment."""

    def step(self, text: str) -> Feedback:
        """What it says to a turn of the policy. Called from any thread, never twice at once."""
        ...

    def close(self) -> None:
        """The conversation is over, whoever ended it."""
        ...


class Environment(Kind):
    """Whom a policy talks with, and for how long: further fields say how it plays."""

    folder: ClassVar[str] = "llmtrainer.training.environments"
    default_kind: ClassVar[str] = "callback"

    max_turns: int = Field(default=8, ge=1)
    """Turns of the policy in one conversation."""

    max_errors: int = Field(default=2, ge=1)
    """So many turns in a row that the environment cannot use end a conversation."""

    max_tokens: int = Field(default=4096, ge=1)
    """Tokens of a conversation behind its prompt, at most; no turn is begun that might go beyond, or beyond the
    model's context."""

    workers: int = Field(default=4, ge=1)
    """Conversations that the environment answers at a time, in threads."""

    exceptions: Literal["stop", "fail"] = "stop"
    """What an exception of the environment does: stop the run with its own traceback, or end the one conversation,
    which then has no reward."""

    def begin(self, prompt: Prompt) -> Episode:
        """A new conversation about a prompt; many are open at a time."""
        raise NotImplementedError
