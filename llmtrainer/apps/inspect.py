"""inspect: the rows of a step as the model sees them, each token coloured by how much it counts."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import groupby, islice
from pathlib import Path
from typing import Any, ClassVar, Literal

import numpy as np
from pydantic import Field

from llmtrainer.base.config import Config, is_data, load
from llmtrainer.base.errors import UserError
from llmtrainer.base.result import Result
from llmtrainer.base.rundir import RunDir
from llmtrainer.core.example import Comparison
from llmtrainer.core.protocols import opening
from llmtrainer.data.collate import Row
from llmtrainer.data.comparison_rows import rows_of as rows_of_comparison
from llmtrainer.data.comparisons.auto import Auto as AnyComparison
from llmtrainer.data.detect import conversations_in, detect, formats, placed
from llmtrainer.data.document import Document, Reading, SourceFile
from llmtrainer.data.format import ComparisonFormat, Format, RecordFormat
from llmtrainer.data.formats.auto import Auto
from llmtrainer.data.open import contents, find
from llmtrainer.data.packed import Store, is_store
from llmtrainer.data.records import records
from llmtrainer.data.tokens import Vocabulary
from llmtrainer.parallel.engines.single import Single
from llmtrainer.tokenizer.chat import Chat
from llmtrainer.tokenizer.tokenizer import FileTokenizer
from llmtrainer.training.assemble import rows_of, tokenizer_of
from llmtrainer.training.chats import day_of
from llmtrainer.training.console import warn
from llmtrainer.training.figures import number
from llmtrainer.training.models import load_tokenizer
from llmtrainer.training.recipe import Recipe
from llmtrainer.training.writing import visible

RESET = "\x1b[0m"
READ_ONLY, PARTLY, LEARNED, CRITICAL = "\x1b[2m", "\x1b[36m", "\x1b[32m", "\x1b[1;30;43m"


class Inspection(Config):
    """Which rows to show: of a step of a recipe, or the documents of some data."""

    words: ClassVar[tuple[str, ...]] = ("source",)
    file_is_word: ClassVar[bool] = True

    source: str
    """A recipe or a run directory, whose rows are shown as a step has them; or text, conversations or a token store,
    whose documents are shown whole."""

    step: int = Field(default=0, ge=0)
    """Which step, counted from 0. For text: documents step * rows and following."""

    rows: int = Field(default=4, ge=1)
    """How many rows."""

    part: Literal["train", "held_out"] = "train"
    """Which part of a recipe's data."""

    tokenizer: str | None = None
    """A folder or a file with a tokenizer of any known format: for text and token stores. A recipe has its own."""

    fields: tuple[str, ...] = ("text", "content")
    """For text: where a record's text is, the first of these fields that it has. Records without are conversations."""

    template: str | None = None
    """For conversations: auto, the tokenizer's own chat template (what is taken where none is named); a built-in one,
    such as chatml; or a path to a .jinja file."""

    format: Format = Auto()
    """For conversations: under which keys they stand. auto tells it by the first records."""

    date: str | None = None
    """For conversations: the date that a template with a clock shows, `2026-11-22`."""

    leave_out: tuple[Literal["thinking", "tools"], ...] = ()
    """For conversations: what the template may leave out without being refused."""

    overrides: tuple[str, ...] = ()
    """Changes to the recipe: `overrides=[data.sequence_length=64]`."""

    boundaries: bool = False
    """Write a `|` between tokens."""

    color: Literal["auto", "always", "never"] = "auto"
    """auto: on a terminal. Without colour, the weight stands in front of the text."""


@dataclass(frozen=True)
class Shown:
    """One row, lists of one length."""

    tokens: list[int]
    pieces: list[str]
    """The text of each token; joined they are the row's text."""
    weights: list[float]
    """How much each token counts as a target: 0 is only read."""
    positions: list[int]
    """Place in its document; restarts with every document."""
    document: list[int]
    """Which document of the row."""
    answer: list[int] | None = None
    """Of a comparison: which answer, the best is 0; -1 is the prompt that all of them share. None: it is none."""


@dataclass(frozen=True)
class Inspected(Result):
    """The rows, and where they are from."""

    source: str
    step: int
    rows: list[Shown]
    boundaries: bool = False
    colored: bool = False

    def json(self) -> dict[str, Any]:
        return {"source": self.source, "step": self.step, "rows": [_told(row) for row in self.rows]}

    def text(self) -> str:
        parts = [_legend()] if self.colored else []
        for index, row in enumerate(self.rows):
            shown = _painted if self.colored else _plain
            parts += [_title(index, row), shown(row, self.boundaries)]
        return "\n".join(parts).rstrip("\n")


