"""Using what was trained: evaluate and generate, the functions behind the commands."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
from pydantic import Field

from llmtrainer.base.config import Config
from llmtrainer.base.errors import UserError
from llmtrainer.base.result import Result
from llmtrainer.core.suite import Suite
from llmtrainer.data.document import Document, Reading, SourceFile, Tokens
from llmtrainer.data.open import contents, documents, find, is_container
from llmtrainer.data.packed import Store, is_store
from llmtrainer.data.tokens import Vocabulary
from llmtrainer.evals.perplexity import Perplexity, Score, Totals, figures
from llmtrainer.generation.sampling import Sampling
from llmtrainer.tokenizer.chat import Chat
from llmtrainer.training.chats import day_of
from llmtrainer.training.console import bar, stdout_is_for_people, warn
from llmtrainer.training.figures import count, number, span
from llmtrainer.training.judging import in_words, judged
from llmtrainer.training.models import Opened, Precision, load_model, load_tokenizer, open_model
from llmtrainer.training.plotting import Plot, plot
from llmtrainer.training.writing import Completed, write

__all__ = [
    "Evaluation", "Generation", "Plot", "evaluate", "generate", "load_model", "load_tokenizer", "plot",
]


class Evaluation(Config):
    """How well a model predicts text: loss, perplexity and bits per byte, and what suites measure besides. Of a reward
    model, on comparisons: how often the better answer scores higher, and by how much."""

    words: ClassVar[tuple[str, ...]] = ("model", "data")

    model: str
    """A run directory (its newest checkpoint), a checkpoint, a Hugging Face folder, or a hub id:
    `Qwen/Qwen3-0.6B`, `owner/name@revision`."""

    data: str | None = None
    """Text: a file, a folder, a glob, an address, or `stdlib:held_out`; or token ids of the model's own
    tokenizer, as files or as a token store. Each document is scored by itself. For a reward model: comparisons, in
    any form that training reads."""

    fields: tuple[str, ...] = ("text", "content")
    """Where a record's text is: the first of these fields that it has."""

    documents: int | None = Field(default=None, ge=1)
    """Only the first so many documents."""

    allow_truncated: bool = False
    """Leave out the broken record at the end of a file that was cut off, instead of refusing it."""

    tokenizer: str | None = None
    """A folder with tokenizer.json or a hub id, if the model's own folder has none."""

    template: str = "auto"
    """For a reward model: auto, the template that lies with its tokenizer; a built-in one, such as chatml; or a path to
    a .jinja file."""

    precision: Precision = "auto"
    """Type of the computation. auto: the one the checkpoint was trained in, float32 where nothing says so."""

    device: str = "auto"
    """auto, cpu, cuda, cuda:1 or mps."""

    max_length: int | None = Field(default=None, ge=2)
    """Tokens read at once. Longer documents go through windows that overlap by half. By default the model's
    own context, which is also the most."""

    tokens_per_batch: int | None = Field(default=None, ge=1)
    """Tokens of one forward pass, padding included: the memory knob. By default 4,096, or one window."""

    suites: tuple[Suite, ...] = ()
    """Further measurements by kind: `suites=[{kind: perplexity, name: news, path: news.jsonl}]`."""

    items: bool = False
    """Also the figures of every single document."""

    per_token: bool = False
    """With `items`: also the surprise at every single token."""


@dataclass(frozen=True)
class Evaluated(Result):
    """What an evaluation found; loss and tokens are None if only suites were asked for."""

    model: str
    """The folder whose weights were measured."""
    data: str | None
    precision: str
    loss: float | None = None
    """Mean nats per predicted token."""
    perplexity: float | None = None
    bits_per_byte: float | None = None
    """Of the documents' UTF-8 bytes."""
    tokens: int | None = None
    """Predicted tokens: the first of a document is not."""
    bytes: int | None = None
    documents: int | None = None
    seconds: float = 0.0
    suites: dict[str, dict[str, float]] = field(default_factory=dict)
    items: list[dict[str, Any]] | None = None
    preference: dict[str, float] | None = None
    """Of a reward model: accuracy, loss and pairs, and mean, deviation and quantiles of the gaps."""

    def text(self) -> str:
        lines = [f"{self.model} in {self.precision}" + (f", on {self.data}" if self.data else "")]
        if self.preference is not None:
            lines += in_words(self.preference)
        elif self.loss is not None:
            assert self.tokens is not None and self.bytes is not None and self.perplexity is not None
            lines += [
                f"  loss           {self.loss:.4f}   nats a token",
                f"  perplexity     {self.perplexity:,.2f}   as unsure as a guess among so many tokens",
                f"  bits per byte  {self.bits_per_byte:.4f}   what a compressor built on it would need",
                f"  read           {count(self.tokens, 'token')}, {count(self.bytes, 'byte')}, "
                f"{count(self.documents or 0, 'document')} in {span(self.seconds)}",
            ]
        for name, told in self.suites.items():
            lines.append(f"  {name}: " + ", ".join(f"{key} {number(value)}" for key, value in told.items()))
        if self.items is not None and self.preference is None:
            lines += ["", "  loss     bits/byte  tokens    document", *map(_item_line, self.items)]
        return "\n".join(lines)


