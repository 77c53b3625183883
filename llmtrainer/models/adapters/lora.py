"""Low-rank adapters: a few numbers beside every matrix learn, the model itself stays as it is."""

from __future__ import annotations

import difflib
import math
from collections.abc import Callable, Iterator
from fnmatch import fnmatchcase
from typing import ClassVar, Protocol

import torch
from pydantic import Field
from torch import Tensor, nn

from llmtrainer.base.errors import UserError
from llmtrainer.core.protocols import Adapter
from llmtrainer.core.randomness import derive
from llmtrainer.models.lora import LowRank

_FIRST_SITE = 1 << 20
"""Dropouts of adapters are numbered from here, those of the model itself from 0."""


class Lora(Adapter):
    """Every adapted matrix W becomes W + s B A, with A and B of a small rank (arXiv:2106.09685)."""

    rank: int = Field(default=16, ge=1)
    """Numbers r between A and B: what an adapter can learn, and what it costs."""

    alpha: float = Field(default=32.0, gt=0.0, allow_inf_nan=False)
    """What B A is scaled with: s = alpha / rank."""

    rslora: bool = False
    """Scale with s = alpha / sqrt(rank) instead, so that large ranks learn as fast as small ones
    (arXiv:2312.03732)."""

    targets: tuple[str, ...] = ()
    """Which matrices: last parts of names such as `q_proj`, or patterns on whole names such as
    `model.layers.1?.mlp.*`. Left out: all linear layers but the head."""

    dropout: float = Field(default=0.0, ge=0.0, lt=1.0)
    """Share of zeroed elements of what an adapter reads, while training."""

    directed: ClassVar[bool] = False
    """Whether a magnitude for every row is learned beside the low-rank direction."""

    @property
    def members(self) -> int:
        """How many adapters of this rank stand beside a matrix."""
        return 1

    @property
    def scale(self) -> float:
        """s, the factor of B A."""
        return self.alpha / (math.sqrt(self.rank) if self.rslora else self.rank)

    def insert(self, policy: nn.Module) -> None:
        """Freeze every parameter and put an adapter without values beside each target.

        Raises UserError when a target names no matrix that can have one.
        """
        for parameter in policy.parameters():
            parameter.requires_grad_(False)
        for number, (_, linear) in enumerate(self._chosen(policy)):
            wide = torch.promote_types(linear.weight.dtype, torch.float32)
            linear.adapter = LowRank(
                linear.weight, self.rank * self.members, self.scale, rate=self.dropout, site=_FIRST_SITE + number,
                magnitude=self.directed, master=wide,
            )  # fmt: skip
        policy.adapter = self    # type: ignore[assignment]

    def _chosen(self, policy: nn.Module) -> list[tuple[str, Adaptable]]:
        found = adaptable(policy)
        if not found:
            raise UserError(
                "the model has no linear layer of torch's to stand beside", where="model.adapter",
                why="its class multiplies by layers of its own kind", fix="train it whole: remove model.adapter",
            )
        for target in self.targets:
            if not any(matches(name, target) for name in found):
                near = difflib.get_close_matches(target, {name.rpartition(".")[2] for name in found}, n=1, cutoff=0.3)
                raise UserError(
                    f"`{target}` names no matrix that can have an adapter",
                    where="model.adapter.targets",
                    why="adapters stand beside linear layers; the embedding and the head have none",
                    fix=f"did you mean `{near[0]}`?" if near else f"one of: {', '.join(list(found)[:8])}",
                )
        return [
            (name, linear) for name, linear in found.items()
            if not self.targets or any(matches(name, target) for target in self.targets)
        ]  # fmt: skip


class Adaptable(Protocol):
    """A linear layer with room for an adapter."""

    weight: nn.Parameter
    adapter: LowRank | None

    def merged(self) -> Tensor:
        """The one matrix that does what weight and adapter do."""
        ...


def adaptable(policy: nn.Module) -> dict[str, Adaptable]:
    """Every linear layer but the head, by name, in the order of the model."""
    layers: Callable[[], Iterator[tuple[str, Adaptable]]] = policy.adaptable_layers    # type: ignore[assignment]
    return dict(layers())


def matches(name: str, target: str) -> bool:
    """Whether a matrix is meant: by its whole name, by the end of it, or by a pattern on it."""
    return name.endswith(f".{target}") or fnmatchcase(name, target)


def adapters(policy: nn.Module) -> dict[str, Adaptable]:
    """Every layer that has an adapter, by name."""
    return {name: linear for name, linear in adaptable(policy).items() if linear.adapter is not None}


def initialise(policy: nn.Module, seed: int) -> None:
    """Fill every adapter as a function of (seed, name of its matrix); the model still is its base, bit for bit."""
    for name, linear in adapters(policy).items():
        assert linear.adapter is not None
        linear.adapter.initialise(derive(seed, "adapter", name), linear.weight)


def measure(policy: nn.Module) -> None:
    """Have every adapter take what it needs to know of its matrix, once that is loaded."""
    for linear in adapters(policy).values():
        assert linear.adapter is not None
        linear.adapter.measure(linear.weight)
