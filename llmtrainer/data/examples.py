"""Records -> examples -> a token store with weights, by several processes; every record has a fate."""

from __future__ import annotations

import hashlib
import itertools
import json
from collections.abc import Callable, Generator, Iterator, Sequence
from contextlib import closing
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from llmtrainer.base.errors import UserError
from llmtrainer.data.document import Reading, SourceFile
from llmtrainer.data.encode import (
    SHARD_TOKENS,
    State,
    digest_of,
    hashed,
    state_of,
)
from llmtrainer.data.fates import Run, Totals, joined, require_few_losses, totals
from llmtrainer.data.format import RecordFormat
from llmtrainer.data.length import Piece
from llmtrainer.data.made_once import store_made_once
from llmtrainer.data.outcome import RowChoices, RowMaker
from llmtrainer.data.packed import FATES, Compared, Store, dtype_for
from llmtrainer.data.records import Record, records
from llmtrainer.data.shards import ShardWriter
from llmtrainer.data.workers import worked_by, worked_here

if TYPE_CHECKING:    # core imports torch, which a process that only tokenises would wait for in vain
    from llmtrainer.core.protocols import Tokenizer

BATCH_RECORDS = 128
_BLOCK = 2**14


@dataclass(frozen=True)
class ExampleFile:
    """A file of records, and how they are to be read."""

    source: SourceFile
    format: RecordFormat


@dataclass
class _Batch:
    """Records that go to a process together, with the number of their file."""

    records: list[Record] = field(default_factory=list)
    sources: list[int] = field(default_factory=list)


@dataclass
class _Made:
    """What a batch became: rows end to end, and for each record how many rows it is, and its fate."""

    ids: NDArray[np.int64]
    weights: NDArray[np.float32]
    lengths: NDArray[np.int64]
    """Tokens of each row."""
    rows: NDArray[np.int64]
    """Rows of each record."""
    sizes: NDArray[np.int64]
    """UTF-8 bytes of what is said in each record; 0 where it is not in the store."""
    runs: list[list[Any]]
    """The fate of each record, as `Run.plain`."""
    gates: list[str]
    """What each row calls the adapters that it goes through; empty where that is not asked for."""
    compared: list[Compared | None]
    """What the rows of each record are to each other."""


def write_examples(
    files: Sequence[ExampleFile],
    make: Callable[[], RowMaker],
    tokenizer: Tokenizer,
    out: Path,
    *,
    choices: RowChoices,
    max_dropped_share: float = 0.1,
    workers: int = 0,
    shard_tokens: int = SHARD_TOKENS,
    report: Callable[[int], None] | None = None,
    warn: Callable[[str], None] | None = None,
) -> Store:
    """Render and tokenise every record of the files, in order, into a store whose tokens have weights.

    The bytes of the store are a function of files, formats, what `make` makes, and `choices` alone: not of
    `workers` (0: in this process), not of how often it was killed. `make` can be imported by other processes.
    `report` hears numbers of records. What became of every record stands in the store's fates.jsonl.
    Raises UserError for a record that is refused (unless `choices` drops those), where more than
    `max_dropped_share` of the records is dropped, and as `write_store` does.
    """
    maker = make()
    states, sources = hashed([file.source for file in files])
    sources = [{**source, "format": file.format.plain()} for source, file in zip(sources, files, strict=True)]
    facts = {
        "tokenizer": tokenizer.fingerprint, "vocabulary": tokenizer.vocabulary, "end": tokenizer.end,
        "template": maker.fingerprint, "choices": choices.facts(),
    }  # fmt: skip
    key = digest_of([facts, shard_tokens, sources])

    def write(aside: Path) -> None:
        dtype = dtype_for(tokenizer.vocabulary)
        writer = ShardWriter(aside, key=key, dtype=dtype, shard_tokens=shard_tokens, weighted=True)
        reading = Reading(
            allow_truncated=choices.allow_truncated, warn=warn, allow_pickle=choices.allow_pickle, whole=True,
            lenient=choices.bad_records == "drop",
        )  # fmt: skip
        batches = _batches(files, states, _done(writer.notes, len(files)), reading)
        formats = [file.format for file in files]
        work = partial(_worker, make, formats, choices, tokenizer.vocabulary, tokenizer.end)
        try:
            _write_all(writer, worked_by(workers, batches, work) if workers else worked_here(batches, work), report)
            _finish(writer, {"key": key, **facts}, sources, max_dropped_share)
        finally:
            writer.abandon()

    return store_made_once(out, key, write)


def fates_of(store: Store) -> Totals:
    """What became of the records that a store was made of."""
    lines = (store.path / FATES).read_text(encoding="utf-8").splitlines()
    names = ("source", "first", "last", "fate", "rows", "place", "why")
    return totals([Run(*(json.loads(line)[name] for name in names)) for line in lines])


def duplicates(store: Store) -> int:
    """Rows whose tokens all are those of an earlier row."""
    found = np.empty(store.documents, dtype=np.uint64)
    for first in range(0, store.documents, _BLOCK):
        edges = store.offsets[first : min(first + _BLOCK, store.documents) + 1].tolist()
        for place, (start, stop) in enumerate(itertools.pairwise(edges), first):
            digest = hashlib.blake2b(store.span(start, stop).tobytes(), digest_size=8).digest()
            found[place] = int.from_bytes(digest, "little")
    return len(found) - len(np.unique(found))


