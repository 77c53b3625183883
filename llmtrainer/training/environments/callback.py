"""A Python function or class of the user's own that answers each turn."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Self

from pydantic import Field, PrivateAttr

from llmtrainer.base.errors import UserError
from llmtrainer.core.environment import Environment, Episode, Feedback
from llmtrainer.core.named import PATTERN, callable_named, name_of
from llmtrainer.core.rollout import Prompt

Given = Callable[..., Any]    # Any: what a user's function gives is checked when it is there


class Callback(Environment):
    """A function (text) -> (done, feedback), or (text, facts) -> ..., the facts being the prompt's record; or a class
    with `reset(facts)` and `step(text) -> (done, feedback)`, of which each conversation has its own object.

    A third value is the reward of the turn; a Feedback says it all.
    """

    function: str = Field(pattern=PATTERN)
    """`package.module:function` or `package.module:Class`, imported from where Python finds modules."""

    _function: Given | None = PrivateAttr(default=None)

    @classmethod
    def given(cls, function: Given, **settings: Any) -> Self:
        """An environment by a function or class that the program has in hand."""
        made = cls(function=name_of(function), **settings)
        made._function = function
        return made

    def begin(self, prompt: Prompt) -> Episode:
        name = self.function
        if self._function is None:
            self._function = callable_named(name, "an environment")
        if inspect.isclass(self._function):
            player: Any = self._function()
            if not callable(getattr(player, "step", None)):
                raise UserError(f"`{name}` has no `step`", where="an environment", fix="def step(self, text): ...")
            if callable(getattr(player, "reset", None)):
                player.reset(dict(prompt.facts))
            return _Talk(name, player.step, None, getattr(player, "close", None))
        with_facts = _positional(self._function) > 1
        return _Talk(name, self._function, prompt.facts if with_facts else None, None)


@dataclass
class _Talk:
    name: str
    function: Given
    facts: Mapping[str, Any] | None
    """None: the function takes the text alone."""
    ending: Given | None

    def step(self, text: str) -> Feedback:
        said = self.function(text) if self.facts is None else self.function(text, self.facts)
        if isinstance(said, Feedback):
            return said
        plain = isinstance(said, tuple) and len(said) in (2, 3) and isinstance(said[0], bool)
        if not plain or not (said[1] is None or isinstance(said[1], str)):
            raise UserError(
                f"`{self.name}` gave {str(said)[:60]!r}", where="an environment", why="wanted is (done, feedback)",
                fix='return False, "try again"; return True, "", 1.0 where the turn has a reward',
            )
        return Feedback(said[0], said[1] or "", reward=float(said[2]) if len(said) == 3 else None)

    def close(self) -> None:
        if self.ending is not None:
            self.ending()


def _positional(function: Given) -> int:
    """How many arguments a function takes by place, those with a default left out."""
    kinds = (inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD)
    found = inspect.signature(function).parameters.values()
    return sum(item.kind in kinds and item.default is inspect.Parameter.empty for item in found)
