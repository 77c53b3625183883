"""Functions that a policy may call; an answer without a call ends the conversation."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Self

from pydantic import Field, PrivateAttr

from llmtrainer.base.errors import UserError
from llmtrainer.core.answer_text import final
from llmtrainer.core.environment import Environment, Episode, Feedback
from llmtrainer.core.named import callable_named, name_of
from llmtrainer.core.rollout import Prompt

Given = Callable[..., Any]    # Any: whatever a tool gives is shown as text


class Tools(Environment):
    """Runs the calls of a turn, `<tool_call>{"name": "add", "arguments": {"a": 1, "b": 2}}</tool_call>`, in order, and
    answers with what they gave, as JSON where it is no text. They run in this process, with all that it may do: give a
    policy only what it cannot break."""

    functions: Mapping[str, str] = Field(min_length=1)
    """Name of each tool -> `package.module:function`."""

    longest: int = Field(default=4000, ge=1)
    """Characters of what a tool gives that are shown."""

    opening: str = Field(default="<tool_call>", min_length=1)
    """What stands before a call."""

    closing: str = Field(default="</tool_call>", min_length=1)
    """What stands behind a call."""

    _given: dict[str, Given] = PrivateAttr(default_factory=dict)

    @classmethod
    def given(cls, *functions: Given, **settings: Any) -> Self:
        """Tools that the program has in hand, by their own names."""
        made = cls(functions={function.__name__: name_of(function) for function in functions}, **settings)
        made._given = {function.__name__: function for function in functions}
        return made

    def begin(self, prompt: Prompt) -> Episode:
        for name, path in self.functions.items():
            if name not in self._given:
                self._given[name] = callable_named(path, f"the tool `{name}`")
        call = re.compile(re.escape(self.opening) + "(.*?)" + re.escape(self.closing), re.DOTALL)
        return _Calls(dict(self._given), call, self.opening, self.longest)


@dataclass
class _Calls:
    functions: Mapping[str, Given]
    call: re.Pattern[str]
    opening: str
    longest: int

    def step(self, text: str) -> Feedback:
        said = final(text)
        calls = self.call.findall(said)
        if not calls and self.opening not in said:
            return Feedback(done=True)
        results = [self._result(call) for call in calls] or [("error: a call that is never closed", True)]
        return Feedback(
            done=False, text="\n".join(shown for shown, _ in results), role="tool", error=any(bad for _, bad in results)
        )

    def close(self) -> None:
        pass

    def _result(self, call: str) -> tuple[str, bool]:
        """What is shown of one call, and whether it was none that could be made."""
        try:
            asked = json.loads(call)
            name, arguments = asked["name"], asked.get("arguments", {})
            arguments = json.loads(arguments) if isinstance(arguments, str) else arguments
            function = self.functions[name]
        except (ValueError, TypeError, KeyError, AttributeError, RecursionError) as error:
            known = ", ".join(self.functions)
            return f"error: no call of a known tool ({type(error).__name__}); there are: {known}", True
        if not isinstance(arguments, dict):
            return "error: the arguments are no object", True
        try:
            value = function(**arguments)
        except UserError:
            raise
        except Exception as error:      # a tool's refusal is what the policy has to learn from
            return f"error: {type(error).__name__}: {error}"[: self.longest], True
        shown = value if isinstance(value, str) else json.dumps(value, ensure_ascii=False, default=str)
        return shown[: self.longest], False