def _done(notes: Sequence[Sequence[Any]], sources: int) -> list[int]:
    """Records of each file that an earlier try has written."""
    done = [0] * sources
    for note in notes:
        run = Run(*note)
        done[run.source] = run.last
    return done


def _batches(
    files: Sequence[ExampleFile], states: list[State], done: list[int], reading: Reading
) -> Iterator[_Batch]:
    batch = _Batch()
    last = max((source for source, count in enumerate(done) if count), default=0)
    for source in range(last, len(files)):
        file = files[source].source
        for record in records(file, reading):
            if record.number <= done[source]:
                continue
            batch.records.append(record)
            batch.sources.append(source)
            if len(batch.records) >= BATCH_RECORDS:
                yield batch
                batch = _Batch()
        if state_of(file.path) != states[source]:
            raise UserError(
                "a file changed while it was read", where=str(file.path),
                why="the store would hold some of its old records and some of its new",
                fix="let the file come to rest, then run the same command again",
            )  # fmt: skip
    if batch.records:
        yield batch


def _write_all(
    writer: ShardWriter, made: Generator[tuple[_Batch, _Made]], report: Callable[[int], None] | None
) -> None:
    with closing(made):    # an error here ends the processes at once, not when the traceback is forgotten
        for batch, found in made:
            _append(writer, batch, found)
            if report is not None:
                report(len(batch.records))


def _append(writer: ShardWriter, batch: _Batch, made: _Made) -> None:
    """Add the records of a batch; a shard ends behind a whole record, so that the next try knows where to go on."""
    row_ends = np.concatenate([[0], np.cumsum(made.rows)])
    token_ends = np.concatenate([[0], np.cumsum(made.lengths)])[row_ends]
    at, records_in_all = 0, len(made.rows)
    while at < records_in_all:
        filled = int(np.searchsorted(token_ends[at + 1 :] - token_ends[at], writer.room)) + 1
        stop = min(at + filled, records_in_all)
        tokens, rows = slice(*token_ends[[at, stop]]), slice(*row_ends[[at, stop]])
        writer.add(
            made.ids[tokens], made.lengths[rows], np.repeat(batch.sources[at:stop], made.rows[at:stop]),
            made.sizes[at:stop], made.weights[tokens], [run.plain() for run in joined(made.runs[at:stop])],
            made.gates[rows], [item for item in made.compared[at:stop] if item is not None],
        )  # fmt: skip
        at = stop


def _finish(
    writer: ShardWriter, facts: dict[str, Any], sources: list[dict[str, Any]], max_dropped_share: float
) -> None:
    runs = joined(writer.notes)
    found = totals(runs)
    require_few_losses(found, max_dropped_share)
    if found.rows == 0:
        raise UserError(
            "there is no row to learn from", where=", ".join(source["path"] for source in sources[:3]),
            why=f"\n{found.table()}" if found.records else "the files hold no records",
            fix="name a file of conversations",
        )  # fmt: skip
    names = ("source", "first", "last", "fate", "rows", "place", "why")
    fates = [
        {"file": Path(sources[run.source]["path"]).name, **dict(zip(names, run.plain(), strict=True))} for run in runs
    ]
    counts = {"records": found.records, "fates": found.by_fate}
    writer.finish({**facts, **counts}, sources, fates)


def _worker(
    make: Callable[[], RowMaker], formats: list[RecordFormat], choices: RowChoices, vocabulary: int, end: int
) -> Callable[[_Batch], _Made]:
    maker = make()
    # What is joined without a template stops at the tokenizer's own end.
    ends = frozenset([*maker.end_ids, end])
    return lambda batch: _made(maker, formats, choices, vocabulary, ends, batch)


def _made(
    maker: RowMaker, formats: list[RecordFormat], choices: RowChoices, vocabulary: int, ends: frozenset[int],
    batch: _Batch,
) -> _Made:
    pieces: list[Piece] = []
    rows, sizes, runs = [], [], []
    gates: list[str] = []
    compared: list[Compared | None] = []
    for record, source in zip(batch.records, batch.sources, strict=True):
        fate, why, said, found, gate, relation = choices.outcome(maker, formats[source], ends, record)
        _require_ids(found, vocabulary, record.place)
        gates += [] if gate is None else [gate] * len(found)
        compared.append(relation if found else None)
        place = None if fate == "kept" else record.place
        pieces += found
        rows.append(len(found))
        sizes.append(said if found else 0)
        runs.append(Run(source, record.number, record.number, fate, len(found), place, why).plain())
    ids = np.concatenate([np.zeros(0, np.int64), *(piece.tokens for piece in pieces)])
    return _Made(
        ids, np.concatenate([np.zeros(0, np.float32), *(piece.weights for piece in pieces)]),
        np.array([len(piece.tokens) for piece in pieces], dtype=np.int64), np.array(rows, dtype=np.int64),
        np.array(sizes, dtype=np.int64), runs, gates, compared,
    )  # fmt: skip


def _require_ids(pieces: Sequence[Piece], vocabulary: int, place: str) -> None:
    """UserError where a record of ids has one that no row of a model stands for."""
    for piece in pieces:
        least, most = int(piece.tokens.min(initial=0)), int(piece.tokens.max(initial=0))
        if least < 0 or most >= vocabulary:
            raise UserError(
                f"a record has the id {least if least < 0 else most:,}, and the tokenizer has the ids 0 to "
                f"{vocabulary - 1:,}",
                where=place, why="the ids of a record are taken as they are",
                fix="tokenizer=FOLDER of the tokenizer that they were made with",
            )
