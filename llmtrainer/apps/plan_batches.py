"""plan-batches: how large a micro-batch must be, what it will hold, and how near that is to the best there is."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, Literal

import numpy as np
from numpy.typing import NDArray
from pydantic import Field

from llmtrainer.base.config import Config
from llmtrainer.base.errors import UserError
from llmtrainer.base.result import Result
from llmtrainer.data.bins_first import find_steps
from llmtrainer.data.budget import lower_bound
from llmtrainer.data.detect import conversations_in, detect, placed
from llmtrainer.data.document import Document, Reading, SourceFile
from llmtrainer.data.formats.auto import Auto
from llmtrainer.data.lengths import hold_lengths, lengths_in_records, lengths_in_store
from llmtrainer.data.open import contents, find
from llmtrainer.data.packed import Store, is_store
from llmtrainer.data.records import records
from llmtrainer.data.tokens import Vocabulary
from llmtrainer.tokenizer.chat import Chat
from llmtrainer.training.chats import day_of
from llmtrainer.training.console import warn

PROMPT = "group_size batch_size (0 0 ends): "


class BatchPlanning(Config):
    """Which sequences, and how many of them a step is to learn from in how many micro-batches."""

    words: ClassVar[tuple[str, ...]] = ("data",)

    data: str
    """A token store; a file of records `{"length": 12}`; or, with a tokenizer, documents or conversations."""

    group_size: int | None = Field(default=None, ge=1)
    """Micro-batches of one optimizer step: ranks times accumulation. On a terminal you are asked."""

    batch_size: int | None = Field(default=None, ge=1)
    """Sequences of one optimizer step, over all ranks. On a terminal you are asked."""

    max_length: int | None = Field(default=None, ge=1)
    """The longest sequence there may be, in tokens. By default the longest there is."""

    compatible: bool = False
    """Plan as auto_get_size did: all sequences into bins by worst fit, then bins to steps of `batch_size` sequences
    on average, and nothing is refused. Training here draws the sequences of a step first."""

    seed: int = Field(default=0, ge=0)
    """The recipe's seed: which sequences meet in a step."""

    tokenizer: str | None = None
    """A folder or a file with a tokenizer, for data that is text or conversations."""

    template: str = "auto"
    """What conversations become before they are tokens: auto is the tokenizer's own chat template; or the name of a
    built-in one, or a path to a .jinja file."""

    date: str | None = None
    """The date that a template with a clock shows: `2026-11-22`."""

    leave_out: tuple[Literal["thinking", "tools"], ...] = ()
    """What the template may leave out of a conversation without being refused."""

    fields: tuple[str, ...] = ("text", "content")
    """For text: where a record's text is, the first of these fields that it has."""


@dataclass(frozen=True)
class BatchPlan(Result):
    """The smallest micro-batch that will do."""

    batch_max_tokens: int
    """Tokens of one bin."""
    divider: int
    """Bins of one micro-batch."""
    tokens_per_batch: int
    """Tokens of one micro-batch: what `data.tokens_per_batch` is set to."""
    samples_per_step: tuple[int, int]
    """Sequences of the step with fewest and of that with most."""
    bins_per_step: tuple[int, int]
    fill: float
    """Share of the bins that tokens take."""
    bins: int
    lower_bound: int
    """No plan for these steps (compatible: for these sequences) has fewer bins."""
    gap: float
    """Bins above the bound, as a share of it."""
    sequences: int
    tokens: int
    below: int | None = None
    """`max_length`, or the longest sequence, where a micro-batch is shorter: only if `compatible`."""

    def text(self) -> str:
        best = "no plan has fewer" if self.gap == 0.0 else f"at least {self.lower_bound:,}, gap {self.gap:.2%}"
        least, most = self.samples_per_step
        few, many = self.bins_per_step
        return "\n".join([
            f"batch_max_tokens  {self.batch_max_tokens:,} (divider {self.divider})",
            f"samples_per_step  {least:,} to {most:,}, in {few:,} to {many:,} bins",
            f"bins              {self.bins:,} for {self.sequences:,} sequences, {self.tokens:,} tokens: {best}",
            f"fill              {self.fill:.2%}",
            *([f"in a recipe       data.tokens_per_batch={self.tokens_per_batch} data.sequences_per_step={least}"]
              if self.tokens_per_batch else []),
            *([f"note              below max_length, {self.below:,}: a longer sequence does not fit a micro-batch"]
              if self.below else []),
        ])


@dataclass(frozen=True)
class Dialogue(Result):
    """The plans that were asked for, one after another; each was shown when it was made."""

    plans: list[BatchPlan]

    def json(self) -> dict[str, Any]:
        return {"plans": [plan.json() for plan in self.plans]}

    def text(self) -> str:
        return ""


