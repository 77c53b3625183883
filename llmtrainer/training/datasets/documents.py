"""Text to go on with: documents in rows of one length."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal

from pydantic import Field, model_validator

from llmtrainer.base.config import Config
from llmtrainer.base.errors import UserError
from llmtrainer.data.critical import critical_of
from llmtrainer.data.format import MOST_WEIGHT
from llmtrainer.data.packed import Store
from llmtrainer.data.source import DiskSource
from llmtrainer.training.dataset import KNOWN_ELSEWHERE, Dataset, Opened, Rows, Setting
from llmtrainer.training.prepare import prepared, trained_tokenizer


class Corpus(Config):
    """Text, or a token store that `llmtrainer prepare` wrote."""

    shorthand: ClassVar[str] = "path"

    path: str
    """A file, a folder, a glob, an address such as `s3://bucket/corpus/`, `stdlib:train` (this Python's own
    library), files of token ids, or a prepared token store. All but the last is prepared into the cache first, and
    the run says so."""

    fields: tuple[str, ...] = ("text", "content")
    """Where a record's text is: the first of these fields that it has. `title+content`: both, with a newline
    between. `input_ids`: token ids."""

    raw_ids: Literal["uint16", "uint32"] = "uint16"
    """How a raw .bin stores a token id."""

    workers: int = Field(default=0, ge=0)
    """Processes that tokenise raw text. 0: one per core."""


class Documents(Dataset):
    """Which text, and how it is cut into rows, micro-batches and steps."""

    known_elsewhere: ClassVar[Mapping[str, str]] = {
        **KNOWN_ELSEWHERE,
        **dict.fromkeys(
            ("format", "template", "too_long", "evaluate", "test_dataset_dir", "max_dropped_share"),
            "conversations are data.kind=examples",
        ),
    }

    train: Corpus
    """What the model learns from."""

    documents: Literal["isolated", "flowing"] = "isolated"
    """isolated: documents in a row cannot see each other and positions restart. flowing: one stream of text."""

    policy: Literal["stream", "split", "truncate", "sample", "whole"] = "stream"
    """How documents become rows: stream tiles the token stream; split cuts every document into rows; truncate
    keeps a document's head and its end; sample takes its head or a random window; whole refuses what is longer."""

    critical: dict[str, Annotated[float, Field(ge=0.0, le=MOST_WEIGHT)]] = Field(default_factory=dict)
    """Tokens that count more than once wherever training learns them, by control token, text of one token, or `#` and
    id: `{"</think>": 2.0, "#42": 1.5}`. The loss is divided by the sum of the weights; evaluations count 1."""

    @property
    def rows_per_step(self) -> int:
        if self.sequences_per_step is not None:
            return self.sequences_per_step
        return (self.tokens_per_step or 32_768) // self.sequence_length

    @model_validator(mode="after")
    def _fits(self) -> Documents:
        if self.tokens_per_step is not None and self.sequences_per_step is not None:
            raise UserError(
                "data.tokens_per_step and data.sequences_per_step say the same thing twice",
                fix="keep one of them",
            )
        tokens = self.tokens_per_step or (None if self.sequences_per_step else 32_768)
        if tokens is not None and tokens % self.sequence_length:
            raise UserError(
                f"data.tokens_per_step is {tokens:,}, no multiple of data.sequence_length {self.sequence_length:,}",
                why="a step is a whole number of rows",
                fix=f"data.tokens_per_step={max(tokens // self.sequence_length, 1) * self.sequence_length}",
            )
        if self.tokens_per_batch < self.sequence_length:
            raise UserError(
                f"data.tokens_per_batch is {self.tokens_per_batch:,}, below data.sequence_length "
                f"{self.sequence_length:,}",
                why="a micro-batch holds at least one row",
                fix=f"data.tokens_per_batch={self.sequence_length}",
            )
        return self

    def learned_vocabulary(self, size: int, cache: Path) -> Path:
        return trained_tokenizer(
            self.train.path, size, cache, fields=self.train.fields, allow_truncated=self.allow_truncated,
            allow_pickle=self.allow_pickle,
        )  # fmt: skip

    def opened(self, setting: Setting) -> Opened:
        path = prepared(
            self.train.path, setting.folder, setting.cache, fields=self.train.fields, workers=self.train.workers,
            allow_truncated=self.allow_truncated, allow_pickle=self.allow_pickle, raw_ids=self.train.raw_ids,
        )  # fmt: skip
        store, engine = Store(path), setting.engine
        train = DiskSource(
            store, rows_per_step=self.rows_per_step, tokens_per_batch=self.tokens_per_batch, shuffle=self.shuffle,
            part="train", share=engine.share, critical=critical_of(self.critical, setting.tokenizer),
            **self._cut(setting),
        )  # fmt: skip
        return Opened(train, lambda: self._measured(store, setting))

    def texts(self) -> tuple[str, ...]:
        return self.train.fields

    def _measured(self, store: Store, setting: Setting) -> dict[str, Rows]:
        """The first rows of the held-out part as one step: the same ones at every evaluation."""
        if not self.held_out:
            return {}
        cut = {**self._cut(setting), "tokens_per_batch": self.tokens_per_batch, "shuffle": False, "prefetch": False}
        whole = DiskSource(store, rows_per_step=1, part="held_out", **cut)
        rows, engine = min(setting.held_out_rows, whole.rows_per_epoch), setting.engine
        return {
            "held_out": DiskSource(
                store, rows_per_step=rows, part="held_out", rank=engine.rank, world_size=engine.world_size, **cut
            )
        }

    def _cut(self, setting: Setting) -> dict[str, Any]:
        """What decides how a store becomes rows."""
        return {
            "sequence_length": self.sequence_length, "documents": self.documents, "policy": self.policy,
            "held_out": self.held_out, "seed": setting.seed,
        }  # fmt: skip
