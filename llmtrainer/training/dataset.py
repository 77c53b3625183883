"""What a run reads: a dataset is one road from files to the rows of every step."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar, Protocol

from pydantic import Field

from llmtrainer.base.config import Kind
from llmtrainer.base.units import Pace
from llmtrainer.core.batch import Batch
from llmtrainer.core.protocols import Engine
from llmtrainer.data.packed import Store
from llmtrainer.data.prompts import Prompts
from llmtrainer.tokenizer.chat import Chat
from llmtrainer.tokenizer.tokenizer import FileTokenizer

_STEP = "data.tokens_per_step says how much a step learns from, data.tokens_per_batch how much is computed at a time"
KNOWN_ELSEWHERE = {
    "gradient_accumulation_steps": f"{_STEP}: gradients are accumulated by themselves",
    "accumulate_grad_batches": f"{_STEP}: gradients are accumulated by themselves",
    "accumulation_steps": f"{_STEP}: gradients are accumulated by themselves",
    "per_device_train_batch_size": _STEP, "micro_batch_size": _STEP, "batch_size": _STEP,
    "learning_rate": "optim.schedule.peak=3e-4", "lr": "optim.schedule.peak=3e-4",
    "lr_scheduler_type": "optim.schedule.kind=cosine", "warmup_steps": "optim.schedule.warmup='100 steps'",
    "warmup_ratio": "optim.schedule.warmup='0.1 epochs'", "weight_decay": "optim.rule.weight_decay=0.1",
    "max_grad_norm": "optim.clip=1.0", "gradient_clip_val": "optim.clip=1.0", "optimizer": "optim.rule.kind=adamw",
    "max_steps": "duration='1000 steps'", "num_train_epochs": "duration='1 epochs'",
    "label_smoothing_factor": "objective.label_smoothing=0.1",
    "max_seq_length": "data.sequence_length=2048", "max_length": "data.sequence_length=2048",
    "cutoff_len": "data.sequence_length=2048", "dataset_path": "data.train=FILE", "chat_template": "data.template=auto",
}  # fmt: skip
"""What other trainers' users would write, and what it is called here."""


class Rows(Protocol):
    """A source of rows on disk: step -> micro-batches, with nothing to save."""

    store: Store
    rows_per_epoch: int
    rows_per_step: int
    """Rows of one step over all ranks."""
    fingerprint: str

    @property
    def steps_per_epoch(self) -> float: ...

    @property
    def pace(self) -> Pace:
        """What a step is of an epoch, and how many tokens it reads on average."""
        ...

    def epochs(self, step: int) -> float: ...

    def batches(self, step: int) -> list[Batch]: ...

    def row(self, step: int, place: int) -> dict[str, list[Any]]:
        """One row as the model sees it: tokens, weights, positions, document."""
        ...

    def close(self) -> None: ...


@dataclass(frozen=True)
class Setting:
    """What a dataset is opened with: what else of the recipe decides its rows."""

    folder: Path
    """Where the tokenizer lies."""
    tokenizer: FileTokenizer
    engine: Engine
    cache: Path
    seed: int
    held_out_rows: int
    """At most so many rows of the held-out split are measured."""


@dataclass(frozen=True)
class Opened:
    """The rows of a run."""

    train: Rows | None
    """None: the policy writes its rows itself, as answers to `prompts`."""
    measured: Callable[[], Mapping[str, Rows]]
    """What is evaluated by name, each as one step: made when it is asked for."""
    facts: Mapping[str, str] = field(default_factory=dict)
    """What a continued run must share with the run that began, by name, besides the tokens themselves."""
    chat: Chat | None = None
    """The template of the conversations, if the rows are such: what is saved carries it, and what is asked of the
    model on the way is asked in its form."""
    max_dropped_share: float = 0.0
    """How much of the training set the recipe lets be lost."""
    largest: Callable[[], Batch] | None = None
    """The micro-batch that needs the most memory, where rows cannot be put together one by one."""
    signals: tuple[str, ...] = ()
    """What the rows say besides their tokens, by the names that objectives read."""
    prompts: Prompts | None = None
    """What a policy that learns from its own answers is asked."""
    beside: Rows | None = None
    """What another objective learns in every step beside the main one."""
    asked: Mapping[str, Prompts] = field(default_factory=dict)
    """Prompts that are answered and never learned from, by name, each as one step of all of them."""

    @property
    def fingerprint(self) -> str:
        """SHA-256 of what training reads."""
        if self.train is not None:
            return self.train.store.fingerprint
        assert self.prompts is not None
        return self.prompts.fingerprint


class Dataset(Kind):
    """What the model reads, and how much per step. `documents` is text to go on with, `examples` conversations to
    answer."""

    folder: ClassVar[str] = "llmtrainer.training.datasets"
    default_kind: ClassVar[str] = "documents"
    known_elsewhere: ClassVar[Mapping[str, str]] = KNOWN_ELSEWHERE

    sequence_length: int = Field(default=512, ge=1)
    """Tokens of one row that the model reads."""

    tokens_per_batch: int = Field(default=8192, ge=1)
    """Tokens of one micro-batch: the memory knob. Changes no result."""

    tokens_per_step: int | None = Field(default=None, ge=1)
    """Tokens of one optimizer step over all ranks: the learning knob. 32768 if neither this nor
    sequences_per_step is given."""

    sequences_per_step: int | None = Field(default=None, ge=1)
    """Rows of one optimizer step over all ranks: the same knob, counted in rows."""

    held_out: float = Field(default=0.0, ge=0.0, lt=1.0)
    """Share of the documents kept out of training and evaluated as `held_out/loss`. The source stays untouched."""

    shuffle: bool = True
    """Draw rows in an order that is a function of (seed, epoch)."""

    allow_truncated: bool = False
    """Accept a source file that ends in the middle of a record; what is missing is reported."""

    allow_pickle: bool = False
    """Let a source file .pkl run whatever code is in it. Only for files of people you trust."""

    def learned_vocabulary(self, size: int, cache: Path) -> Path:
        """The folder of a vocabulary of `size` ids learned from the training text."""
        raise NotImplementedError

    def opened(self, setting: Setting) -> Opened:
        """The rows; what is not prepared yet is prepared into the cache first, and said."""
        raise NotImplementedError

    def texts(self) -> tuple[str, ...]:
        """Where a record's text is, for suites that read text."""
        return ("text", "content")
