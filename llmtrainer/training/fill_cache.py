"""Asking a frozen model once for every row on disk, and reading what it said from then on."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from llmtrainer.base.errors import UserError
from llmtrainer.core.batch import BESIDE, REFERENCE, TEACHER_IDS, TEACHER_LOGP, Batch
from llmtrainer.core.protocols import Annotator
from llmtrainer.core.randomness import derive
from llmtrainer.data.branches import AnswerRows, collate_comparisons, read_tokens
from llmtrainer.data.budget_source import BudgetSource
from llmtrainer.data.collate import Row, end_to_end
from llmtrainer.data.comparison_source import ComparisonSource
from llmtrainer.training.console import bar, warn
from llmtrainer.training.dataset import Rows
from llmtrainer.training.logp_cache import LogpCache, Said, key_of, keys_of, said_of
from llmtrainer.training.row_signals import read_back, with_row_signals

OF_TARGETS = (REFERENCE, TEACHER_IDS, TEACHER_LOGP)
"""Signals with an entry for each target. The others say the same of every batch."""
RECHECKED = 100
"""Of so many rows that are known, about one is asked for again."""
APART = {torch.float64: 1e-9, torch.float32: 1e-4, torch.bfloat16: 0.25, torch.float16: 0.25}
"""How far, in nats and on average over a row, what is known may lie from what is said now: rows are packed otherwise,
and that is rounded otherwise. Another model lies further off in most rows."""


@dataclass(frozen=True)
class Filled:
    """What became of the rows."""

    folder: str
    rows: int
    """With a target to learn."""
    computed: int
    """Of them, asked for now."""
    reused: int
    """Of them, known before or equal to another row."""
    checked: int
    """Of those known before, asked for again and compared."""
    damaged: tuple[str, ...]
    """Shards that were not what they were when they were written: removed, their rows asked for anew."""


@dataclass(frozen=True)
class Cached:
    """Annotator: what another one said of each row before, read from the cache."""

    cache: LogpCache
    adds: tuple[str, ...]
    constant: dict[str, Tensor] = field(default_factory=dict)
    """Signals that are the same for every batch."""

    def __call__(self, batch: Batch) -> Batch:
        # The rows of an objective beside the main one are others than were asked about, and read nothing of this.
        mine = batch.part(batch.signals[BESIDE][: batch.sequences] == 0) if BESIDE in batch.signals else batch
        mine = mine.to("cpu")
        try:
            said = said_of(self.cache, keys_of(mine)) or [self.cache.nothing()]
        except KeyError:
            raise UserError(
                "a row is not in the cache of log-probabilities", where=str(self.cache.folder),
                why="what the run reads is not what was asked about when it began",
                fix="reference.cached=false and teacher.cached=false",
            ) from None
        rows = [{name: _wide(value) for name, value in one.items()} for one in said]
        if mine.sequences:
            known = with_row_signals(mine, rows).signals
        else:
            B, T = mine.tokens_BT.shape
            known = {
                name: torch.from_numpy(np.zeros((B, T, *value.shape[1:]), value.dtype))
                for name, value in rows[0].items()
            }
        device = batch.tokens_BT.device
        return batch.with_signals({**{name: known[name].to(device) for name in rows[0]}, **self.constant})


@dataclass(frozen=True)
class Unit:
    """Rows that are read together: the answers of a comparison, or one example."""

    made_of: AnswerRows | Row
    keys: tuple[bytes | None, ...]
    read: int
    """Tokens that the model reads of it."""


def fill(
    cache: LogpCache, live: Annotator, sources: Sequence[Rows], title: str, *, tokens_per_batch: int, seed: int,
    compute: torch.dtype,
) -> tuple[Filled, Annotator]:
    """Ask `live` for every row of the sources that the cache does not know, in micro-batches of at most so many
    tokens, and for some that it knows; and who says the same from then on.

    Killed at any moment, the same call goes on behind the last shard. Raises UserError where what is known is not what
    is said now, and for rows that are cut anew in every epoch.
    """
    filler = _Filler(cache, live, tokens_per_batch, derive(seed, "recheck") % RECHECKED, APART[compute])
    total = sum(source.store.documents for source in sources)
    with cache.filling(), bar(title, total, "rows") as advance, torch.no_grad():
        for source in sources:
            share = isinstance(source, ComparisonSource) and source.share_prompt
            for unit in units_of(source):
                filler.take(unit, share)
                advance(len(unit.keys))
            filler.ask(share)
    for name in cache.damaged:
        warn(f"{cache.folder / name} was damaged: it is removed, and its rows are asked for anew")
    filled = Filled(
        str(cache.folder), filler.rows, filler.computed, filler.rows - filler.computed, filler.checked,
        tuple(cache.damaged),
    )
    return filled, Cached(cache, live.adds, filler.constant)


def units_of(source: Rows) -> Iterator[Unit]:
    """Every row of the store behind a source, in its order. UserError where rows are not those of the store."""
    if isinstance(source, ComparisonSource):
        table = source.table
        read = read_tokens(table.tokens, table.answers, table.shared, source.share_prompt)
        for number in range(len(table)):
            rows = table.read(number, 0)
            keys = tuple(key_of(tokens, weights) for tokens, weights in zip(rows.rows, rows.weights, strict=True))
            yield Unit(rows, keys, int(read[number]))
        return
    if not isinstance(source, BudgetSource):
        raise UserError(
            "what a model says of these rows is not worth keeping", where="reference.cached, teacher.cached",
            why="text is cut into other rows in every epoch", fix="leave it out, or data.kind=examples",
        )
    store = source.store
    for document in range(store.documents):
        tokens = store.read(document)
        row = Row(
            tokens, np.zeros(len(tokens), dtype=np.int32), 0, store.weights(document), store.gates(document)
        )
        if row.inputs > 0:
            yield Unit(row, (key_of(tokens, row.weights, row.gates),), row.inputs)


class _Filler:
    def __init__(self, cache: LogpCache, live: Annotator, budget: int, chosen: int, apart: float) -> None:
        self._cache, self._live, self._budget, self._chosen, self._apart = cache, live, budget, chosen, apart
        self._units: list[Unit] = []
        self._asked: set[bytes] = set()
        self._new: set[bytes] = set()
        self.rows = self.computed = self.checked = 0
        self.constant: dict[str, Tensor] = {}

    def take(self, unit: Unit, share: bool) -> None:
        """Count a unit's rows, and put it among those to be asked for where there is a reason."""
        keys = [key for key in unit.keys if key is not None]
        self.rows += len(keys)
        fresh = any(key not in self._cache and key not in self._asked for key in keys)
        known = any(key in self._cache and key not in self._new for key in keys)
        # The very first in any case: the constants come from a live answer too.
        again = any(int.from_bytes(key[:8], "big") % RECHECKED == self._chosen for key in keys) or not self._asked
        if not (fresh or (known and again and not self._asked.issuperset(keys))):
            return
        if sum(one.read for one in self._units) + unit.read > self._budget:
            self.ask(share)
        self._units.append(unit)
        self._asked |= set(keys)

    def ask(self, share: bool) -> None:
        """Have the model say what it makes of the units taken so far."""
        if not self._units:
            return
        batch, keys = _batch_of([unit.made_of for unit in self._units], share), keys_of_units(self._units)
        assert keys_of(batch) == keys, "a row has one key in the store and another in a batch"
        self._units = []
        batch = self._live(batch)
        self.constant |= {name: batch.signals[name] for name in self._live.adds if name not in OF_TARGETS}
        names = [name for name in self._live.adds if name in OF_TARGETS]
        values = [read_back(batch, batch.signals[name]) for name in names]
        for key, *of_row in zip(keys, *values, strict=True):
            said = {name: _narrow(value) for name, value in zip(names, of_row, strict=True)}
            if key is None or key in self._new:
                continue
            if key in self._cache:
                self._require_same(self._cache[key], said)
                self.checked += 1
            else:
                self._cache.add(key, said)
                self._new.add(key)
                self.computed += 1

    def _require_same(self, known: Said, now: Said) -> None:
        for name, value in now.items():
            if name == TEACHER_IDS:
                continue      # of two ids as likely as each other either may come first
            before = known[name]
            if value.shape != before.shape or not float(np.abs(value - before).mean()) <= self._apart:
                raise UserError(
                    "the cache of log-probabilities says something else than the model does now",
                    where=str(self._cache.folder),
                    why=f"of a row with {len(value):,} targets `{name}` is {_shown(before)} there and {_shown(value)} "
                    "now: the model computes otherwise than it did, or the cache was changed",
                    fix=f"rm -r {self._cache.folder}, and every row is asked for anew",
                )


def keys_of_units(units: Sequence[Unit]) -> list[bytes | None]:
    """Of all their rows, in order."""
    return [key for unit in units for key in unit.keys]


def folder_of(cache: Path, facts: dict[str, Any]) -> Path:
    """Where in a recipe's cache the words of one model lie."""
    return cache / "logp" / hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()[:32]


def _batch_of(made_of: Sequence[AnswerRows | Row], share: bool) -> Batch:
    comparisons = [item for item in made_of if isinstance(item, AnswerRows)]
    if comparisons:
        return collate_comparisons(comparisons, share=share, liked=False, margin=False)
    return end_to_end([item for item in made_of if isinstance(item, Row)])


def _narrow(value: Any) -> Any:
    """Ids need no 8 bytes."""
    return value.astype(np.int32) if value.dtype == np.int64 else value


def _wide(value: Any) -> Any:
    return value.astype(np.int64) if value.dtype == np.int32 else value


def _shown(value: Any) -> str:
    return ", ".join(f"{one:.4f}" for one in value.reshape(-1)[:3]) + (", ..." if value.size > 3 else "")