def evaluate(settings: Evaluation) -> Evaluated:
    """Measure a model on text. Deterministic; the figures do not depend on `tokens_per_batch`."""
    if settings.data is None and not settings.suites:
        raise UserError("there is nothing to evaluate on", fix=f"llmtrainer evaluate {settings.model} TEXT")
    if settings.per_token and not settings.items:
        raise UserError("per_token needs items", why="a token is told with its document", fix="items=true")
    _require_own_titles(settings.suites)
    started = time.perf_counter()
    opened = open_model(settings.model, settings.precision, settings.device, settings.tokenizer)
    found: dict[str, Any] = {}
    if settings.data is not None:
        measure = _measure if opened.policy.worded else _judge
        found = measure(opened, settings, settings.data)
    suites = {}
    for suite in settings.suites:
        with bar(suite.title, None, "bytes") as advance:
            suites[suite.title] = suite.run(
                opened.policy, opened.tokenizer, lambda path: _texts(path, settings), advance
            )
    seconds = time.perf_counter() - started
    return Evaluated(
        str(opened.folder), settings.data, opened.precision, **found, suites=suites, seconds=seconds
    )


def _measure(opened: Opened, settings: Evaluation, data: str) -> dict[str, Any]:
    files, found = _documents(opened, settings, data)
    perplexity = Perplexity(max_length=settings.max_length, tokens_per_batch=settings.tokens_per_batch)
    read: deque[Document | Tokens] = deque()

    def texts() -> Iterator[str | list[int]]:
        for document in islice(found, settings.documents):
            read.append(document)
            yield document.text if isinstance(document, Document) else document.ids.tolist()

    total, items = Totals(), list[dict[str, Any]]()
    with bar("evaluate", _bytes_of(files) if settings.documents is None else None, "bytes") as advance:
        for score in perplexity.scores(opened.policy, opened.tokenizer, texts(), advance):
            document = read.popleft()
            total.add(score)
            if settings.items:
                items.append(_item(document, score, opened if settings.per_token else None))
    return {**total.figures(data), "items": items if settings.items else None}


def _judge(opened: Opened, settings: Evaluation, data: str) -> dict[str, Any]:
    found = judged(
        opened, data, template=settings.template, tokens_per_batch=settings.tokens_per_batch,
        comparisons=settings.documents, allow_truncated=settings.allow_truncated,
    )
    figures = found.figures()
    items = [{"comparison": number + 1, "scores": list(scores)} for number, scores in enumerate(found.scores)]
    return {
        "loss": figures["loss"], "tokens": found.tokens, "documents": len(found.scores), "preference": figures,
        "items": items if settings.items else None,
    }  # fmt: skip


def _documents(
    opened: Opened, settings: Evaluation, data: str
) -> tuple[list[SourceFile], Iterator[Document | Tokens]]:
    """The documents of text, of files of ids, or of a token store (which has no files to tell of)."""
    tokenizer = opened.tokenizer
    if not is_store(Path(data)):
        files = find(data)
        reading = Reading(settings.fields, allow_truncated=settings.allow_truncated, warn=warn)
        return files, contents(files, Vocabulary.of(tokenizer), reading)
    store = Store(data)
    store.require_tokenizer(tokenizer.fingerprint, tokenizer.vocabulary)
    numbers = range(store.documents)
    return [], (Tokens(store.read(number)[:-1].astype(np.int64), store.path, number + 1) for number in numbers)


def _item(document: Document | Tokens, score: Score, opened: Opened | None) -> dict[str, Any]:
    place = {"file": str(document.file), "record": document.record}
    if not score.tokens:
        return {**place, "loss": None, "perplexity": None, "bits_per_byte": None, "tokens": 0, "bytes": score.bytes}
    told = {**place, **figures(score.total, score.tokens, score.bytes)}
    if opened is not None:
        # The first token is not predicted: null, so that the three lists are equally long.
        told |= {
            "ids": list(score.ids), "pieces": opened.tokenizer.pieces(score.ids), "nats": [None, *score.nats],
        }
    return told


def _item_line(item: dict[str, Any]) -> str:
    place = f"{item['file']}, record {item['record']:,}"
    if item["loss"] is None:
        return f"  {'-':<8} {'-':<10} {0:<9} {place}"
    return f"  {item['loss']:<8.4f} {item['bits_per_byte']:<10.4f} {item['tokens']:<9,} {place}"


def _texts(path: str, settings: Evaluation) -> Iterable[str]:
    found = documents(find(path), fields=settings.fields, allow_truncated=settings.allow_truncated, warn=warn)
    return (document.text for document in found)


def _bytes_of(files: Iterable[SourceFile]) -> int | None:
    """Bytes of text to come; None where files hold more or less than their text."""
    files = list(files)
    return sum(file.bytes for file in files) if files and not any(is_container(file.path) for file in files) else None


