"""A Python function of the user's own."""

from __future__ import annotations

import threading
import traceback
from collections.abc import Callable, Sequence
from typing import Any, Literal, Self

from pydantic import Field, PrivateAttr

from llmtrainer.base.errors import UserError
from llmtrainer.core.named import PATTERN, callable_named, name_of
from llmtrainer.core.protocols import Reward
from llmtrainer.core.reward import checked
from llmtrainer.core.rollout import Answer, Verdict

Given = Callable[..., Any]     # Any: what a user's function gives is checked when it is there


class Function(Reward):
    """What a function says an answer is worth: any Python that can be imported, or that a program passes in.

    It gets an Answer (prompt, text, tokens, finish, facts) and returns a number; None, or an exception, costs the one
    answer. UserError stops the run.
    """

    function: str = Field(pattern=PATTERN)
    """`package.module:function`, imported from where Python finds modules."""

    per: Literal["answer", "batch"] = "answer"
    """Called with one Answer at a time, or once with a list of them, to return a list as long."""

    timeout: float | None = Field(default=None, gt=0.0)
    """Seconds that a call may take; its answers then have no reward. A thread cannot be ended: the call goes on behind
    the scenes, and what it uses stays used. None: it may take for ever."""

    workers: int = Field(default=1, ge=1)
    """Calls at a time, in threads, for functions that wait for somebody else."""

    _function: Given | None = PrivateAttr(default=None)
    _told: list[str] = PrivateAttr(default_factory=list)

    @classmethod
    def given(cls, function: Given, **settings: Any) -> Self:
        """A reward by a function that the program has in hand, whether or not it could be imported by name."""
        made = cls(function=name_of(function), **settings)
        made._function = function
        return made

    @property
    def last_error(self) -> str | None:
        """The traceback of its latest exception."""
        return self._told[-1] if self._told else None

    def score(self, answers: Sequence[Answer]) -> list[float | None]:
        return [verdict.value for verdict in self.verdicts(answers)]

    def verdicts(self, answers: Sequence[Answer]) -> list[Verdict]:
        function = self._known()
        if not answers:
            return []
        if self.per == "batch":
            return self._of_all(function, answers)
        found: list[Verdict | None] = [None] * len(answers)
        errors: list[BaseException] = []
        places = iter(range(len(answers)))
        taking = threading.Lock()

        def work() -> None:
            while not errors:
                with taking:
                    place = next(places, None)
                if place is None:
                    return
                try:
                    value = self._call(function, answers[place])
                    found[place] = value if isinstance(value, Verdict) else checked(value)
                except BaseException as error:
                    errors.append(error)

        if self.workers == 1:
            work()
        else:
            threads = [threading.Thread(target=work, daemon=True) for _ in range(min(self.workers, len(answers)))]
            for thread in threads:
                thread.start()
            for thread in threads:
                thread.join()
        if errors:
            raise errors[0]
        return [verdict for verdict in found if verdict is not None]

    def require(self) -> None:
        self._known()

    def _known(self) -> Given:
        if self._function is None:
            self._function = callable_named(self.function, "a reward")
        return self._function

    def _of_all(self, function: Given, answers: Sequence[Answer]) -> list[Verdict]:
        values = self._call(function, list(answers))
        if isinstance(values, Verdict):
            return [values] * len(answers)
        try:
            found = list(values)
        except TypeError:
            return [Verdict(None, "gave no list")] * len(answers)
        if len(found) != len(answers):
            return [Verdict(None, "gave too few or too many")] * len(answers)
        return [checked(value) for value in found]

    def _call(self, function: Given, what: Answer | list[Answer]) -> Any:
        """What the function gives; the Verdict of its failure where it fails. UserError goes through."""
        if self.timeout is None:
            return self._guarded(function, what)
        found: list[Any] = []
        errors: list[UserError] = []

        def work() -> None:
            try:
                found.append(self._guarded(function, what))
            except UserError as error:
                errors.append(error)

        thread = threading.Thread(target=work, daemon=True)
        thread.start()
        thread.join(self.timeout)
        if errors:
            raise errors[0]
        return found[0] if found else Verdict(None, "time")

    def _guarded(self, function: Given, what: Answer | list[Answer]) -> Any:
        try:
            return function(what)
        except UserError:
            raise
        except Exception as error:
            self._told[:] = [traceback.format_exc()]
            return Verdict(None, type(error).__name__)
