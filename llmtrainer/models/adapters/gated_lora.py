"""A hard-gated mixture: several adapters beside every matrix, of which every sample goes through those it names."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator, Mapping, Sequence
from typing import ClassVar

import torch
from pydantic import Field, model_validator
from torch import Tensor, nn

from llmtrainer.base.errors import UserError
from llmtrainer.core.batch import GATES, Batch
from llmtrainer.models.adapters.lora import Lora, adapters


class GatedLora(Lora):
    """W + s (B_i A_i + B_j A_j) on the tokens of a sample that names the gates i and j, one of each group: a
    multi-task adapter that comes apart into an ordinary LoRA for every combination."""

    groups: tuple[tuple[str, ...], ...] = Field(default=(("t0", "t1", "t2", "t3"), ("a0", "a1", "a2", "a3")))
    """Names of gates, group by group. A sample names at most one of each, such as `t1a3`."""

    gated: ClassVar[bool] = True

    @model_validator(mode="after")
    def _has_names_of_their_own(self) -> GatedLora:
        names = [name for group in self.groups for name in group]
        if not names or any(not name for name in names) or len(set(names)) != len(names):
            raise UserError(
                "every gate needs a name of its own", where="model.adapter.groups",
                why=f"these are {', '.join(names) or 'none'}", fix="groups=[[t0, t1], [a0, a1]]",
            )
        return self

    @property
    def members(self) -> int:
        return sum(map(len, self.groups))

    def gates(self, batch: Batch) -> Tensor:
        """0 or 1 for each token and adapter: [B, T, E]. UserError where the batch names no gates."""
        if GATES not in batch.signals:
            self.require_one()
        named_BTG = batch.signals[GATES]
        parts = []
        for group, names in enumerate(self.groups):
            numbers = torch.arange(len(names), device=named_BTG.device)
            parts.append(named_BTG[..., group, None] == numbers)
        return torch.cat(parts, dim=-1)

    def require_one(self) -> None:
        raise UserError(
            "the text does not say which adapters it goes through", where="model.adapter kind gated_lora",
            why="every sample of a gated mixture names its gates",
            fix="llmtrainer export RUN out=FOLDER makes an ordinary adapter of every combination",
        )

    def numbers(self, gate: str) -> tuple[int, ...]:
        """The gate string of a sample as a number for each group, -1 where it names none of it: `t1a3` -> (1, 3)."""
        rest, found = gate, []
        for names in self.groups:
            name = max((name for name in names if rest.startswith(name)), key=len, default="")
            found.append(names.index(name) if name else -1)
            rest = rest.removeprefix(name)
        if rest:
            raise UserError(
                f"`{gate}` names no gates", why=f"`{rest}` is none of {' | '.join(' '.join(g) for g in self.groups)}",
                fix="name at most one gate of each group, in their order",
            )
        return tuple(found)

    def combinations(self) -> Iterator[tuple[str, tuple[int, ...]]]:
        """Every choice of one gate of each group: its name and its numbers."""
        for numbers in itertools.product(*(range(len(names)) for names in self.groups)):
            yield "".join(names[n] for names, n in zip(self.groups, numbers, strict=True)), numbers

    def alone(self) -> Lora:
        """What one combination is: an ordinary adapter of as many times the rank as there are groups, with the same
        scale."""
        rank = self.rank * len(self.groups)
        alpha = self.scale * (math.sqrt(rank) if self.rslora else rank)
        return Lora(rank=rank, alpha=alpha, rslora=self.rslora, targets=self.targets, dropout=self.dropout)


def chosen(policy: nn.Module, numbers: Sequence[int]) -> Mapping[str, tuple[Tensor, Tensor]]:
    """(A, B) of one combination for every adapted matrix: rows of A and columns of B, laid side by side."""
    gated = policy.adapter
    assert isinstance(gated, GatedLora)
    first = list(itertools.accumulate(map(len, gated.groups), initial=0))[:-1]
    rows = torch.cat([
        torch.arange(gated.rank) + (start + number) * gated.rank
        for start, number in zip(first, numbers, strict=True) if number >= 0
    ])  # fmt: skip
    found = {}
    for name, linear in adapters(policy).items():
        assert linear.adapter is not None
        found[name] = linear.adapter.lora_A.detach()[rows], linear.adapter.lora_B.detach()[:, rows]
    return found