def inspect(settings: Inspection) -> Inspected:
    """Rows as training would see them. UserError where the data has no such step or the recipe no such part."""
    path = Path(settings.source)
    named = path.suffix in (".yaml", ".yml") and not is_data(Recipe, path)
    recipe = path if named else RunDir(path).recipe
    if named or recipe.is_file():
        rows = list(_of_recipe(settings, load(Recipe, recipe, settings.overrides)))
    else:
        rows = list(_of_documents(settings))
        if not rows:
            raise UserError(
                f"there are no documents {settings.step * settings.rows:,} and following" if settings.step
                else "there is nothing in it to show", where=settings.source,
                fix="step=0" if settings.step else "name a file with documents or conversations",
            )
    colored = settings.color == "always" or (settings.color == "auto" and sys.stdout.isatty())
    return Inspected(settings.source, settings.step, rows, settings.boundaries, colored)


def _of_recipe(settings: Inspection, recipe: Recipe) -> Iterator[Shown]:
    if settings.tokenizer is not None:
        raise UserError(
            "the recipe has its own tokenizer", fix=f"overrides=[tokenizer.path={settings.tokenizer}] changes it"
        )
    if given := [name for name in ("template", "format", "date", "leave_out", "fields") if name in settings.changed()]:
        raise UserError(
            f"the recipe says itself how its data is read, and `{given[0]}` is given besides",
            fix=f"leave {given[0]} out; overrides=[data.{given[0]}=...] changes the recipe's",
        )
    # Its rank and world size are all that rows depend on: one process sees the rows of the whole step.
    engine = Single(device="cpu").start("float32")
    folder, tokenizer = tokenizer_of(recipe)
    rows = rows_of(recipe, folder, tokenizer, engine)
    source = rows.train
    if settings.part == "held_out":
        held_out = rows.measured().get("held_out")
        if held_out is None:
            raise UserError("the recipe holds nothing out", fix="overrides=[data.held_out=0.01]")
        source = held_out
    if source is None:
        assert rows.prompts is not None
        for draw in rows.prompts.draws(settings.step)[: settings.rows]:
            ids = list(rows.prompts.prompt(draw).tokens)
            yield Shown(
                tokens=ids, pieces=tokenizer.pieces(ids), weights=[0.0] * len(ids), positions=list(range(len(ids))),
                document=[0] * len(ids),
            )
        return
    for place in range(min(settings.rows, source.rows_per_step)):
        row = source.row(settings.step, place)
        yield Shown(pieces=_pieces(tokenizer, row), **row)


def _pieces(tokenizer: FileTokenizer, row: dict[str, list[Any]]) -> list[str]:
    """The text of each token. An answer that repeats the last token of its prompt begins a text of its own."""
    owner = row.get("answer") or row["document"]
    stretches = groupby(range(len(owner)), owner.__getitem__)
    return [piece for _, places in stretches for piece in tokenizer.pieces([row["tokens"][place] for place in places])]


def _told(row: Shown) -> dict[str, Any]:
    return {name: value for name, value in vars(row).items() if value is not None}


def _of_documents(settings: Inspection) -> Iterator[Shown]:
    if settings.overrides or settings.part != "train":
        key = "overrides" if settings.overrides else "part"
        raise UserError(f"`{key}` is for recipes", where=settings.source, fix=f"leave {key} out, or name a recipe")
    if settings.tokenizer is None:
        raise UserError(
            "text alone has no tokens", where=settings.source,
            fix=f"llmtrainer inspect {settings.source} tokenizer=FOLDER, the folder of a tokenizer or a model",
        )
    tokenizer = load_tokenizer(settings.tokenizer)
    first = settings.step * settings.rows
    found = islice(_documents(settings, tokenizer), first, first + settings.rows)
    for count, (ids, weights) in enumerate(found):
        counts = None if weights is None else np.array(weights, dtype=np.float32)
        row = Row(np.array(ids, dtype=np.int64), np.zeros(len(ids), dtype=np.int32), first + count, counts)
        yield Shown(
            tokens=ids, pieces=tokenizer.pieces(ids), weights=row.weights.tolist(),
            positions=row.positions.tolist(), document=row.document.tolist(),
        )


