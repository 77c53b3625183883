"""How a policy is to compute what it computes: asked for by an engine, answered by the policy."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Literal, NamedTuple


class Arrangement(NamedTuple):
    """What an engine asks for. Nothing here is part of the model: only speed, memory and last digits depend on it."""

    attention: str = "auto"
    """An attention path by name; auto: the one for the device."""
    kernels: str = "auto"
    """Whose norms, rotations and gated MLPs; auto: the fastest that is installed."""
    fallback: bool = False
    """Whether what cannot run here is replaced, and told, instead of refused."""
    recompute_every: int | None = None
    """Of every so-manyth block, activations are computed again in backward; None: all are kept."""
    recompute: Literal["layer", "mlp"] = "layer"
    """The whole block, or what follows its attention."""


class Arranged(NamedTuple):
    """What a policy made of it."""

    facts: Mapping[str, str] = {}
    """The chosen implementations, for the log and the manifests."""
    fallbacks: tuple[str, ...] = ()
    """Sentences for people: what was asked for or would be faster, and is not here."""
