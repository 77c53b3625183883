"""What an evaluation is: a suite reads documents, asks the policy, and answers with named numbers."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import ClassVar, Protocol

from llmtrainer.base.config import Kind
from llmtrainer.core.protocols import Policy, Tokenizer
from llmtrainer.core.ranks import ALONE, Ranks

Read = Callable[[str], Iterable[str]]
"""A path -> the texts of its documents, in order; opened again with every call."""
Report = Callable[[int], None]
"""Called with the bytes of text finished since the last call."""


class ContextPolicy(Policy, Protocol):
    """A policy that says how many tokens it may read at once."""

    @property
    def context_length(self) -> int: ...


class Suite(Kind):
    """One way to measure a policy. Its fields are its settings; nothing is trained or drawn at random."""

    folder: ClassVar[str] = "llmtrainer.evals"
    default_kind: ClassVar[str] = "perplexity"

    name: str | None = None
    """What its numbers are filed under; its kind where no name is given. Two of a kind need two names."""

    @property
    def title(self) -> str:
        """`name`, or the kind where no name was given."""
        return self.kind if self.name is None else self.name

    def run(
        self, policy: ContextPolicy, tokenizer: Tokenizer, read: Read, report: Report | None = None,
        ranks: Ranks = ALONE,
    ) -> dict[str, float]:  # fmt: skip
        """The suite's numbers by name, the same on every rank, each of which does its share. The policy is left as it
        was found: same weights, same mode."""
        raise NotImplementedError
