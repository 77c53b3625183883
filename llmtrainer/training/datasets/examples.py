"""Conversations to answer: a row each, whole, of which the answers are learned."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, Literal

import numpy as np
from pydantic import BeforeValidator, Field, model_validator

from llmtrainer.base.errors import UserError
from llmtrainer.data.budget_source import BudgetSource
from llmtrainer.data.examples import Choices, Learn
from llmtrainer.data.format import Format
from llmtrainer.data.formats.auto import Auto
from llmtrainer.data.length import LengthPolicy
from llmtrainer.data.packed import Store
from llmtrainer.tokenizer.chat import Chat
from llmtrainer.training.chats import load_chat
from llmtrainer.training.dataset import Dataset, Opened, Rows, Setting
from llmtrainer.training.prepare_examples import Wish, prepared_examples


def _several(value: Any) -> Any:
    """A text is a list of one; commas divide it."""
    return tuple(piece.strip() for piece in value.split(",")) if isinstance(value, str) else value


class Examples(Dataset):
    """Which conversations, how they are read and rendered, and how they are cut into steps."""

    train: Annotated[tuple[str, ...], BeforeValidator(_several)] = Field(min_length=1)
    """Files, folders or patterns of records (.jsonl, .json, .parquet, .arrow, .csv, .yaml ..., compressed or not),
    one or several; together they are the training set. Or one store that `llmtrainer prepare` made of such files.
    `stdlib:questions`: questions about this Python's own library."""

    format: Format = Auto()
    """How the files write a conversation: auto tells it of each file by its first records, and the run says what it
    found. Or a kind by name: messages, conversations, instruction, ..."""

    template: str = "auto"
    """What conversations become before they are tokens: auto is the tokenizer's own chat template; or the name of a
    built-in one, such as chatml; or a path to a .jinja file."""

    date: str | None = None
    """The date that a template with a clock shows: `2026-11-22`."""

    learn: Learn = "answers"
    """Which tokens are targets: those of the answers with the token that ends them; those of the last answer of each
    conversation alone (last_answer); or everything, prompts and the template's own text too. A template that shows
    earlier turns otherwise than they were written makes a row for every answer; with last_answer it makes one for a
    conversation."""

    gate: str | None = None
    """The key under which a record names the adapters it goes through, such as `t1a3`, for
    `model.adapter.kind=gated_lora`. Left out: records name none."""

    leave_out: tuple[Literal["thinking", "tools"], ...] = ()
    """What the template may leave out of a conversation without being refused."""

    sequence_length: int = Field(default=2048, ge=2)
    """Tokens of the longest row; `too_long` says what becomes of a longer one."""

    too_long: Literal["drop", "cut", "split", "keep"] = "drop"
    """What becomes of a longer row: drop it, and say so; cut it; split it into several; keep it as it is. A row
    of whose answers nothing is left is dropped in any case, and counted."""

    cut_side: Literal["right", "left"] = "right"
    """Which end a cut takes away: right the end of the last answer, left the beginning of the conversation."""

    cut_end: Literal["keep", "leave_out"] = "keep"
    """Of an answer that was cut on the right: keep its end token behind what is left of it, or leave it out, so
    that the model does not learn to stop in mid-sentence. No token of the answer is overwritten."""

    max_dropped_share: float = Field(default=0.1, ge=0.0, le=1.0)
    """If more than this share of a set's records is dropped, the run stops and shows why. Above 0.2 it is also the
    share of the training set's records that may be cut or split for their length (the preflight's `truncation`)."""

    bad_records: Literal["stop", "drop"] = "stop"
    """What a record that cannot be read or rendered does: stop the run with its file and line, or be dropped and
    counted."""

    evaluate: dict[str, str] | tuple[str, ...] = ()
    """Sets that are measured and never learned, each reported as `NAME/loss`: `{dev: dev.jsonl, math: math.jsonl}`,
    or a list of files, whose names without endings are theirs."""

    test_dataset_dir: str | None = None
    """The folder in which bare file names in `evaluate` lie."""

    workers: int = Field(default=0, ge=0)
    """Processes that render and tokenise. 0: one per core. Changes no byte."""

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
        names = [*self._sets(), *(["held_out"] if self.held_out else [])]
        for name in names:
            if names.count(name) > 1 or not name or "/" in name:
                raise UserError(
                    f"`{name}` is no name for one evaluation set" if names.count(name) == 1
                    else f"two evaluation sets are called `{name}`",
                    fix="data.evaluate={first: a/dev.jsonl, second: b/dev.jsonl}",
                )  # fmt: skip
        return self

    def learned_vocabulary(self, size: int, cache: Path) -> Path:
        raise UserError(
            "a vocabulary is learned from text, and these are conversations",
            fix=f"llmtrainer train-tokenizer TEXT runs/tokenizer vocabulary={size}, then tokenizer=runs/tokenizer",
        )

    def opened(self, setting: Setting) -> Opened:
        # A format reads its own keys when a file is prepared, which the cache may spare; here they count as read.
        for name in type(self.format).model_fields:
            getattr(self.format, name)
        store, measured = self.prepared(setting.folder, setting.cache)
        chat = self._chat(setting.folder)
        engine = setting.engine
        per_step = self.tokens_per_step or (None if self.sequences_per_step else 32_768)
        train = BudgetSource(
            store, sequences_per_step=self.sequences_per_step, tokens_per_step=per_step, part="train",
            shuffle=self.shuffle, rank=engine.rank, world_size=engine.world_size, held_out=self.held_out,
            **self._budget(store, setting),
        )  # fmt: skip
        return Opened(
            train, lambda: self._measured(store, measured, setting), {"template_fingerprint": chat.fingerprint}, chat,
            self.max_dropped_share,
        )

    def prepared(self, folder: Path, cache: Path) -> tuple[Store, dict[str, Store]]:
        """The rows of the training set and of each evaluation set, made now unless the cache has them. `folder`: the
        tokenizer's."""
        shared: dict[str, Any] = {
            "format": self.format, "choices": self._choices(), "max_dropped_share": self.max_dropped_share,
            "template": self.template, "date": self.date, "leave_out": self.leave_out, "workers": self.workers,
            "chat": self._chat(folder), "folder": folder,
        }  # fmt: skip
        train = prepared_examples(Wish(self.train, **shared), cache)
        return train, {name: prepared_examples(Wish((path,), **shared), cache) for name, path in self._sets().items()}

    def _chat(self, folder: Path) -> Chat:
        return load_chat(folder, self.template, self.date, self.leave_out)

    def _choices(self) -> Choices:
        cut = (self.cut_side, self.cut_end) if self.too_long == "cut" else ()
        length = LengthPolicy(self.sequence_length, self.too_long, *cut)
        return Choices(length, self.bad_records, self.allow_truncated, self.allow_pickle, self.learn, self.gate)

    def _measured(self, store: Store, sets: Mapping[str, Store], setting: Setting) -> dict[str, Rows]:
        """The held-out part and the named sets, each as one step of all its rows."""
        found: dict[str, Rows] = {}
        if self.held_out:
            whole = self._as_one_step(store, 1, setting, part="held_out", held_out=self.held_out)
            rows = min(setting.held_out_rows, whole.rows_per_epoch)
            found["held_out"] = self._as_one_step(store, rows, setting, part="held_out", held_out=self.held_out)
        for name, held in sets.items():
            found[name] = self._as_one_step(held, held.documents, setting)
        return found

    def _as_one_step(self, store: Store, rows: int, setting: Setting, **part: Any) -> BudgetSource:
        engine = setting.engine
        return BudgetSource(
            store, sequences_per_step=rows, shuffle=False, prefetch=False, rank=engine.rank,
            world_size=engine.world_size, **self._budget(store, setting), **part,
        )  # fmt: skip

    def _budget(self, store: Store, setting: Setting) -> dict[str, Any]:
        longest = self.sequence_length
        if self.too_long == "keep":
            longest = int(np.diff(store.offsets[0 : store.documents + 1]).max())
        return {"sequence_length": longest, "tokens_per_batch": self.tokens_per_batch, "seed": setting.seed}

    def _sets(self) -> dict[str, str]:
        """Name -> path of the evaluation sets."""
        if isinstance(self.evaluate, dict):
            named = dict(self.evaluate)
        else:
            named = {Path(path).name.partition(".")[0]: path for path in self.evaluate}
            if len(named) < len(self.evaluate):
                raise UserError(
                    "two evaluation sets have one name", why=", ".join(self.evaluate),
                    fix="data.evaluate={first: a/dev.jsonl, second: b/dev.jsonl}",
                )
        if self.test_dataset_dir is None:
            return named
        return {
            name: str(Path(self.test_dataset_dir) / path) if "/" not in path else path for name, path in named.items()
        }
