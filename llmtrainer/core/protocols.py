"""The seams: what each part may expect of another."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any, ClassVar, Literal, Protocol, TypeVar

import torch
from pydantic import Field
from torch import Tensor, nn
from torch.optim import Optimizer

from llmtrainer.base.config import Kind
from llmtrainer.core.arrangement import Arranged, Arrangement
from llmtrainer.core.batch import Batch, Outputs
from llmtrainer.core.pieces import Writers
from llmtrainer.core.ranks import Ranks, Shown
from llmtrainer.core.rollout import Answer, Verdict
from llmtrainer.core.share import Share


class TextStream(Protocol):
    """Ids to text while they arrive."""

    def feed(self, token: int) -> str:
        """The text that this id completes; "" while a character is open."""
        ...

    def close(self) -> str:
        """What is left of a character that never ended."""
        ...


class Tokenizer(Protocol):
    """Text to ids and back. Text never becomes a control id, whatever it says."""

    @property
    def vocabulary(self) -> int:
        """Number of ids, control ids included, before padding."""
        ...

    @property
    def end(self) -> int:
        """The control id that closes a document."""
        ...

    @property
    def pad(self) -> int: ...

    @property
    def begin(self) -> int | None:
        """The id that the tokenizer's own template puts before a text; None where it has none."""
        ...

    @property
    def control(self) -> Mapping[str, int]:
        """Control tokens by name, for example {"<|endoftext|>": 4001}."""
        ...

    @property
    def fingerprint(self) -> str:
        """SHA-256 over everything that decides which ids a text becomes."""
        ...

    def encode(self, text: str) -> list[int]:
        """Ids of a text from its beginning, without `begin`."""
        ...

    def encode_continuation(self, text: str) -> list[int]:
        """Ids of a text that goes on where another ended: the same behind any other, and the exact text when they
        are decoded together."""
        ...

    def encode_batch(self, texts: Sequence[str]) -> list[list[int]]: ...

    def decode(self, ids: Sequence[int], *, skip_control: bool = False) -> str: ...

    def pieces(self, ids: Sequence[int]) -> list[str]:
        """One text per id; joined they are the decoded text. A token that is part of a character shows "" until
        the character's last token; a control token shows its name."""
        ...

    def stream(self) -> TextStream:
        """A text that grows, from its beginning."""
        ...

    def save(self, folder: Path) -> None: ...


def opening(tokenizer: Tokenizer) -> list[int]:
    """What the tokenizer itself puts before a text: its begin id, or nothing."""
    return [] if tokenizer.begin is None else [tokenizer.begin]


class Policy(Protocol):
    """The one trainable module."""

    def __call__(self, batch: Batch, wants: tuple[str, ...]) -> Outputs: ...

    @property
    def module(self) -> nn.Module:
        """Itself, as torch sees it."""
        ...


class Source(Protocol):
    """Step -> this rank's micro-batches, the same number on every rank. On disk it has no position to save."""

    @property
    def fingerprint(self) -> str:
        """SHA-256 of the data: a resumed run on other data is refused."""
        ...

    def epochs(self, step: int) -> float:
        """Passes over the data after so many steps."""
        ...

    def batches(self, step: int) -> list[Batch]: ...

    def close(self) -> None: ...


class Annotator(Protocol):
    """Adds signals to a batch just before its forward pass; trains nothing."""

    @property
    def adds(self) -> tuple[str, ...]:
        """Names of the signals."""
        ...

    def __call__(self, batch: Batch) -> Batch: ...


def annotated(batch: Batch, annotators: Iterable[Annotator]) -> Batch:
    """The batch with what each of them knows."""
    for annotate in annotators:
        batch = annotate(batch)
    return batch


Made = TypeVar("Made")


