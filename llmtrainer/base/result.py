"""What a verb returns: the same figures as a JSON object for scripts and as text for people."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from llmtrainer.base.part import Config


@dataclass(frozen=True)
class Result:
    """The outcome of a verb. A subclass adds its figures as fields, in the order of the contract."""

    @property
    def exit_code(self) -> int:
        """What the process ends with: 0 unless a verb knows better."""
        return 0

    def json(self) -> dict[str, Any]:
        """The fields by name, made of what JSON knows."""
        return {item.name: plain(getattr(self, item.name)) for item in dataclasses.fields(self)}

    def text(self) -> str:
        """What a person reads: one line per figure, the names aligned."""
        return lines(self.json())


def lines(figures: Mapping[str, Any]) -> str:
    """A line a figure, the names aligned."""
    width = max(map(len, figures), default=0)
    return "\n".join(f"{name:<{width}}  {_shown(value)}" for name, value in figures.items())


def plain(value: Any) -> Any:
    """The nearest thing JSON can say: paths and units become text, numbers that are not finite become null."""
    match value:
        case None | bool() | int() | str():
            return value
        case float():
            return value if math.isfinite(value) else None
        case Mapping():
            return {str(key): plain(item) for key, item in value.items()}
        case list() | tuple() | set() | frozenset():
            return [plain(item) for item in value]
        case Path():
            return str(value)
        case Config():
            return value.plain()
        case _ if dataclasses.is_dataclass(value) and type(value).__str__ is object.__str__:
            return {item.name: plain(getattr(value, item.name)) for item in dataclasses.fields(value)}
        case _ if hasattr(value, "item"):
            return plain(value.item())
        case _:
            return str(value)


def _shown(value: Any) -> str:
    match value:
        case None:
            return "n/a"
        case bool():
            return "yes" if value else "no"
        case int():
            return f"{value:,}"
        case float():
            return f"{value:.6g}"
        case Mapping():
            return ", ".join(f"{key} {_shown(item)}" for key, item in value.items()) or "none"
        case list():
            return ", ".join(map(_shown, value))
        case _:
            return str(value)
