"""Quantities written as text with a unit: `2000 steps`, `20B tokens`, `90 min`, `512 MiB`."""

from __future__ import annotations

import math
import re
from dataclasses import dataclass
from typing import Any, Literal, Self

from pydantic_core import core_schema

from llmtrainer.base.errors import UserError

TimeUnit = Literal["steps", "tokens", "epochs", "minutes"]

_SPELLINGS: dict[str, tuple[TimeUnit, float]] = {
    "step": ("steps", 1.0), "steps": ("steps", 1.0),
    "token": ("tokens", 1.0), "tokens": ("tokens", 1.0),
    "epoch": ("epochs", 1.0), "epochs": ("epochs", 1.0),
    "s": ("minutes", 1 / 60), "second": ("minutes", 1 / 60), "seconds": ("minutes", 1 / 60),
    "min": ("minutes", 1.0), "minute": ("minutes", 1.0), "minutes": ("minutes", 1.0),
    "h": ("minutes", 60.0), "hour": ("minutes", 60.0), "hours": ("minutes", 60.0),
}
_MULTIPLES = {"": 1.0, "k": 1e3, "K": 1e3, "M": 1e6, "B": 1e9, "T": 1e12}
_QUANTITY = re.compile(r"\s*([0-9][0-9_,]*\.?[0-9]*(?:[eE][+-]?[0-9]+)?)\s*([kKMBT]?)\s+([A-Za-z]+)\s*")
_BYTES = re.compile(r"\s*([0-9][0-9_,]*\.?[0-9]*)\s*(B|KB|MB|GB|TB|KiB|MiB|GiB|TiB)\s*")
_BYTE_UNITS = {
    "B": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9, "TB": 10**12,
    "KiB": 2**10, "MiB": 2**20, "GiB": 2**30, "TiB": 2**40,
}


@dataclass(frozen=True)
class Progress:
    """How far a run has come, in every unit a duration may be written in."""

    step: int = 0
    """Optimizer steps done, never micro-batches."""
    tokens: int = 0
    """Real input tokens so far, padding not counted."""
    epochs: float = 0.0
    """Passes over the training data."""
    minutes: float = 0.0
    """Minutes spent inside steps, over all restarts."""

    def amount(self, unit: TimeUnit) -> float:
        return {"steps": self.step, "tokens": self.tokens, "epochs": self.epochs, "minutes": self.minutes}[unit]


class _Text:
    """A value that pydantic reads from its text and writes back as that text."""

    @classmethod
    def parse(cls, text: str) -> Self:
        raise NotImplementedError

    @classmethod
    def __get_pydantic_core_schema__(cls, source: Any, handler: Any) -> core_schema.CoreSchema:
        def read(value: object) -> _Text:
            if isinstance(value, cls):
                return value
            if isinstance(value, bool) or not isinstance(value, str | int | float):
                raise UserError(f"{value!r} is no {cls.__name__.lower()}", fix=f"write {cls.example()}")
            return cls.parse(str(value))

        return core_schema.no_info_plain_validator_function(
            read,
            serialization=core_schema.plain_serializer_function_ser_schema(str),
        )

    @classmethod
    def __get_pydantic_json_schema__(cls, schema: Any, handler: Any) -> dict[str, Any]:
        return {"type": "string", "examples": [cls.example()]}

    @classmethod
    def example(cls) -> str:
        raise NotImplementedError


@dataclass(frozen=True)
class Duration(_Text):
    """How long: `2000 steps`, `20B tokens`, `2 epochs`, `90 min`. Never a bare number."""

    value: float
    unit: TimeUnit

    @classmethod
    def example(cls) -> str:
        return "`2000 steps`, `20B tokens`, `2 epochs` or `90 min`"

    @classmethod
    def parse(cls, text: str) -> Self:
        match = _QUANTITY.fullmatch(text)
        if match is None or match[3] not in _SPELLINGS:
            raise UserError(
                f"`{text}` is no duration", why="a number alone does not say of what", fix=f"write {cls.example()}"
            )
        unit, factor = _SPELLINGS[match[3]]
        value = float(re.sub("[_,]", "", match[1])) * _MULTIPLES[match[2]] * factor
        if not math.isfinite(value):
            raise UserError(f"`{text[:60]}` is no duration", why="it never ends", fix=f"write {cls.example()}")
        return cls(value, unit)

    def __str__(self) -> str:
        return f"{_plain(self.value)} {self.unit}"

    def rounded_down(self) -> Duration:
        """Whole steps and tokens; four digits behind the point of what has no smallest part."""
        digits = 1 if self.unit in ("steps", "tokens") else 10_000
        return Duration(math.floor(self.value * digits) / digits, self.unit)

    def share(self, progress: Progress) -> float:
        """How much of this duration has passed: 0 at the start, 1 at its end, more beyond."""
        return progress.amount(self.unit) / self.value if self.value else math.inf

    def reached(self, progress: Progress) -> bool:
        return progress.amount(self.unit) >= self.value


@dataclass(frozen=True)
class Pace:
    """How much of each unit an optimizer step takes on average, of those that are known before the run."""

    epochs: float | None = None
    tokens: float | None = None

    def converted(self, duration: Duration, unit: TimeUnit) -> Duration | None:
        """The same stretch of a run in another unit; None where nobody can know."""
        if duration.unit == unit:
            return duration
        per_step = {"steps": 1.0, "epochs": self.epochs, "tokens": self.tokens}
        given, wanted = per_step.get(duration.unit), per_step.get(unit)
        return Duration(duration.value / given * wanted, unit) if given and wanted else None


UNKNOWN_PACE = Pace()


@dataclass(frozen=True)
class Every(_Text):
    """How often: `100 steps`, `1B tokens`, `10 min`, or `never`."""

    period: Duration | None

    @classmethod
    def example(cls) -> str:
        return "`100 steps`, `1B tokens`, `10 min` or `never`"

    @classmethod
    def parse(cls, text: str) -> Self:
        if text.strip() == "never":
            return cls(None)
        period = Duration.parse(text)
        if period.value <= 0:
            raise UserError(f"`{text}` would be due all the time", fix="write a period above 0, or `never`")
        return cls(period)

    def __str__(self) -> str:
        return "never" if self.period is None else str(self.period)

    def due(self, before: Progress, after: Progress) -> bool:
        """Whether a multiple of the period was passed between two moments: nothing to remember over a restart."""
        if self.period is None:
            return False
        unit, period = self.period.unit, self.period.value
        return math.floor(after.amount(unit) / period) > math.floor(before.amount(unit) / period)


@dataclass(frozen=True)
class Bytes(_Text):
    """An amount of memory or disk: `512 MiB`, `100 GB`."""

    count: int

    @classmethod
    def example(cls) -> str:
        return "`512 MiB` or `100 GB`"

    @classmethod
    def parse(cls, text: str) -> Self:
        match = _BYTES.fullmatch(text)
        if match is None:
            raise UserError(f"`{text}` is no amount of bytes", fix=f"write {cls.example()}")
        return cls(round(float(re.sub("[_,]", "", match[1])) * _BYTE_UNITS[match[2]]))

    def __str__(self) -> str:
        for name in ("TiB", "GiB", "MiB", "KiB"):
            if self.count and self.count % _BYTE_UNITS[name] == 0:
                return f"{self.count // _BYTE_UNITS[name]} {name}"
        return f"{self.count} B"


def _plain(value: float) -> str:
    return str(int(value)) if value == int(value) else repr(value)
