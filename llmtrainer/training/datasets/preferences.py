"""Answers to compare: what preference objectives and reward models learn from."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar, Literal

from pydantic import Field, model_validator

from llmtrainer.base.config import count_as_read
from llmtrainer.base.errors import UserError
from llmtrainer.core.batch import GROUP, HIGH, KL, LIKED, LOW, MARGIN, ROW
from llmtrainer.data.comparison_rows import ComparisonChoices, PromptCut
from llmtrainer.data.comparison_source import ComparisonSource
from llmtrainer.data.comparisons.auto import Auto
from llmtrainer.data.format import ComparisonFormat, RecordFormat
from llmtrainer.data.outcome import RowChoices
from llmtrainer.data.packed import GRADES, MARGINS, Store
from llmtrainer.data.packed import LIKED as LABELS
from llmtrainer.training.dataset import KNOWN_ELSEWHERE, Opened, Setting
from llmtrainer.training.record_files import PreparedFiles


class Preferences(PreparedFiles):
    """Which comparisons, how they are read and rendered, and how many of them make a step."""

    of: ClassVar[str] = "comparisons"
    known_elsewhere: ClassVar[Mapping[str, str]] = {
        **KNOWN_ELSEWHERE, "truncation_mode": "data.prompt_cut=keep_end",
        "max_prompt_len": "data.max_prompt_length=512", "beta": "objective.beta=0.1",
        "loss_type": "objective.loss=sigmoid",
    }  # fmt: skip

    format: ComparisonFormat = Auto()
    """How the files write a comparison: auto tells it of each file by its first records, and the run says what it
    found. Or a kind by name: texts (prompt, chosen, rejected), messages, conversations, instruction, human_assistant,
    ranked (several answers, or answers with scores), liked (one answer and a label), graded (one answer, or one text,
    and its grade), segments (several pairs of answers to one prompt), ids."""

    too_long: Literal["cut", "drop", "keep"] = "cut"
    """What becomes of a comparison whose prompt with its longest answer has more than `sequence_length` tokens: cut the
    prompt, and then, where that is not enough, the ends of the answers; drop it; or keep it as it is."""

    prompt_cut: PromptCut = "keep_end"
    """Which tokens of a prompt stay that is cut: the last ones, or the first."""

    max_prompt_length: int | None = Field(default=None, ge=1)
    """So many tokens of a prompt stay where a comparison is cut; a shorter prompt stays whole. Left out: half of
    `sequence_length`."""

    pairs_per_step: int = Field(default=64, ge=1)
    """Comparisons of one optimizer step over all ranks: the learning knob."""

    share_prompt: bool = True
    """Read the prompt of a comparison once for all its answers, which do not see each other: the same numbers in less
    time. false: each answer has its prompt in front of it."""

    @model_validator(mode="after")
    def _fits(self) -> Preferences:
        for name in ("tokens_per_step", "sequences_per_step"):
            if getattr(self, name) is not None:
                raise UserError(
                    f"data.{name} is set, and a step of preferences is counted in comparisons",
                    fix="data.pairs_per_step=64",
                )
        if self.max_prompt_length is not None:
            if self.too_long != "cut":
                raise UserError(
                    f"data.max_prompt_length is for data.too_long=cut, which is {self.too_long}",
                    fix="remove data.max_prompt_length, or data.too_long=cut",
                )
            if self.max_prompt_length >= self.sequence_length:
                raise UserError(
                    f"data.max_prompt_length is {self.max_prompt_length:,}, no less than data.sequence_length "
                    f"{self.sequence_length:,}",
                    why="nothing would be left for the answers",
                    fix=f"data.max_prompt_length={self.sequence_length // 2}",
                )
        return self

    def opened(self, setting: Setting) -> Opened:
        # A format reads its own keys when a file is prepared, which the cache may spare.
        count_as_read(self.format)
        _ = self.prompt_cut, self.max_prompt_length    # a prepared store was cut when it was made
        store, sets = self.prepared(setting.folder, setting.cache)
        chat = self.chat(setting.folder)
        train = ComparisonSource(
            store, pairs_per_step=self.pairs_per_step, held_out=self.held_out, shuffle=self.shuffle,
            share=setting.engine.share, **self._cut(setting),
        )  # fmt: skip
        signals = [GROUP, ROW]
        signals += [LIKED, KL] if store.holds(LABELS) else []
        signals += [MARGIN] if store.holds(MARGINS) else []
        signals += [LOW, HIGH] if store.holds(GRADES) else []
        return Opened(
            train, lambda: self.measured(store, sets, setting), {"template_fingerprint": chat.fingerprint}, chat,
            self.max_dropped_share, train.largest, tuple(signals),
        )  # fmt: skip

    def wished(self) -> tuple[RecordFormat, RowChoices]:
        choices = ComparisonChoices(
            self.sequence_length, self.too_long, self.prompt_cut, self.max_prompt_length, self.bad_records,
            self.allow_truncated, self.allow_pickle,
        )
        return self.format, choices

    def as_one_step(self, store: Store, rows: int | None, setting: Setting, **part: Any) -> ComparisonSource:
        return ComparisonSource(
            store, pairs_per_step=rows or store.comparisons, shuffle=False, prefetch=False, **self._cut(setting), **part
        )

    def _cut(self, setting: Setting) -> dict[str, Any]:
        return {
            "tokens_per_batch": self.tokens_per_batch, "seed": setting.seed, "share_prompt": self.share_prompt,
            "rank": setting.engine.rank, "world_size": setting.engine.world_size,
        }  # fmt: skip
