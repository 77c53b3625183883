"""Conversations to answer: a row each, whole, of which the answers are learned."""

from __future__ import annotations

from typing import Annotated, Any, Literal

import numpy as np
from pydantic import Field, model_validator

from llmtrainer.base.config import count_as_read
from llmtrainer.base.errors import UserError
from llmtrainer.data.budget_source import BudgetSource
from llmtrainer.data.critical import critical_of
from llmtrainer.data.example_rows import Choices, Learn
from llmtrainer.data.format import MOST_WEIGHT, Format, RecordFormat
from llmtrainer.data.formats.auto import Auto
from llmtrainer.data.length import LengthPolicy
from llmtrainer.data.outcome import RowChoices
from llmtrainer.data.packed import Store
from llmtrainer.training.dataset import Opened, Setting
from llmtrainer.training.record_files import PreparedFiles


class Examples(PreparedFiles):
    """Which conversations, how they are read and rendered, and how they are cut into steps."""

    format: Format = Auto()
    """How the files write a conversation: auto tells it of each file by its first records, and the run says what it
    found. Or a kind by name: messages, conversations, instruction, ..."""

    learn: Learn = "answers"
    """Which tokens are targets: those of the answers with the token that ends them; those of the last answer of each
    conversation alone (last_answer); or everything, prompts and the template's own text too. A template that shows
    earlier turns otherwise than they were written makes a row for every answer; with last_answer it makes one for a
    conversation."""

    gate: str | None = None
    """The key under which a record names the adapters it goes through, such as `t1a3`, for
    `model.adapter.kind=gated_lora`. Left out: records name none."""

    too_long: Literal["drop", "cut", "split", "keep"] = "drop"
    """What becomes of a longer row: drop it, and say so; cut it; split it into several; keep it as it is. A row
    of whose answers nothing is left is dropped in any case, and counted."""

    cut_side: Literal["right", "left"] = "right"
    """Which end a cut takes away: right the end of the last answer, left the beginning of the conversation."""

    cut_end: Literal["keep", "leave_out"] = "keep"
    """Of an answer that was cut on the right: keep its end token behind what is left of it, or leave it out, so
    that the model does not learn to stop in mid-sentence. No token of the answer is overwritten."""

    critical: dict[str, Annotated[float, Field(ge=0.0, le=MOST_WEIGHT)]] = Field(default_factory=dict)
    """Tokens that count more than once wherever training learns them, by control token, text of one token, or `#` and
    id: `{"</think>": 2.0, "#42": 1.5}`. The loss is divided by the sum of the weights; evaluations count 1."""

    @model_validator(mode="after")
    def _fits(self) -> Examples:
        if self.tokens_per_step is not None and self.sequences_per_step is not None:
            raise UserError(
                "data.tokens_per_step and data.sequences_per_step say the same thing twice", fix="keep one of them"
            )
        if self.tokens_per_batch < self.sequence_length and self.too_long != "keep":
            raise UserError(
                f"data.tokens_per_batch is {self.tokens_per_batch:,}, below data.sequence_length "
                f"{self.sequence_length:,}",
                why="a micro-batch holds at least one row",
                fix=f"data.tokens_per_batch={self.sequence_length}, or a smaller data.sequence_length",
            )
        return self

    def opened(self, setting: Setting) -> Opened:
        # A format reads its own keys when a file is prepared, which the cache may spare.
        count_as_read(self.format)
        store, sets = self.prepared(setting.folder, setting.cache)
        chat = self.chat(setting.folder)
        engine = setting.engine
        per_step = self.tokens_per_step or (None if self.sequences_per_step else 32_768)
        train = BudgetSource(
            store, sequences_per_step=self.sequences_per_step, tokens_per_step=per_step, part="train",
            shuffle=self.shuffle, share=engine.share, held_out=self.held_out,
            critical=critical_of(self.critical, setting.tokenizer),
            **self._budget(store, setting),
        )  # fmt: skip
        return Opened(
            train, lambda: self.measured(store, sets, setting), {"template_fingerprint": chat.fingerprint}, chat,
            self.max_dropped_share,
        )

    def wished(self) -> tuple[RecordFormat, RowChoices]:
        cut = (self.cut_side, self.cut_end) if self.too_long == "cut" else ()
        length = LengthPolicy(self.sequence_length, self.too_long, *cut)
        choices = Choices(length, self.bad_records, self.allow_truncated, self.allow_pickle, self.learn, self.gate)
        return self.format, choices

    def as_one_step(self, store: Store, rows: int | None, setting: Setting, **part: Any) -> BudgetSource:
        engine = setting.engine
        return BudgetSource(
            store, sequences_per_step=rows or store.documents, shuffle=False, prefetch=False, rank=engine.rank,
            world_size=engine.world_size, **self._budget(store, setting), **part,
        )  # fmt: skip

    def _budget(self, store: Store, setting: Setting) -> dict[str, Any]:
        longest = self.sequence_length
        if self.too_long == "keep":
            longest = int(np.diff(store.offsets[0 : store.documents + 1]).max())
        return {
            "sequence_length": longest, "tokens_per_batch": self.tokens_per_batch, "seed": setting.seed,
            "longer_alone": self.too_long == "keep",
        }  # fmt: skip
