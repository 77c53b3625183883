"""Looks at the rows of a fine-tuning run before its first step, and stops where they would teach something else."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from itertools import groupby, islice
from pathlib import Path
from typing import Any

import numpy as np
import torch

from llmtrainer.base.errors import UserError
from llmtrainer.base.rundir import RunDir
from llmtrainer.core.batch import Batch
from llmtrainer.core.objective import Objective, count, loss_of
from llmtrainer.core.protocols import Annotator, Engine, Tokenizer, annotated
from llmtrainer.data.collate import Row, end_to_end
from llmtrainer.data.examples import fates_of
from llmtrainer.data.packed import FATES, Store
from llmtrainer.training.console import say
from llmtrainer.training.preflight_comparisons import by_comparison, looked_at
from llmtrainer.training.recipe import GUARDS

FILE = "preflight.json"
ALL = GUARDS[0]
"""Under this name in `allow`, nothing is looked at."""
MOST_CUT = 0.2
"""Share of the records that may be cut, split or dropped for their length, unless the recipe lets more be dropped."""
MOST_DUPLICATES = 0.1
"""Share of the rows that may be the same as an earlier one."""
LEAST_ENDED = 0.5
"""Share of the rows that must learn an end token: some are cut on purpose, but most answers end."""
MOST_PADDED = 0.01
"""Share of the rows that may end in two padding tokens or more."""
SHOWN = 10
"""Rows that are written out for people to read."""
_SHORTENED = ("too long", "cut", "prompt cut", "split", "targets cut away", "kept in part")


@dataclass(frozen=True)
class Guard:
    """One thing that was looked at."""

    name: str
    ok: bool
    detail: str
    allowed: bool = False
    """Whether the recipe's `allow` names it."""


@dataclass
class Seen:
    """What a pass over all rows found."""

    rows: int = 0
    tokens: int = 0
    targets: int = 0
    empty: int = 0
    """Rows without a target."""
    first_empty: int = -1
    ended: int = 0
    """Rows in which an end token is learned."""
    padded: int = 0
    duplicates: int = 0
    first_duplicate: tuple[int, int] = (-1, -1)
    """The first row that is there again, and where it was before."""
    highest: int = 0
    """The largest id."""
    longest: int = 0
    """Tokens of the longest row."""


def preflight(
    run: RunDir, store: Store, tokenizer: Tokenizer, policy_rows: int, objective: Objective, engine: Engine, *,
    ends: Collection[int], context: int, tokens_per_batch: int, allow: Sequence[str], warn: Callable[[str], None],
    max_dropped_share: float = 0.0, largest: Callable[[], Batch] | None = None, annotators: Sequence[Annotator] = (),
) -> None:
    """Write what is found to `preflight.json` in the run folder. Raises UserError, on every rank, where a guard trips
    that `allow` does not name.

    `policy_rows`: embedding rows of the model. `context`: the most tokens it reads. `ends`: ids at which an answer
    stops. `max_dropped_share`: what the recipe lets be lost; where that is more, as much may also be cut.
    `largest`: the micro-batch that needs the most memory, unless it is that of the longest rows. `annotators`: who adds
    what the objective reads.
    """
    if ALL in allow:
        return
    guards: list[Guard] = []
    figures: dict[str, Any] = {}
    if engine.rank == 0:
        seen = look(store, ends, tokenizer.pad)
        most_cut = max(MOST_CUT, max_dropped_share)
        guards = list(guards_of(seen, store, tokenizer, policy_rows, ends, context, most_cut))
        figures = asdict(seen)
    # An id without an embedding, or a place without one, would end the process before anybody could read why.
    fatal = {"vocabulary", *({"context"} - set(allow))}
    if engine.sum({"bad": float(any(guard.name in fatal and not guard.ok for guard in guards))})["bad"] == 0:
        batch = None if "memory" in allow else largest() if largest else longest_batch(store, tokens_per_batch)
        guards.append(_memory(batch, objective, engine, annotators))
    assert {guard.name for guard in guards} < set(GUARDS), "a guard that `allow` refuses to name"
    guards = [replace(guard, allowed=guard.name in allow) for guard in guards]
    if engine.rank == 0:
        _write(run, guards, figures, store, tokenizer)
        for guard in guards:
            if guard.allowed and not guard.ok:
                warn(f"preflight, allowed `{guard.name}`: {guard.detail}")
    _require(run, guards, engine)
    if engine.rank == 0:
        say(f"preflight: {figures['rows']:,} rows, {figures['targets']:,} of {figures['tokens']:,} tokens are learned; "
            f"what was looked at stands in {run.path / FILE}")


