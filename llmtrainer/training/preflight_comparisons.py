"""What the preflight looks at besides, where rows are answers to compare."""

from __future__ import annotations

from collections.abc import Collection, Iterator

import numpy as np
from numpy.typing import NDArray

from llmtrainer.data.comparison_rows import EQUAL
from llmtrainer.data.comparison_source import ComparisonTable
from llmtrainer.data.examples import fates_of
from llmtrainer.data.packed import FATES, Store

MOST_EQUAL = 0.1
"""Share of the records whose answers may be the same."""
MOST_EMPTY = 0.05
"""Share of the answers that may hold nothing but their end."""
ONE_SIDED = 0.95
"""Share of the labels that may say the same."""

Looked = tuple[str, bool, str]
"""Name of a guard, whether it is content, and what it saw."""


def looked_at(store: Store, ends: Collection[int]) -> Iterator[Looked]:
    """Equal answers, empty ones, and labels that all say the same."""
    table = ComparisonTable(store)
    if table.liked is not None:
        share = float(table.liked.mean())
        yield (
            "labels", 1 - ONE_SIDED <= share <= ONE_SIDED,
            f"{share:.1%} of {len(table):,} answers were liked: where nearly all labels are the same, there is nothing "
            "to tell apart",
        )
    elif (store.path / FATES).is_file():
        told = fates_of(store)
        equal = told.by_fate.get(EQUAL, 0)
        first = f", such as {told.examples[EQUAL]}" if equal else ""
        yield (
            "equal_answers", equal <= MOST_EQUAL * max(told.records, 1),
            f"{equal:,} of {told.records:,} records had answers that are all the same, and were dropped{first}",
        )
    empty = [number for number in range(store.documents) if _is_empty(store, number, ends)]
    where = f", such as {store.origin(empty[0])}" if empty else ""
    yield (
        "empty_answers", len(empty) <= MOST_EMPTY * max(store.documents, 1),
        f"{len(empty):,} of {store.documents:,} answers hold nothing but their end{where}",
    )


def by_comparison(store: Store, digests: NDArray[np.uint64]) -> NDArray[np.uint64]:
    """One digest for each comparison, of those of its rows in their order."""
    starts = ComparisonTable(store).starts[:-1]
    place = np.arange(len(digests)) - np.repeat(starts, np.diff(np.append(starts, len(digests))))
    mixed = digests * (np.uint64(2) * place.astype(np.uint64) + np.uint64(1))    # odd factors lose no bit
    return np.add.reduceat(mixed, starts)


def _is_empty(store: Store, document: int, ends: Collection[int]) -> bool:
    weights = store.weights(document)
    assert weights is not None
    first = store.read(document)[weights > 0][:1]
    return len(first) == 0 or int(first[0]) in ends