def plan_batches(settings: BatchPlanning) -> BatchPlan | Dialogue:
    """Find the smallest budget of tokens for a micro-batch, and prove how near its plan is to the best. Raises
    UserError where a micro-batch would be shorter than `max_length`, unless `compatible`."""
    asked = settings.group_size, settings.batch_size
    if None in asked and not sys.stdin.isatty():
        missing = " ".join(
            f"{name}={number}" for name, number, given in zip(("group_size", "batch_size"), (8, 64), asked, strict=True)
            if given is None
        )  # fmt: skip
        raise UserError(
            "how large a step is to be was not said", why="it is asked for only on a terminal", fix=missing,
        )
    lengths = _lengths(settings)
    if not len(lengths):
        raise UserError("the data has no sequence to learn from", where=settings.data, fix="name other data")
    if settings.group_size is not None and settings.batch_size is not None:
        return _plan(settings, lengths, settings.group_size, settings.batch_size)
    plans = []
    for group_size, batch_size in _asked(settings):
        try:
            plans.append(_plan(settings, lengths, group_size, batch_size))
            print(plans[-1].text(), flush=True)
        except UserError as error:
            print(error, flush=True)
    return Dialogue(plans)


def _plan(settings: BatchPlanning, lengths: NDArray[np.int64], group_size: int, batch_size: int) -> BatchPlan:
    tokens, longest = int(lengths.sum()), settings.max_length or int(lengths.max())
    if settings.compatible:
        steps = find_steps(lengths, group_size, batch_size)
        bins, within = len(steps.bins), np.minimum(lengths, steps.budget)
        # With as few sequences a step as bins, the search of auto_get_size ends at no token at all: each is alone.
        bound = lower_bound(within, steps.budget) if steps.budget else bins
        fill = int(within.sum()) / (bins * steps.budget) if steps.budget else 0.0
        return BatchPlan(
            steps.budget, 1, steps.budget, steps.samples_per_step, (group_size, group_size), fill, bins, bound,
            bins / bound - 1, len(lengths), tokens,
            longest if steps.budget < longest else None,
        )  # fmt: skip
    # Which imports torch: seconds that only this plan needs.
    from llmtrainer.data.rows_first import find_plan

    found = find_plan(lengths, group_size, batch_size, longest, settings.seed)
    return BatchPlan(
        found.budget, found.divider, found.budget * found.divider, found.samples_per_step, found.micro_batches,
        found.fill, found.bins, found.lower_bound, found.bins / found.lower_bound - 1, len(lengths), tokens,
    )  # fmt: skip


def _lengths(settings: BatchPlanning) -> NDArray[np.int64]:
    """Tokens of each sequence. Of its own tokens a document of training reads all but the last."""
    last = 0 if settings.compatible else 1
    if is_store(Path(settings.data)):
        found = lengths_in_store(Store(settings.data)) - last
    else:
        files = find(settings.data, warn)
        if hold_lengths(files):
            return lengths_in_records(files)
        if settings.tokenizer is None:
            raise UserError(
                "text alone has no tokens", where=settings.data,
                fix=f"llmtrainer plan-batches {settings.data} tokenizer=FOLDER, or name a token store, or records "
                '{"length": 12}',
            )
        found = np.fromiter(_counted(settings, files, settings.tokenizer), dtype=np.int64) - last
    return found[found > 0]


def _counted(settings: BatchPlanning, files: list[SourceFile], name: str) -> Iterator[int]:
    """Tokens of each document with its end, or of each row of a conversation."""
    from llmtrainer.training.models import load_tokenizer

    tokenizer = load_tokenizer(name)
    whole = Reading(warn=warn, whole=True)
    if chats := conversations_in(settings.data, files, settings.fields, warn):
        chat = Chat(tokenizer, settings.template, day=day_of(settings.date), leave_out=settings.leave_out)
        for file in chats:
            if told := detect(Auto(), records(file, whole)):
                for record in records(file, whole):
                    yield from (len(row.tokens) for row in chat.rows(placed(told.format, record)))
        return
    begun = 0 if tokenizer.begin is None else 1
    for item in contents(files, Vocabulary.of(tokenizer), Reading(settings.fields, warn=warn)):
        yield begun + 1 + (len(tokenizer.encode(item.text)) if isinstance(item, Document) else len(item.ids))


def _asked(settings: BatchPlanning) -> Iterator[tuple[int, int]]:
    """What is typed, until `0 0` or the end of the input. What the command said already stands."""
    while True:
        print(PROMPT, end="", flush=True)
        line = sys.stdin.readline()
        words = line.split()
        if not line or words == ["0", "0"]:
            return
        if len(words) == 2 and all(word.isdecimal() and int(word) for word in words):
            group_size, batch_size = map(int, words)
            yield settings.group_size or group_size, settings.batch_size or batch_size
        elif words:
            print("two whole numbers, please, such as `8 64`", flush=True)
