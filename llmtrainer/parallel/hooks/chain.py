"""Several hooks, one behind the other."""

from __future__ import annotations

from pydantic import Field

from llmtrainer.parallel.hook import Exchange, Hook, Several
from llmtrainer.parallel.link import Link


class Chain(Hook):
    """What the first hook sends goes through the second, and so on: `of: [{kind: powersgd}, {kind: bf16}]` makes small
    matrices of the gradients and sends those as bfloat16."""

    of: tuple[Hook, ...] = Field(min_length=1)
    """The hooks, from the gradients to the link."""

    def require(self, precision: str, early: bool) -> None:
        for hook in self.of:
            hook.require(precision, early)

    def start(self, link: Link) -> Exchange:
        return Several([hook.start(link) for hook in self.of])