class Engine(Ranks, Shown, Protocol):
    """Where and how a step happens. Knows no objective and no data."""

    device: torch.device
    writers: Writers | None
    """Who writes a checkpoint together; None where every process has everything, so that rank 0 writes alone."""
    updates_in_backward: bool
    """Whether weights change while the backward pass still runs: then nobody can decide afterwards not to."""

    @property
    def share(self) -> Share:
        """Which part of every step's rows is this process's."""

    @property
    def rescales(self) -> bool:
        """Whether `step` itself handles a gradient that overflowed (float16)."""

    def prepare(self, policy: nn.Module, rule: Rule, groups: Sequence[Mapping[str, Any]]) -> Arranged:
        """Move the policy to its device, arrange how it computes, and build the optimizer."""

    def reader(self, policy: nn.Module) -> Callable[[Batch, tuple[str, ...]], Outputs]:
        """The forward pass of a policy that is only read, arranged as the trained one's: a reference, a teacher."""

    def begin(self, learning_rate: float) -> None: ...

    def micro(self, last: bool) -> AbstractContextManager[None]: ...

    def forward(self, batch: Batch, wants: tuple[str, ...]) -> Outputs: ...

    def backward(self, loss: Tensor) -> None: ...

    def clip(self, max_norm: float | None) -> Tensor:
        """Global gradient norm before clipping, after un-scaling; the gradients are clipped in place."""

    def step(self, learning_rate: float) -> bool:
        """Update the weights and clear the gradients. False if the step was skipped (fp16 overflow)."""

    def discard(self) -> None:
        """Clear the gradients without an update."""

    def own_gradients(self, policy: nn.Module) -> list[Tensor | None]:
        """Of each parameter, what this process has of its gradient; whole, where it waits for a last micro-batch."""

    def in_turn(self, work: Callable[[], Made]) -> Made:
        """Do what makes files that all ranks read: rank 0 alone first, then the others, who find what was made."""

    def weights(self, policy: nn.Module) -> dict[str, Tensor]:
        """The parameters of the prepared policy by name, whole, wherever their pieces are. Every rank asks."""

    def whole(self, policy: nn.Module) -> AbstractContextManager[None]:
        """Until the block ends, every process has the whole policy and may read it alone. Every rank enters."""

    def state(self) -> dict[str, Tensor]:
        """Optimizer and engine state as named tensors, by parameter name: with `writers`, this process's part."""

    def load_state(self, state: Mapping[str, Tensor]) -> None: ...

    def close(self) -> None: ...


class Reward(Kind):
    """What an answer is worth: its fields say by which rule."""

    folder: ClassVar[str] = "llmtrainer.rewards"
    default_kind: ClassVar[str] = "exact"
    one_process: ClassVar[bool] = False
    """Whether only one process of a job may ask for it, as a person at a terminal can be asked."""

    weight: float = Field(default=1.0, allow_inf_nan=False)
    """How much this reward counts in a sum of several."""

    name: str | None = None
    """What its mean is reported under; its kind where no name is given. Two of a kind in a sum need two names."""

    @property
    def title(self) -> str:
        """`name`, or the last part of the kind where no name was given."""
        return self.kind.rpartition(".")[2] if self.name is None else self.name

    @property
    def parts(self) -> tuple[Reward, ...]:
        """The rewards that this one is made of."""
        return ()

    def score(self, answers: Sequence[Answer]) -> list[float | None]:
        """What each answer earned, without the weight. None: it could not be worked out, so the answer leaves the
        statistics of its group and is not trained. UserError where the answers' records lack what the rule needs."""
        raise NotImplementedError

    def verdicts(self, answers: Sequence[Answer]) -> list[Verdict]:
        """As `score`, with what is told about it."""
        return [Verdict(value) for value in self.score(answers)]

    def require(self) -> None:
        """Called before a run begins: UserError where something that the rule needs is not there."""


class Adapter(Kind):
    """What is trained beside a model that stays as it is: its fields are its shape."""

    folder: ClassVar[str] = "llmtrainer.models.adapters"
    default_kind: ClassVar[str] = "lora"

    start_from: str | None = None
    """A run directory, a checkpoint or a PEFT folder with an adapter to go on with. Its shape comes from there."""

    gated: ClassVar[bool] = False
    """Whether every sample names which of several adapters it goes through."""

    def numbers(self, gate: str) -> tuple[int, ...]:
        """What a sample's name of its gates means: a number for each group, -1 for none of it."""
        raise NotImplementedError

    def insert(self, policy: nn.Module) -> None:
        """Freeze the policy and put adapters into it, without values yet."""
        raise NotImplementedError

    def require_one(self) -> None:
        """Raises UserError where there is no one matrix that does what a matrix and its adapters do."""

    def gates(self, batch: Batch) -> Tensor | None:
        """Which of several adapters each token goes through, 0 or 1: [B, T, adapters]. None: there is no choice."""
        return None


class Head(Kind):
    """One number off the last hidden state, for a text or for each of its tokens: its fields are how it begins."""

    folder: ClassVar[str] = "llmtrainer.models.heads"
    default_kind: ClassVar[str] = "score"
    instead: ClassVar[bool] = True
    """Whether it takes the place of the vocabulary's head, or stands beside it."""

    init: Literal["normal", "zero"] = "normal"
    """First weights of a head that is new: normal, or zero, so that every text has the score 0."""

    std: float | None = Field(default=None, gt=0.0, allow_inf_nan=False)
    """Standard deviation of normal first weights. Left out: 1 / sqrt(D + 1) for hidden states of D numbers
    (arXiv:2009.01325, appendix B.1)."""

    scale: float = Field(default=1.0, gt=0.0, allow_inf_nan=False)
    """Factor on normal first weights: 0.1 begins with scores near 0."""

    @property
    def apart(self) -> bool:
        """Whether it reads a model of its own."""
        return False

    @property
    def cuts(self) -> int:
        """How many cut points divide the line of scores into classes."""
        return 0


