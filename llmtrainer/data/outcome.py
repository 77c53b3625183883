"""What becomes of a record on its way into a store: the seam between how files are written and what rows are."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal, NamedTuple, Protocol

from llmtrainer.core.example import Example, TokenRow
from llmtrainer.data.length import Piece
from llmtrainer.data.packed import Compared
from llmtrainer.data.records import Record


class RowMaker(Protocol):
    """Examples to ids: a chat template with its tokenizer."""

    @property
    def fingerprint(self) -> str:
        """SHA-256 over everything that decides which ids an example becomes, tokenizer included."""
        ...

    @property
    def end_ids(self) -> Sequence[int]:
        """Ids at which an answer stops."""
        ...

    def rows(self, example: Example) -> Sequence[TokenRow]:
        """One row, or several where the template shows an earlier answer otherwise than the last."""
        ...


class Outcome(NamedTuple):
    """What became of a record."""

    fate: str
    why: str | None
    said: int
    """UTF-8 bytes of what is said in it."""
    pieces: list[Piece]
    """Its rows."""
    gate: str | None = None
    """What it calls the adapters that it goes through; None where nobody asks."""
    compared: Compared | None = None
    """What its rows are to each other, if they are answers to one prompt."""


class RowChoices(Protocol):
    """What decides the rows besides files, tokenizer and template."""

    @property
    def allow_truncated(self) -> bool: ...

    @property
    def allow_pickle(self) -> bool: ...

    @property
    def bad_records(self) -> Literal["stop", "drop"]:
        """What a record that its format or the template refuses does: end the preparation, or become a fate."""
        ...

    def facts(self) -> list[Any]:
        """Everything that does, as JSON can say it."""
        ...

    def outcome(self, maker: RowMaker, format: Any, ends: frozenset[int], record: Record) -> Outcome:
        """The fate and the rows of a record. `ends`: ids at which an answer stops."""
        ...
