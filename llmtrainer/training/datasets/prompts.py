"""Prompts to answer: what a policy that learns from its own answers is asked."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import ClassVar

from pydantic import Field, model_validator

from llmtrainer.base.errors import UserError
from llmtrainer.data.document import Reading
from llmtrainer.data.fates import require_few_losses
from llmtrainer.data.open import find
from llmtrainer.data.prompts import PromptChoices, Prompts, PromptTable, TooLong, read_prompts
from llmtrainer.data.records import Record, holding, records
from llmtrainer.tokenizer.chat import Chat
from llmtrainer.training.console import bar, say, warn
from llmtrainer.training.dataset import Opened, Setting
from llmtrainer.training.record_files import RecordFiles


class PromptFiles(RecordFiles):
    """Which prompts, how they are read and rendered, and how many a step asks."""

    of: ClassVar[str] = "prompts"

    prompt: str | None = None
    """The key of the prompt: a text, a list of messages, or token ids. `Body+Question`: both texts, with a newline
    between. Left out: the first of prompt, messages, conversations, question, problem, query, instruction that a
    record has. What else a record holds are its facts, such as the reference answer that a reward looks at."""

    as_messages: bool = False
    """Put a prompt that is a text into a user's message of the template. false: it is read as it stands, as a base
    model goes on with it, unless there is a `system` here or in the record."""

    system: str | None = None
    """What the system says in front of every prompt that has no system message of its own. Texts are then messages."""

    max_prompt_length: int = Field(default=1024, ge=1)
    """Tokens of the longest prompt; `too_long` says what becomes of a longer one."""

    too_long: TooLong = "drop"
    """What becomes of a longer prompt: drop it, and say so; or keep its last tokens (keep_end) or its first
    (keep_start)."""

    prompts_per_step: int = Field(default=16, ge=1)
    """Prompts of one rollout over all ranks: the learning knob."""

    @model_validator(mode="after")
    def _fits(self) -> PromptFiles:
        for name in ("tokens_per_step", "sequences_per_step"):
            if getattr(self, name) is not None:
                raise UserError(
                    f"data.{name} is for rows that are there before the run", fix="data.prompts_per_step=16"
                )
        return self

    def opened(self, setting: Setting) -> Opened:
        """Read, render and count every prompt. UserError where there are none, or too many are dropped."""
        chat, choices = self.chat(setting.folder), self._choices()
        table = self._read(self.train, chat, choices)
        train = Prompts(
            table.prompts, prompts_per_step=self.prompts_per_step, seed=setting.seed, held_out=self.held_out,
            shuffle=self.shuffle,
        )  # fmt: skip
        measured: dict[str, Prompts] = {}
        if self.held_out:
            whole = self._as_one_step(table, 1, setting, held_out=self.held_out)
            rows = min(setting.held_out_rows, len(whole))
            measured["held_out"] = self._as_one_step(table, rows, setting, held_out=self.held_out)
        for name, path in self.sets().items():
            found = self._read((path,), chat, choices)
            measured[name] = self._as_one_step(found, len(found.prompts), setting)
        facts = {"template_fingerprint": chat.fingerprint}
        return Opened(None, dict, facts, chat, prompts=train, asked=measured)

    def _choices(self) -> PromptChoices:
        return PromptChoices(self.prompt, self.as_messages, self.system, self.max_prompt_length, self.too_long)

    def _as_one_step(self, table: PromptTable, prompts: int, setting: Setting, *, held_out: float = 0.0) -> Prompts:
        return Prompts(
            table.prompts, prompts_per_step=prompts, seed=setting.seed, held_out=held_out, shuffle=False,
            part="held_out" if held_out else "train",
        )  # fmt: skip

    def _read(self, paths: Sequence[str], chat: Chat, choices: PromptChoices) -> PromptTable:
        reading = Reading(
            allow_truncated=self.allow_truncated, warn=warn, allow_pickle=self.allow_pickle, whole=True
        )

        def found() -> Iterator[Record]:
            for path in paths:
                for file in holding(find(path, warn), warn):
                    yield from records(file, reading)

        name = ", ".join(paths)
        with bar("prompts", None, "records") as advance:
            table = read_prompts(
                found(), chat, choices, bad_may_drop=self.bad_records == "drop", report=advance
            )
        if not table.prompts:
            raise UserError(
                "there is no prompt to answer", where=name,
                why=f"\n{table.told.table()}" if table.told.records else "the files hold no records",
                fix="name a file of prompts, or the key that has them (data.prompt=KEY)",
            )
        say(f"the first prompt, {table.how}")
        say(f"the prompts of {name}:\n{table.told.table()}")
        require_few_losses(table.told, self.max_dropped_share)
        return table
