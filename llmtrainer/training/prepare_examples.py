"""Conversations become a token store with weights: by command, or into the cache when a run names their files."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from llmtrainer.base.errors import UserError
from llmtrainer.data import stdlib
from llmtrainer.data.comparison_rows import ComparisonChoices
from llmtrainer.data.detect import detect
from llmtrainer.data.document import Reading
from llmtrainer.data.example_rows import Choices
from llmtrainer.data.examples import ExampleFile, duplicates, fates_of, write_examples
from llmtrainer.data.fates import Totals, require_few_losses
from llmtrainer.data.format import ComparisonFormat, Format, RecordFormat
from llmtrainer.data.length import LengthPolicy
from llmtrainer.data.open import find
from llmtrainer.data.outcome import RowChoices
from llmtrainer.data.packed import FATES, Store, is_store
from llmtrainer.data.records import holding, records
from llmtrainer.tokenizer.chat import Chat
from llmtrainer.training.cache import built, identity, known_hashes, receipt
from llmtrainer.training.chats import load_chat
from llmtrainer.training.console import bar, say, warn
from llmtrainer.training.models import model_folder
from llmtrainer.training.prepared import PreparedExamples

if TYPE_CHECKING:
    from llmtrainer.training.prepare import Preparation

COMPARISONS = "comparisons"
"""The format of `prepare` that stands for those of comparisons."""
ONE_ANSWER = {"liked": "whether one was liked", "graded": "how good one is"}
"""Formats of records with one answer, and what they say of it."""
VERSION = 1
"""Raised when the same files and settings would give other bytes: every older key then misses."""


@dataclass(frozen=True)
class Wish:
    """Which files, how they are read, and what their rows are to be."""

    paths: tuple[str, ...]
    format: RecordFormat
    choices: RowChoices
    max_dropped_share: float = 0.1
    template: str = "auto"
    date: str | None = None
    leave_out: tuple[str, ...] = ()
    workers: int = 0
    chat: Chat = field(kw_only=True)
    """The template, ready to render."""
    folder: Path = field(kw_only=True)
    """Where the tokenizer lies."""

    @property
    def name(self) -> str:
        return ", ".join(self.paths)


@dataclass(frozen=True)
class Found:
    """The files of a wish, each with its format."""

    files: tuple[ExampleFile, ...]
    how: tuple[str, ...]
    """What was found out about the files of each format, and the first example: for people."""


def look(wish: Wish) -> Found:
    """Look at the first records of every file. UserError where there are none, or a format is not to be told."""
    choices = wish.choices
    reading = Reading(
        allow_truncated=choices.allow_truncated, warn=warn, allow_pickle=choices.allow_pickle, whole=True,
        lenient=choices.bad_records == "drop",
    )  # fmt: skip
    files: list[ExampleFile] = []
    told: dict[str, list[str]] = {}
    empty = []
    for path in wish.paths:
        for source in holding(find(path, warn), warn):
            seen = detect(wish.format, records(source, reading), bad_may_drop=choices.bad_records == "drop")
            if seen is None:
                empty += [] if path.startswith(stdlib.PREFIX) else [source.path]    # a module without docstrings
            else:
                files.append(ExampleFile(source, seen.format))
                told.setdefault(seen.format.kind, []).append(seen.how)
    if empty and files:
        warn(f"{len(empty):,} of {len(files) + len(empty):,} files hold no records, such as {empty[0]}")
    if not files:
        raise UserError("there are no records to learn from", where=wish.name, fix="name a file of records")
    alone = next((kind for kind in ONE_ANSWER if kind in told), None)
    if alone is not None and len(told) > 1 and compares(wish.format):
        other = next(kind for kind in told if kind != alone)
        raise UserError(
            f"some files compare answers, and some say {ONE_ANSWER[alone]}", where=wish.name,
            why=f"formats {alone} and {other}: no objective learns from both at once",
            fix="name files of one sort",
        )
    how = [f"{first}" + (f"\n  and {len(more):,} more files like it" if more else "") for first, *more in told.values()]
    return Found(tuple(files), tuple(how))


def compares(format: RecordFormat) -> bool:
    """Whether records of this format are comparisons."""
    return isinstance(format, ComparisonFormat)


def key_of(wish: Wish, files: Sequence[ExampleFile], hashes: dict[str, Any]) -> str:
    """SHA-256 over everything that decides the bytes of the store."""
    content = {
        "examples": VERSION,
        "files": [
            ["".join(file.source.path.suffixes[-2:]), file.source.bytes, identity(file.source.path, hashes),
             file.format.plain()]
            for file in files
        ],
        "template": wish.chat.fingerprint,
        "choices": wish.choices.facts(),
    }  # fmt: skip
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


def build(wish: Wish, files: Sequence[ExampleFile], out: Path, key: str) -> bool:
    """Write the store at `out`, unless it is there. Returns whether it was."""
    def write(folder: Path) -> dict[str, Any]:
        # A process that is started for a small file takes longer than its work, and so would a second tokenizer here.
        small = sum(file.source.bytes for file in files) < 2**20
        make = (lambda: wish.chat) if small else partial(
            load_chat, wish.folder, wish.template, wish.date, wish.leave_out
        )
        with bar("examples", None, "records") as advance:
            store = write_examples(
                files, make, wish.chat.tokenizer, folder, choices=wish.choices,
                max_dropped_share=wish.max_dropped_share,
                workers=0 if small else wish.workers or os.cpu_count() or 1, report=advance, warn=warn,
            )  # fmt: skip
        return facts_of(store)

    return built(out, key, write)


def facts_of(store: Store) -> dict[str, Any]:
    """What is noted about a store of examples when it was made."""
    told = fates_of(store)
    return {
        "vocabulary": store.vocabulary,
        "tokens": store.tokens,
        "documents": store.documents,
        "bytes_per_token": store.text_bytes / max(store.tokens, 1),
        "records": told.records,
        "fates": told.by_fate,
        "duplicates": duplicates(store),
    }


def prepared_examples(wish: Wish, cache: Path) -> Store:
    """The store of a wish: itself if a prepared one is named, else the one in the cache, made now if need be. Says
    what was found, and what became of the records."""
    if len(wish.paths) == 1 and is_store(Path(wish.paths[0])):
        return _given(wish)
    seen = look(wish)
    for told in seen.how:
        say(told)
    with known_hashes(cache) as hashes:
        key = key_of(wish, seen.files, hashes)
    folder = cache / "examples" / key[:32]
    there = build(wish, seen.files, folder, key)
    store = Store(folder)
    told = "are prepared already" if there else "were prepared"
    say(f"the rows of {wish.name} {told}: {folder}\n{summary(fates_of(store), receipt(folder)['duplicates'])}")
    # What is in the cache may have been made under another limit.
    require_few_losses(fates_of(store), wish.max_dropped_share)
    return store


def summary(told: Totals, twice: int) -> str:
    """The table of fates, and how many rows are there more than once."""
    return told.table() + (f"\n  {twice:>10,}  rows are the same as an earlier one" if twice else "")


def _given(wish: Wish) -> Store:
    """A store that `llmtrainer prepare` made of conversations, with this very template."""
    store = Store(wish.paths[0])
    tokenizer = wish.chat.tokenizer
    store.require_tokenizer(tokenizer.fingerprint, tokenizer.vocabulary)
    if store.weight_dtype is None or not (store.path / FATES).is_file():
        raise UserError(
            "the token store was made of text, not of conversations", where=str(store.path),
            fix="data.kind=documents, or name the files of conversations",
        )
    if bool(store.comparisons) != compares(wish.format):
        raise UserError(
            "the token store holds " + ("comparisons" if store.comparisons else "conversations"),
            where=str(store.path),
            fix="data.kind=preferences" if store.comparisons else "data.kind=examples",
        )
    if store.manifest.get("template") != wish.chat.fingerprint:
        raise UserError(
            "the token store was made with another chat template", where=str(store.path),
            why=f"its fingerprint is {str(store.manifest.get('template'))[:12]}, the template's is "
            f"{wish.chat.fingerprint[:12]}",
            fix="name the template that it was made with (data.template), or prepare the conversations again",
        )
    return store


def prepare_conversations(preparation: Preparation) -> PreparedExamples:
    """The verb `prepare` for conversations: a store with weights, and a fate for every record."""
    folder, out = model_folder(preparation.tokenizer, weights=False), Path(preparation.out)
    template, day, left_out = preparation.template, preparation.date, preparation.leave_out
    format, choices = _wanted(preparation)
    wish = Wish(
        tuple(part.strip() for part in preparation.data.split(",")), format, choices,
        preparation.max_dropped_share, template, day, left_out, preparation.workers,
        chat=load_chat(folder, template, day, left_out), folder=folder,
    )  # fmt: skip
    seen = look(wish)
    for told in seen.how:
        say(told)
    reused = build(wish, seen.files, out, key_of(wish, seen.files, {}))
    facts = receipt(out)
    return PreparedExamples(
        str(out), facts["tokens"], facts["documents"], facts["vocabulary"], facts["bytes_per_token"], reused,
        facts["records"], facts["fates"], facts["duplicates"], sorted({file.format.kind for file in seen.files}),
        fates_of(Store(out)).table(),
    )  # fmt: skip


def _wanted(preparation: Preparation) -> tuple[RecordFormat, RowChoices]:
    """The format that is named, and what decides the rows. UserError for a setting that means nothing there."""
    lenient = (preparation.bad_records, preparation.allow_truncated, preparation.allow_pickle)
    name, _, kind = preparation.format.partition(".")
    if name != COMPARISONS:
        _refuse(preparation, ("prompt_cut", "max_prompt_length"), "comparisons", "format=comparisons")
        cut = (preparation.cut_side, preparation.cut_end)
        length = LengthPolicy(preparation.max_length, preparation.too_long, *cut)
        choices = Choices(length, *lenient, preparation.learn, preparation.gate)
        return Format.chosen({"kind": preparation.format})(), choices
    _refuse(preparation, ("cut_side", "cut_end", "learn", "gate"), "conversations", "leave it out")
    too_long = preparation.too_long if "too_long" in preparation.model_fields_set else "cut"
    if too_long == "split":
        raise UserError("a comparison is never split", fix="too_long=cut, drop or keep")
    return ComparisonFormat.chosen({"kind": kind or "auto"})(), ComparisonChoices(
        preparation.max_length, too_long, preparation.prompt_cut, preparation.max_prompt_length, *lenient
    )


def _refuse(preparation: Preparation, names: Sequence[str], of: str, fix: str) -> None:
    if meant := [name for name in names if name in preparation.model_fields_set]:
        raise UserError(f"`{meant[0]}` is for {of}", fix=fix)
