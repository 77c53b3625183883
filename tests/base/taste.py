"""A base of kinds, one of them outside its folder, and a part with a shorthand."""

from __future__ import annotations

from typing import ClassVar

from llmtrainer.base.config import Config, Kind


class Flavour(Kind):
    """What an ice tastes of."""

    folder: ClassVar[str] = "tests.base.flavours"
    default_kind: ClassVar[str] = "vanilla"


class Outsider(Flavour):
    """A kind that lives outside the folder."""

    heat: float = 1.0
    """How it burns."""


class Cone(Config):
    """What the ice stands in."""

    shorthand: ClassVar[str] = "shape"

    shape: str = "round"
    """Its form."""

    crisp: bool = True
    """Whether it breaks."""

    height: float = 8.0
    """In centimetres."""
