"""What every dataset of records has: files, a chat template, sets that are only measured, and what may be lost."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal

from pydantic import BeforeValidator, Field, model_validator

from llmtrainer.base.errors import UserError
from llmtrainer.data.format import RecordFormat
from llmtrainer.data.outcome import RowChoices
from llmtrainer.data.packed import Store, is_store
from llmtrainer.tokenizer.chat import Chat
from llmtrainer.training.chats import load_chat
from llmtrainer.training.dataset import Dataset, Rows, Setting
from llmtrainer.training.prepare_examples import Wish, prepared_examples


def _several(value: Any) -> Any:
    """A text is a list of one; commas divide it."""
    return tuple(piece.strip() for piece in value.split(",")) if isinstance(value, str) else value


class RecordFiles(Dataset):
    """Which files of records, how they are rendered, and which of them are only measured."""

    of: ClassVar[str] = "conversations"
    """What the records are, for messages to people."""

    train: Annotated[tuple[str, ...], BeforeValidator(_several)] = Field(min_length=1)
    """Files, folders or patterns of records (.jsonl, .json, .parquet, .arrow, .csv, .yaml ..., compressed or not),
    one or several; together they are the training set. Or one store that `llmtrainer prepare` made of such files.
    `stdlib:questions`: questions about this Python's own library."""

    template: str = "auto"
    """What conversations become before they are tokens: auto is the tokenizer's own chat template; or the name of a
    built-in one, such as chatml; or a path to a .jinja file."""

    date: str | None = None
    """The date that a template with a clock shows: `2026-11-22`."""

    leave_out: tuple[Literal["thinking", "tools"], ...] = ()
    """What the template may leave out of a conversation without being refused."""

    sequence_length: int = Field(default=2048, ge=2)
    """Tokens of the longest row; `too_long` says what becomes of a longer one."""

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
    def _names_its_sets(self) -> RecordFiles:
        names = [*self.sets(), *(["held_out"] if self.held_out else [])]
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
            f"a vocabulary is learned from text, and these are {self.of}",
            fix=f"llmtrainer train-tokenizer TEXT runs/tokenizer vocabulary={size}, then tokenizer=runs/tokenizer",
        )

    def chat(self, folder: Path) -> Chat:
        """The template, with the tokenizer of a folder."""
        return load_chat(folder, self.template, self.date, self.leave_out)

    def sets(self) -> dict[str, str]:
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


DECIDED = ("learn", "gate", "too_long", "cut_side", "cut_end", "prompt_cut", "max_prompt_length", "bad_records")
"""Settings that a store has behind it when it is prepared."""


class PreparedFiles(RecordFiles):
    """Which files of records become rows of a token store."""

    def _require_choices(self, store: Store, choices: RowChoices) -> None:
        """Refuse settings that a prepared store was not made with: they would be ignored silently."""
        # Looked at without being read: what nothing else reads of them is still refused as ignored.
        given = [name for name in DECIDED if name in self.changed()]
        # The length is what rows are held to below, wherever they were cut.
        made, wanted = (
            [item for item in facts if type(item) is not int] for facts in (store.manifest["choices"], choices.facts())
        )
        if given and made != wanted:
            raise UserError(
                f"`data.{given[0]}` is given, and the token store was made otherwise", where=str(store.path),
                why=f"a store is taken as it is: it was made with {made}, the recipe asks for {wanted}",
                fix=f"remove {', '.join(f'data.{name}' for name in given)}, or prepare the conversations again",
            )

    def wished(self) -> tuple[RecordFormat, RowChoices]:
        """How the files are read, and what their rows are to be."""
        raise NotImplementedError

    def as_one_step(self, store: Store, rows: int | None, setting: Setting, **part: Any) -> Rows:
        """So many rows of a store, None: all, in their order and as one step."""
        raise NotImplementedError

    def prepared(self, folder: Path, cache: Path) -> tuple[Store, dict[str, Store]]:
        """The rows of the training set and of each evaluation set, made now unless the cache has them. `folder`: the
        tokenizer's."""
        format, choices = self.wished()
        shared: dict[str, Any] = {
            "format": format, "choices": choices, "max_dropped_share": self.max_dropped_share,
            "template": self.template, "date": self.date, "leave_out": self.leave_out, "workers": self.workers,
            "chat": self.chat(folder), "folder": folder,
        }  # fmt: skip
        train = prepared_examples(Wish(self.train, **shared), cache)
        if len(self.train) == 1 and is_store(Path(self.train[0])):
            self._require_choices(train, choices)
        return train, {name: prepared_examples(Wish((path,), **shared), cache) for name, path in self.sets().items()}

    def measured(self, store: Store, sets: Mapping[str, Store], setting: Setting) -> dict[str, Rows]:
        """The held-out part and the named sets, each as one step of all its rows."""
        found: dict[str, Rows] = {}
        if self.held_out:
            part: dict[str, Any] = {"part": "held_out", "held_out": self.held_out}
            rows = min(setting.held_out_rows, self.as_one_step(store, 1, setting, **part).rows_per_epoch)
            found["held_out"] = self.as_one_step(store, rows, setting, **part)
        return found | {name: self.as_one_step(held, None, setting) for name, held in sets.items()}