class Family(Kind):
    """A model family: its fields are the shape of the model."""

    folder: ClassVar[str] = "llmtrainer.models.families"
    default_kind: ClassVar[str] = "llama"

    start_from: str | None = None
    """A run directory, a checkpoint, a Hugging Face folder or a hub id (`Qwen/Qwen3-0.6B`, `owner/name@revision`)
    to take weights and shape from."""

    freeze: tuple[str, ...] = ()
    """Patterns on parameter names that stay as they are: `model.embed_tokens.*`, `model.layers.0.*`."""

    adapter: Adapter | None = None
    """Train a few numbers beside every matrix of `start_from` instead of the model itself: `{kind: lora, rank: 16}`,
    `{kind: dora}`. Checkpoints then hold the adapter alone, as PEFT writes it."""

    head: Head | None = None
    """Read one number off the model: `{kind: score}` makes a reward model, `{kind: ordinal, classes: 5}` one of graded
    texts, `{kind: value}` stands a critic beside a policy. Its parameters are called `score.*` (`optim.groups` may give
    them their own rate)."""

    neftune: float = Field(default=0.0, ge=0.0, allow_inf_nan=False)
    """Size of uniform noise on the embeddings while training, alpha in arXiv:2310.05914, which takes 5: instruction
    tuning on few examples learns their answers less by heart. 0: none."""

    def load(self, folder: Path, compute: torch.dtype, *, frozen: bool = False) -> nn.Module:
        """The policy of a folder, shape and weights. frozen: nothing of it will ever be trained."""
        raise NotImplementedError

    def build(self, vocabulary: int, compute: torch.dtype = torch.float32) -> nn.Module:
        """A policy without values yet: `initialise(seed)` or loading fills it.

        `vocabulary` is the number of embedding rows. Weights are float32, or float64 if `compute` is; the
        forward pass runs in `compute`.
        """
        raise NotImplementedError


class Rule(Kind):
    """An update rule: its fields are its hyperparameters; the rate arrives with every step."""

    folder: ClassVar[str] = "llmtrainer.optim.rules"
    default_kind: ClassVar[str] = "adamw"
    elementwise: ClassVar[bool] = True
    """Whether an element's update depends on that element alone; engines that shard elements refuse the others."""

    def build(self, groups: Sequence[Mapping[str, Any]]) -> Optimizer:
        """The optimizer of these groups; its own `param_groups`, with other parameters, must build its like."""
        raise NotImplementedError

    def state_shape(self, what: str, shape: Sequence[int]) -> tuple[int, ...]:
        """Shape of the state tensor `what`, if it is no scalar, of a parameter of `shape`: the same by default."""
        return tuple(shape)


class EngineConfig(Kind):
    """Which engine, and its settings."""

    folder: ClassVar[str] = "llmtrainer.parallel.engines"
    default_kind: ClassVar[str] = "single"

    device: str = "auto"
    """auto takes cuda where there is one, else mps, else cpu; or cpu, cuda, cuda:1, mps."""

    attention: Literal["auto", "blocks", "sdpa", "reference", "flex", "varlen", "fused"] = "auto"
    """How attention is computed: blocks of plain products, torch's sdpa, the definition (reference), or, on CUDA,
    flex_attention, flash kernels over packed documents (varlen), or for each batch varlen or sdpa, whichever takes it
    without a mask (fused). auto: blocks on a CPU, fused on CUDA in 16 bits, else sdpa."""

    kernels: Literal["auto", "torch", "liger"] = "auto"
    """Who computes norms, rotary positions and gated MLPs. auto: Liger's kernels on CUDA where they are installed
    and nothing is compiled, else torch's."""

    fallback: bool = False
    """Where the named attention, kernels or graphs cannot run, take what can and say so, instead of refusing."""

    recompute_every: int | None = Field(default=None, ge=1)
    """Compute activations again in backward instead of keeping them, in every so-manyth block; 1: in all. Less
    memory, more time, the same bits."""

    recompute: Literal["layer", "mlp"] = "layer"
    """What recompute_every computes again: whole blocks, or in them only what follows attention."""

    def start(self, precision: str) -> Engine:
        raise NotImplementedError

    def arrangement(self) -> Arrangement:
        """What to ask of the policy. Settings that mean nothing here stay unread, and are refused as such."""
        named = self.attention != "auto" or self.kernels == "liger"
        every = self.recompute_every
        return Arrangement(
            self.attention, self.kernels, named and self.fallback, every, "layer" if every is None else self.recompute
        )