def look(store: Store, ends: Collection[int], pad: int) -> Seen:
    """One pass over every row of a store."""
    seen, digests = Seen(), np.empty(store.documents, dtype=np.uint64)
    for document in range(store.documents):
        tokens = store.read(document)
        targets = learned(store, document)
        seen.rows += 1
        seen.tokens += len(tokens)
        seen.longest = max(seen.longest, len(tokens))
        wanted = tokens[targets]
        seen.targets += len(wanted)
        if not len(wanted):
            seen.first_empty = document if not seen.empty else seen.first_empty
            seen.empty += 1
        seen.ended += any(bool((wanted == end).any()) for end in ends)
        seen.padded += len(tokens) > 1 and bool(tokens[-1] == pad == tokens[-2])
        seen.highest = max(seen.highest, int(tokens.max(initial=0)))
        digest = hashlib.blake2b(tokens.tobytes(), digest_size=8).digest()
        digests[document] = int.from_bytes(digest, "little")
    if store.comparisons:    # the same answer may be compared with several others
        digests = by_comparison(store, digests)
    _, first, which = np.unique(digests, return_index=True, return_inverse=True)
    again = np.flatnonzero(first[which] != np.arange(len(digests)))
    seen.duplicates = len(again)
    if len(again):
        seen.first_duplicate = int(again[0]), int(first[which[again[0]]])
    return seen


def learned(store: Store, document: int) -> np.ndarray[Any, np.dtype[np.bool_]]:
    """Which tokens of a row are targets that count. The first is never one: nothing announces it."""
    weights = store.weights(document)
    found = np.ones(store.length(document), dtype=bool) if weights is None else weights > 0
    found[:1] = False
    return found


def guards_of(
    seen: Seen, store: Store, tokenizer: Tokenizer, policy_rows: int, ends: Collection[int], context: int,
    most_cut: float,
) -> Iterator[Guard]:
    """What the rows are held to."""
    rows = max(seen.rows, 1)
    first = f", the first of them {store.origin(seen.first_empty)}" if seen.empty else ""
    yield Guard(
        "zero_targets", seen.empty == 0,
        f"{seen.empty:,} of {seen.rows:,} rows have nothing to learn{first}; {seen.targets:,} of {seen.tokens:,} "
        "tokens are learned",
    )  # fmt: skip
    same = "; the tokenizer pads with its end token, which other trainers then leave out" * (
        tokenizer.pad == tokenizer.end
    )
    names = ", ".join(tokenizer.pieces([end for end in sorted(ends) if end < tokenizer.vocabulary]))
    yield Guard(
        "end_token", seen.ended >= LEAST_ENDED * seen.rows,
        f"an end token ({names}) is learned in {seen.ended / rows:.1%} of the rows: where it is not, the model is not "
        f"taught to stop{same}",
    )  # fmt: skip
    yield _truncation(store, most_cut)
    read = seen.longest if store.comparisons else max(seen.longest - 1, 0)
    yield Guard(
        "context", read <= context,
        f"the longest row reads {read:,} tokens, the model's context is {context:,}"
        + ("; data.sequence_length and data.too_long say what becomes of longer rows" if read > context else ""),
    )
    yield Guard(
        "padding", seen.padded <= MOST_PADDED * seen.rows,
        f"{seen.padded / rows:.1%} of the rows end in two padding tokens or more: packing needs no padding, and what "
        f"stands in the data is read as text{same}",
    )  # fmt: skip
    document, before = seen.first_duplicate
    one, all_ = ("comparison", store.comparisons) if store.comparisons else ("row", rows)
    again = f", such as {one} {document + 1:,}, the same as {one} {before + 1:,}" if seen.duplicates else ""
    yield Guard(
        "duplicates", seen.duplicates <= MOST_DUPLICATES * all_,
        f"{seen.duplicates / all_:.1%} of the {one}s are the same as an earlier one{again}",
    )  # fmt: skip
    if store.comparisons:
        yield from (Guard(*item) for item in looked_at(store, ends))
    known = min(tokenizer.vocabulary, policy_rows)
    wanted = max(seen.highest, tokenizer.end, *ends)
    yield Guard(
        "vocabulary", wanted < known,
        f"the largest id is {wanted:,}; the tokenizer has {tokenizer.vocabulary:,} ids, the model {policy_rows:,} "
        "embedding rows",
    )  # fmt: skip


