"""What preparing found out, for scripts and for people."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from llmtrainer.base.result import Result, lines


@dataclass(frozen=True)
class Prepared(Result):
    """Figures of a token store, or of a vocabulary."""

    path: str
    tokens: int
    """Of the store. Of a vocabulary: of the first text it learned from, at most 4 MiB."""
    documents: int
    vocabulary: int
    bytes_per_token: float
    reused: bool
    """Whether it was there already."""


@dataclass(frozen=True)
class PreparedExamples(Prepared):
    """Figures of a store of conversations; `documents` are its rows."""

    records: int
    fates: dict[str, int]
    """How many records were kept, cut, split, or dropped and why; they add up to `records`."""
    duplicates: int
    """Rows that are the same as an earlier one."""
    formats: list[str]
    table: str

    def json(self) -> dict[str, Any]:
        return {name: value for name, value in super().json().items() if name != "table"}

    def text(self) -> str:
        figures = {name: value for name, value in self.json().items() if name != "fates"}
        return f"{lines(figures)}\n{self.table}"