def _require_own_titles(suites: tuple[Suite, ...]) -> None:
    titles = [suite.title for suite in suites]
    for title in titles:
        if titles.count(title) > 1:
            raise UserError(
                f"two suites are called `{title}`", why="one would hide the other's figures",
                fix="give each a `name`",
            )


class Generation(Sampling):
    """Let a model continue a text, or many."""

    words: ClassVar[tuple[str, ...]] = ("model", "prompt")

    model: str
    """A run directory (its newest checkpoint), a checkpoint, a Hugging Face folder, or a hub id:
    `Qwen/Qwen3-0.6B`, `owner/name@revision`."""

    prompt: str | None = None
    """What stands before the first token that is written."""

    prompts: str | None = None
    """Instead of `prompt`: a file with many, each record's `prompt`, `text` or `content`."""

    chat: bool = False
    """A prompt is what a user says: it is put into the chat template, and the answer stops where that ends answers."""

    system: str | None = None
    """For chat: the text that stands before what the user says."""

    template: str = "auto"
    """For chat: auto, the template that lies with the model's tokenizer; a built-in one, such as chatml; or a path to
    a .jinja file."""

    date: str | None = None
    """For chat: the date that a template with a clock shows, `2026-11-22`."""

    max_new_tokens: int = Field(default=200, ge=1)
    """Most tokens to write. The model may end the text before."""

    temperature: float = Field(default=0.8, ge=0.0, allow_inf_nan=False)
    """0 always takes the likeliest token; 1 draws as the model has learned; more is more daring."""

    samples: int = Field(default=1, ge=1)
    """How many continuations of each prompt to write."""

    rows_at_once: int = Field(default=16, ge=1)
    """Continuations written side by side: the memory knob. It changes no text."""

    seed: int = Field(default=0, ge=0)
    """The same seed writes the same text."""

    tokenizer: str | None = None
    """A folder with tokenizer.json or a hub id, if the model's own folder has none."""

    precision: Precision = "auto"
    """Type of the computation. auto: the one the checkpoint was trained in, float32 where nothing says so."""

    device: str = "auto"
    """auto, cpu, cuda, cuda:1 or mps."""

    stream: bool = True
    """Show a single continuation as it is written, where a person looks on."""


@dataclass(frozen=True)
class Generated(Result):
    """What a model wrote."""

    completions: list[Completed]
    seconds: float
    """Of writing, without loading the model."""
    streamed: bool = False
    answers: bool = False
    """Whether they answer their prompts, and do not continue them."""

    def json(self) -> dict[str, Any]:
        return {"completions": [completed.json() for completed in self.completions], "seconds": self.seconds}

    def text(self) -> str:
        if self.streamed:
            return ""
        if len(self.completions) == 1:
            return ("" if self.answers else self.completions[0].prompt) + self.completions[0].text
        told, joint = enumerate(self.completions, start=1), "\n\n" if self.answers else ""
        return "\n".join(f"--- {n} of {len(self.completions)}\n{item.prompt}{joint}{item.text}" for n, item in told)


def generate(settings: Generation) -> Generated:
    """Continue prompts. The same settings on the same weights write the same text."""
    prompts = _prompts(settings)
    for key in ("system", "date") if not settings.chat else ():
        if getattr(settings, key) is not None:
            raise UserError(f"`{key}` is for a chat", fix=f"chat=true, or leave {key} out")
    if settings.template != "auto" and not settings.chat:
        raise UserError("`template` is for a chat", fix="chat=true, or leave template out")
    opened = open_model(settings.model, settings.precision, settings.device, settings.tokenizer)
    chat = Chat(opened.tokenizer, settings.template, day=day_of(settings.date)) if settings.chat else None
    started = time.perf_counter()
    stream = settings.stream and settings.samples * len(prompts) == 1 and stdout_is_for_people()
    sampling = Sampling(**{name: getattr(settings, name) for name in Sampling.model_fields})
    completions = write(
        opened, prompts, sampling, samples=settings.samples, seed=settings.seed,
        rows_at_once=settings.rows_at_once, stream=stream, chat=chat, system=settings.system,
    )
    return Generated(completions, time.perf_counter() - started, streamed=stream, answers=settings.chat)


def _prompts(settings: Generation) -> list[str]:
    if (settings.prompt is None) == (settings.prompts is None):
        raise UserError(
            "there is nothing to continue" if settings.prompt is None else "prompt and prompts are both given",
            why="either one text is continued, or those of a file",
            fix=f'llmtrainer generate {settings.model} "Once upon a time", or prompts=FILE.jsonl',
        )
    if settings.prompts is None:
        assert settings.prompt is not None
        return [settings.prompt]
    fields = ("prompt", "text", "content")
    found = [document.text for document in documents(find(settings.prompts), fields=fields, warn=warn)]
    if not found:
        raise UserError("no prompt in this file", where=settings.prompts, fix='write records: {"prompt": "..."}')
    return found