def _truncation(store: Store, most: float) -> Guard:
    if not (store.path / FATES).is_file():
        return Guard("truncation", True, "the store does not say what became of its records")
    told = fates_of(store)
    by_fate = {fate: told.by_fate[fate] for fate in _SHORTENED if told.by_fate.get(fate)}
    share = sum(by_fate.values()) / max(told.records, 1)
    which = ", ".join(f"{number:,} {fate}" for fate, number in by_fate.items()) or "none"
    return Guard(
        "truncation", share <= most,
        f"{share:.1%} of {told.records:,} records did not fit ({which}), {most:.0%} may: answers that break off teach "
        "to break off",
    )


def _memory(batch: Batch | None, objective: Objective, engine: Engine, annotators: Sequence[Annotator]) -> Guard:
    """Forward and backward of the largest micro-batch there can be, the longest rows first, and nothing kept."""
    if batch is None:
        return Guard("memory", True, "the longest rows were not tried")
    batch = batch.to(engine.device)
    told = f"a micro-batch of {batch.input_tokens:,} tokens, its longest row {int(batch.position_BT.max()) + 1:,}"
    try:
        batch = annotated(batch, annotators)
        with engine.micro(last=True):
            terms = objective.terms(engine.forward(batch, objective.wants), batch)
            engine.backward(loss_of(terms, engine.sum(count([batch]))))
    except torch.OutOfMemoryError as error:
        engine.discard()
        return Guard("memory", False, f"{told}, does not fit the memory: {str(error).splitlines()[0]}")
    engine.discard()
    peak = ""
    if engine.device.type == "cuda":
        peak = f": {torch.cuda.max_memory_allocated(engine.device) / 2**30:,.1f} GiB before the optimizer's state"
    return Guard("memory", True, f"{told}, was computed{peak}")


def longest_batch(store: Store, tokens_per_batch: int) -> Batch:
    """The longest rows of a store that fit a micro-batch together, the longest of all among them."""
    lengths = np.diff(store.offsets[0 : store.documents + 1]) - 1
    order = np.argsort(-lengths, kind="stable")
    order = order[lengths[order] > 0]
    fit = max(1, int(np.searchsorted(np.cumsum(lengths[order]), tokens_per_batch, side="right")))
    rows = []
    for place, document in enumerate(order[:fit].tolist()):
        tokens = store.read(document)
        one = np.zeros(len(tokens), dtype=np.int32)
        rows.append(Row(tokens, one, place, store.weights(document), store.gates(document)))
    return end_to_end(rows)


def _write(
    run: RunDir, guards: Sequence[Guard], figures: Mapping[str, Any], store: Store, tokenizer: Tokenizer
) -> None:
    """preflight.json: what was looked at, and rows spread over the data with what is learned of them."""
    found: dict[str, Any] = {
        "guards": [asdict(guard) for guard in guards],
        "figures": dict(figures),
        "rows": [
            {"row": document + 1, "pieces": _pieces(store, document, tokenizer)}
            for document in islice(range(0, store.documents, max(1, store.documents // SHOWN)), SHOWN)
        ],
    }
    aside = run.path / f".{FILE}.partial"
    aside.write_text(json.dumps(found, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
    os.replace(aside, run.path / FILE)


def _pieces(store: Store, document: int, tokenizer: Tokenizer) -> list[dict[str, str]]:
    """A row's text in stretches: {"read": ...} or {"learned": ...}."""
    ids = store.read(document).tolist()
    if max(ids, default=0) >= tokenizer.vocabulary:
        return []    # the guard of the vocabulary says so
    pieces = tokenizer.pieces(ids)
    marks = learned(store, document).tolist()
    return [
        {"learned" if mark else "read": "".join(pieces[place] for place in places)}
        for mark, places in groupby(range(len(ids)), marks.__getitem__)
    ]


def _require(run: RunDir, guards: Sequence[Guard], engine: Engine) -> None:
    tripped = [guard for guard in guards if not guard.ok and not guard.allowed]
    if not engine.sum({"tripped": float(len(tripped))})["tripped"]:
        return
    if not tripped:
        raise UserError("the preflight of another rank stopped the run", where=str(Path(run.path) / FILE))
    names = ", ".join(guard.name for guard in tripped)
    raise UserError(
        f"before its first step, the run was stopped by {'a guard' if len(tripped) == 1 else 'guards'}: {names}",
        where=str(run.path / FILE),
        why="\n".join(guard.detail for guard in tripped),
        fix=f"mend the data; or, if it is meant, allow=[{names}]",
    )
