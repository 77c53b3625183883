"""Asking a frozen model once for every row on disk, and reading what it said from then on."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from llmtrainer.base.errors import UserError
from llmtrainer.core.batch import BESIDE, REFERENCE, TEACHER_IDS, TEACHER_LOGP, Batch
from llmtrainer.core.protocols import Annotator, Engine
from llmtrainer.core.randomness import derive
from llmtrainer.core.ranks import ALONE, Ranks
from llmtrainer.data.branches import AnswerRows, collate_comparisons, read_tokens
from llmtrainer.data.budget_source import BudgetSource
from llmtrainer.data.collate import Row, end_to_end
from llmtrainer.data.comparison_source import ComparisonSource
from llmtrainer.training.console import bar, warn
from llmtrainer.training.dataset import Rows
from llmtrainer.training.logp_cache import LogpCache, Said, key_of, keys_of, said_of
from llmtrainer.training.row_signals import nothing_of, read_back, with_row_signals

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
        known = with_row_signals(mine, rows).signals if mine.sequences else nothing_of(mine, rows[0])
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
    compute: torch.dtype, engine: Engine,
) -> tuple[Filled, Annotator]:
    """Ask `live` for every row of the sources that the cache does not know, in micro-batches of at most so many
    tokens, and for some that it knows; and who says the same from then on. Every rank asks about its share of the
    micro-batches, which are those of one process, and all know all of it in the end.

    Killed at any moment, the same call goes on behind the last shard. Raises UserError where what is known is not what
    is said now, and for rows that are cut anew in every epoch.
    """
    chosen, apart = derive(seed, "recheck") % RECHECKED, APART[compute]
    filler = _Filler(cache, live, tokens_per_batch, chosen, apart, engine)
    with ExitStack() as stack, torch.no_grad():
        # One that fills: rank 0 for all. It waits for another job, and all wait for it.
        engine.in_turn(lambda: stack.enter_context(cache.filling(alone=engine.rank == 0)))
        filler.ask_all(sources, title)
        engine.in_turn(cache.flush)
        cache.look_again()
        if engine.sum({"missing": float(not filler.all_known())})["missing"]:
            # Machines that share no disk: each works out what the others have.
            alone = _Filler(cache, live, tokens_per_batch, chosen, apart, ALONE)
            engine.in_turn(lambda: alone.complete(sources, title))
            cache.look_again()
    for name in cache.damaged:
        warn(f"{cache.folder / name} was damaged: it is removed, and its rows are asked for anew")
    told = engine.sum({"computed": filler.computed, "checked": filler.checked})
    computed, checked = int(told["computed"]), int(told["checked"])
    filled = Filled(
        str(cache.folder), filler.rows, computed, filler.rows - computed, checked, tuple(cache.damaged),
    )  # fmt: skip
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
    def __init__(
        self, cache: LogpCache, live: Annotator, budget: int, chosen: int, apart: float, ranks: Ranks
    ) -> None:
        self._cache, self._live, self._budget, self._chosen, self._apart = cache, live, budget, chosen, apart
        self._ranks = ranks
        self._round: list[list[Unit]] = []
        """Micro-batches that are read together, one by each rank: as many forward passes on every rank."""
        self._units: list[Unit] = []
        self._asked: set[bytes] = set()
        self._new: set[bytes] = set()
        self.rows = self.computed = self.checked = 0
        self.constant: dict[str, Tensor] = {}

    def ask_all(self, sources: Sequence[Rows], title: str) -> None:
        """Ask for what is not known of every row of the sources."""
        with bar(title, sum(source.store.documents for source in sources), "rows") as advance:
            for source in sources:
                share = isinstance(source, ComparisonSource) and source.share_prompt
                for unit in units_of(source):
                    self.take(unit, share)
                    advance(len(unit.keys))
                self.close(share)
                self.ask(share)

    def complete(self, sources: Sequence[Rows], title: str) -> None:
        """As ask_all, beside others who have written meanwhile and will read what this one writes."""
        self._cache.look_again()
        self.ask_all(sources, title)
        self._cache.flush()

    def all_known(self) -> bool:
        """Whether all that was asked for, by whatever rank, is in the cache."""
        return all(key in self._cache for key in self._asked)

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
            self.close(share)
        self._units.append(unit)
        self._asked |= set(keys)

    def close(self, share: bool) -> None:
        """Make a micro-batch of the units taken so far, and ask where every rank has one."""
        if self._units:
            self._round.append(self._units)
            self._units = []
        if len(self._round) == self._ranks.world_size:
            self.ask(share)

    def ask(self, share: bool) -> None:
        """Have the model say what it makes of this rank's micro-batch. A rank that has none reads another's."""
        if not self._round:
            return
        turns, rank, self._round = self._round, self._ranks.rank, []
        own = rank if rank < len(turns) else 0
        said = self._said(turns[own], share)
        for turn, units in enumerate(turns):
            keys = keys_of_units(units)
            # What two of them ask about is the first one's, as it is in one process.
            new = {key for key in keys if key is not None and key not in self._cache} - self._new
            if turn == rank:
                self._keep(keys, said, new)
            self._new |= new

    def _said(self, units: Sequence[Unit], share: bool) -> list[Said]:
        batch = _batch_of([unit.made_of for unit in units], share)
        assert keys_of(batch) == keys_of_units(units), "a row has one key in the store and another in a batch"
        batch = self._live(batch)
        self.constant |= {name: batch.signals[name] for name in self._live.adds if name not in OF_TARGETS}
        names = [name for name in self._live.adds if name in OF_TARGETS]
        values = [read_back(batch, batch.signals[name]) for name in names]
        return [
            {name: _narrow(value) for name, value in zip(names, of_row, strict=True)}
            for of_row in zip(*values, strict=True)
        ]

    def _keep(self, keys: Sequence[bytes | None], rows: Sequence[Said], new: set[bytes]) -> None:
        for key, said in zip(keys, rows, strict=True):
            if key in new:
                if key not in self._cache:
                    self._cache.add(key, said)
                    self.computed += 1
            elif key is not None and key not in self._new:
                self._require_same(self._cache[key], said)
                self.checked += 1

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
