"""A small config with every kind of annotation, for the tests of the ground floor."""

from __future__ import annotations

from pathlib import Path
from typing import Any, ClassVar, Literal

from pydantic import Field, model_validator

from llmtrainer.base.config import Config
from llmtrainer.base.errors import UserError
from llmtrainer.base.units import Bytes, Duration, Every
from tests.base.flavours.vanilla import Vanilla
from tests.base.taste import Cone, Flavour


class Order(Config):
    """Everything a guest may say."""

    words: ClassVar[tuple[str, ...]] = ("guest", "tables")

    guest: str = "nobody"
    """Who asks."""

    tables: tuple[int, ...] = ()
    """Where they sit."""

    flavour: Flavour = Vanilla()
    """What it tastes of."""

    more: tuple[Flavour, ...] = ()
    """Further tastes."""

    cone: Cone | None = Cone()
    """What it stands in."""

    scoops: int = Field(default=1, ge=1)
    """How many."""

    chill: float = 1e-3
    """How cold."""

    cup: bool = False
    """Instead of a cone."""

    size: Literal["small", "large"] | int = "small"
    """By name, or in millilitres."""

    wait: Duration = Duration.parse("2 epochs")
    """How long it may take."""

    remind: Every = Every.parse("never")
    """How often to ask."""

    box: Bytes = Bytes.parse("1 KiB")
    """To take away."""

    note: str | None = None
    """For the kitchen."""

    bill: Path | None = None
    """Where to put the bill."""

    prices: dict[str, float] = Field(default={})
    """By name."""

    cones: dict[str, Cone] = Field(default={})
    """For friends."""

    pair: tuple[int, str] = (0, "")
    """Two things of different type."""

    free: dict[str, Any] = Field(default={})
    """Whatever else."""

    @model_validator(mode="after")
    def _cup_or_cone(self) -> Order:
        if self.cup and self.cone is not None:
            raise UserError("a cup has no cone", why="it stands by itself", fix="cone=null")
        return self
