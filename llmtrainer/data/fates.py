"""What became of every record of the source files: kept, or dropped and why; the totals add up."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

from llmtrainer.base.errors import UserError

TIED = "kept without ties"
"""Of a comparison that lost an answer which is the same as another of its answers, or ranked with it."""
KEPT = ("kept", "kept (longer)", "cut", "prompt cut", "split", "kept in part", TIED)
"""Fates of records that are in the store; any other is a loss, and named by its reason."""


@dataclass(slots=True)
class Run:
    """Records of one source that follow each other and share a fate."""

    source: int
    first: int
    last: int
    """Numbers of records in their file, from 1."""
    fate: str
    rows: int
    """Rows of the store that they became."""
    place: str | None = None
    """File and line, of a record that was not simply kept."""
    why: str | None = None

    @property
    def each(self) -> float:
        """Rows of one record."""
        return self.rows / (self.last - self.first + 1)

    def plain(self) -> list[Any]:
        return [self.source, self.first, self.last, self.fate, self.rows, self.place, self.why]


@dataclass(frozen=True)
class Totals:
    """How many records there were, and what became of them."""

    records: int
    rows: int
    by_fate: dict[str, int]
    examples: dict[str, str] = field(default_factory=dict)
    """Of each fate but `kept`: where the first such record stands, and what was wrong with it."""

    @property
    def dropped(self) -> int:
        return sum(count for fate, count in self.by_fate.items() if fate not in KEPT)

    @property
    def share(self) -> float:
        """Of the records, how many were dropped."""
        return self.dropped / max(self.records, 1)

    def table(self) -> str:
        """A line a fate: how many records, their share, and the first of them."""
        lines = [
            f"  {count:>10,}  {count / max(self.records, 1):>6.1%}  {fate:<14}  {self.examples.get(fate, '')}".rstrip()
            for fate, count in self.by_fate.items()
        ]
        return "\n".join([*lines, f"  {self.records:>10,}  records in all, which became {self.rows:,} rows"])


def joined(runs: Iterable[Sequence[Any]]) -> list[Run]:
    """Plain runs in order, those that go on where the last ended made one. All records of a run become as many rows
    each, so that a row's record is known."""
    found: list[Run] = []
    for plain in runs:
        run = Run(*plain)
        last = found[-1] if found else None
        goes_on = last is not None and run.place is None is last.place
        if last is not None and goes_on and (last.source, last.fate, last.each) == (run.source, run.fate, run.each):
            assert last.last + 1 == run.first, "a record has no fate"
            last.last, last.rows = run.last, last.rows + run.rows
        else:
            found.append(run)
    return found


def totals(runs: Sequence[Run]) -> Totals:
    by_fate = dict.fromkeys([*KEPT[:1], *(run.fate for run in runs)], 0)
    examples: dict[str, str] = {}
    for run in runs:
        by_fate[run.fate] += run.last - run.first + 1
        if run.place is not None:
            examples.setdefault(run.fate, run.place + (f": {run.why}" if run.why else ""))
    return Totals(sum(by_fate.values()), sum(run.rows for run in runs), by_fate, examples)


def require_few_losses(found: Totals, most: float) -> None:
    """Raise UserError where more than this share of the records was dropped, with every reason and its first record."""
    if found.share > most:
        raise UserError(
            f"{found.dropped:,} of {found.records:,} records would be dropped, {found.share:.1%}",
            why=f"at most {most:.1%} may be:\n{found.table()}",
            fix="mend the data, or say what is meant: max_length=N (data.sequence_length), too_long=cut, or "
            f"max_dropped_share={min(1.0, found.share + 0.005):.2f} (in a recipe under data)",
        )