def _documents(settings: Inspection, tokenizer: FileTokenizer) -> Iterator[tuple[list[int], list[float] | None]]:
    """(ids, weights) of documents as a store holds them: the begin of a tokenizer that has one, their ids, then the
    end; of conversations the rows that their template makes."""
    if is_store(Path(settings.source)):
        store = Store(settings.source)
        store.require_tokenizer(tokenizer.fingerprint, tokenizer.vocabulary)
        for document in range(store.documents):
            weights = store.weights(document)
            yield store.read(document).tolist(), None if weights is None else weights.tolist()
        return
    files, vocabulary = find(settings.source, warn), Vocabulary.of(tokenizer)
    chats = conversations_in(settings.source, files, settings.fields, warn)
    if chats or settings.template is not None or settings.format.kind != "auto":
        yield from _conversations(settings, chats or files, tokenizer)
        return
    for found in contents(files, vocabulary, Reading(settings.fields, warn=warn)):
        if isinstance(found, Document):
            yield [*opening(tokenizer), *tokenizer.encode(found.text), tokenizer.end], None
        else:
            yield [*found.ids.tolist(), tokenizer.end], None


def _conversations(
    settings: Inspection, files: list[SourceFile], tokenizer: FileTokenizer
) -> Iterator[tuple[list[int], list[float]]]:
    chat = Chat(tokenizer, settings.template or "auto", day=day_of(settings.date), leave_out=settings.leave_out)
    reading = Reading(warn=warn, whole=True)
    for file in files:
        told = _format_of(settings, file, reading)
        if told is None:
            continue
        for record in records(file, reading):
            example = placed(told, record)
            if isinstance(example, Comparison):
                for piece in rows_of_comparison(chat, example, record.place)[0]:
                    yield piece.tokens.tolist(), piece.weights.tolist()
                continue
            try:
                rows = chat.rows(example)
            except UserError as error:
                error.where = record.place if error.where is None else f"{record.place}, {error.where}"
                raise
            for row in rows:
                yield list(row.tokens), list(row.weights)


def _format_of(settings: Inspection, file: SourceFile, reading: Reading) -> RecordFormat | None:
    """How a file writes its conversations; or its comparisons, of which each answer is then a row."""
    try:
        told = detect(settings.format, records(file, reading))
        return None if told is None else told.format
    except UserError:
        first = next(iter(records(file, reading)), None)
        known = formats(ComparisonFormat) if settings.format.kind == "auto" and first is not None else ()
        if first is None or not any(item.matches(first.value) for item in known):
            raise
    wanted: ComparisonFormat = AnyComparison()
    compared = detect(wanted, records(file, reading))
    return None if compared is None else compared.format


def _title(index: int, row: Shown) -> str:
    targets, total = sum(weight > 0 for weight in row.weights), sum(row.weights)
    count = len(set(row.document))
    weighed = "" if total == targets else f", their weights add up to {number(float(total))}"
    return (
        f"row {index}: {len(row.tokens):,} tokens in {count:,} document{'s' if count != 1 else ''}, "
        f"{targets:,} of them learned{weighed}"
    )


def _stretches(row: Shown, boundaries: bool) -> Iterator[tuple[str, float, str]]:
    """(what it is a part of, weight, text) of each run of tokens that have both in common."""
    joint = "|" if boundaries else ""
    for (part, weight), places in groupby(range(len(row.tokens)), lambda i: (_part(row, i), row.weights[i])):
        yield part, weight, joint.join(row.pieces[place] for place in places) + joint


def _part(row: Shown, place: int) -> str:
    """Which document a token belongs to; of a comparison the prompt, or which answer."""
    if row.answer is None:
        return f"document {row.document[place]}"
    return "the prompt" if row.answer[place] < 0 else f"answer {row.answer[place] + 1}"


def _painted(row: Shown, boundaries: bool) -> str:
    shown: list[str] = []
    last = None
    for part, weight, text in _stretches(row, boundaries):
        if last is not None and part != last:
            shown.append(f"\n{READ_ONLY}-- {part}{RESET}\n")
        last = part
        # Line by line: a pager forgets a colour at the end of a line.
        shown.append("\n".join(f"{_style(weight)}{line}{RESET}" for line in visible(text).split("\n")))
    return "".join(shown) + "\n"


def _style(weight: float) -> str:
    return READ_ONLY if weight <= 0 else PARTLY if weight < 1 else LEARNED if weight == 1 else CRITICAL


def _legend() -> str:
    kinds = ((0.0, "0: only read"), (0.5, "below 1"), (1.0, "1: learned"), (2.0, "above 1: critical"))
    return "weights  " + "  ".join(f"{_style(weight)}{text}{RESET}" for weight, text in kinds) + "\n"


def _plain(row: Shown, boundaries: bool) -> str:
    lines: list[str] = []
    last = "document 0"
    for part, weight, text in _stretches(row, boundaries):
        if part != last:
            lines.append(f"-- {part}")
        last = part
        first, *others = visible(text).removesuffix("\n").split("\n")
        lines += [f"{weight:>6g} | {first}", *(f"       | {line}" for line in others)]
    return "\n".join(lines) + "\n"
