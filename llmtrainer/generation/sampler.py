"""Many answers to many prompts, as training needs them: the seam, and what comes through it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any, ClassVar, Literal, Protocol

import numpy as np
import torch
from numpy.typing import NDArray

from llmtrainer.base.config import Kind
from llmtrainer.base.errors import UserError
from llmtrainer.core.batch import KEPT, NEVER, TEMPERATURE, Batch, Outputs
from llmtrainer.generation.loop import Finish, Vocabulary
from llmtrainer.generation.sampling import Sampling

Held = Literal["shared", "copied"]
"""Whose weights a sampler reads: the trainer's as they are at each rollout, or a copy that `sync` renews."""
Mode = Literal["exact", "fast"]
"""Which log-probability is recorded for a sampled token: what the trainer's forward pass says of the finished answer as
a row of its own, or what sampling saw."""
Places = tuple[Any, Any]    # a number and a slice, or two tensors of numbers
"""Row and column of some targets of a batch."""
Forward = Callable[[Batch, tuple[str, ...]], Outputs]
"""The trainer's own forward pass."""


@dataclass(frozen=True)
class Kept:
    """The ids that one token was drawn from."""

    ids: NDArray[np.int32]
    """Ascending."""
    left_out: bool
    """Whether `ids` are the ones that it was not drawn from, which may be fewer."""

    def bits(self, vocabulary: int) -> NDArray[np.uint8]:
        """One bit for each id, the lowest of each byte first: [ceil(V / 8)]."""
        flags = np.full(vocabulary, self.left_out)
        flags[self.ids] = not self.left_out
        return np.packbits(flags, bitorder="little")


@dataclass(frozen=True)
class Sampled:
    """One answer: the ids that were sampled, which are the ids to be trained."""

    tokens: tuple[int, ...]
    """With the end token or the stop id, where one was reached."""
    finish: Finish
    """Whether the model ended it (`end`), a stop id or a stop string did (`stop`), or its room (`length`)."""
    logp: NDArray[np.float64]
    """Log-probability of each token under the distribution it was drawn from: at its temperature, over the ids that
    were kept. In exact mode by the trainer's own forward pass, in fast mode as sampling saw it."""
    sampled_logp: NDArray[np.float64]
    """The same as sampling saw it, whatever the mode: another arrangement of the same numbers has other last digits,
    in bfloat16 tenths of a nat."""
    temperature: float
    """0: the most likely token was taken; log-probabilities are then those at temperature 1."""
    never: NDArray[np.int64]
    """Ids that no token was drawn from: those that were suppressed, and rows of the head that are no id."""
    kept: tuple[Kept | None, ...] | None
    """What each token was drawn from, None where from all ids but those never. None instead of all: each was."""
    version: str
    """Hash of the weights that wrote it."""

    def kept_bits(self, vocabulary: int) -> NDArray[np.uint8] | None:
        """As the signal `kept_BTW` says it, a row for each token: [tokens, ceil(V / 8)], V the rows of the head."""
        if self.kept is None:
            return None
        every = Kept(np.empty(0, dtype=np.int32), left_out=True)
        return np.stack([(one or every).bits(vocabulary) for one in self.kept])


class Sampler(Protocol):
    """Whoever writes answers."""

    @property
    def version(self) -> str:
        """Hash of the weights that it reads: `core.weights_version` of the policy that they were taken from."""
        ...

    def sync(self) -> None:
        """Take the trainer's weights as they are now."""
        ...

    def sample(
        self, prompts: Sequence[Sequence[int]], each: int, sampling: Sampling, seed: int, *,
        rows: Sequence[int] | None = None,
    ) -> list[Sampled]:  # fmt: skip
        """`each` answers to every prompt: the first prompt's, then the second's. Answer j to prompt i is row
        rows[i] + j, without `rows` i * each + j: its draws are a function of (seed, row, position)."""
        ...

    def close(self) -> None: ...


class SamplerKind(Kind):
    """Who writes the answers that a policy learns from."""

    folder: ClassVar[str] = "llmtrainer.generation.samplers"
    default_kind: ClassVar[str] = "own"

    def open(
        self, policy: Any, tokenizer: Vocabulary, forward: Forward, weights: Held = "shared", mode: Mode = "exact"
    ) -> Sampler:
        """A sampler of this policy. `forward` is the trainer's forward pass, an engine's for example.

        mode: exact, training on single rows begins with a ratio of exactly 1; fast costs nothing, and differs in the
        last digits of the compute type.
        """
        raise NotImplementedError


def require_trainable(sampling: Sampling) -> None:
    """UserError where a log-probability in training could not be that of the draw."""
    asked = {
        "repetition_penalty": sampling.repetition_penalty != 1.0,
        "presence_penalty": sampling.presence_penalty != 0.0,
        "frequency_penalty": sampling.frequency_penalty != 0.0,
    }
    for name, given in asked.items():
        if given:
            raise UserError(
                f"{name} cannot be sampled with in training",
                why="a penalty changes logits by what stands before, and the trainer scores the policy without it: "
                "the ratio of the two would be wrong at every token",
                fix=f"remove {name}; in a reward, repetition can cost something",
            )


def numbered(prompts: int, each: int, rows: Sequence[int] | None) -> list[int]:
    """The row of every answer to so many prompts, see Sampler.sample."""
    firsts = [number * each for number in range(prompts)] if rows is None else rows
    assert len(firsts) == prompts
    return [first + answer for first in firsts for answer in range(each)]


def require_version(sampled: Sequence[Sampled], version: str) -> None:
    """UserError if other weights than the trainer's wrote these answers."""
    others = {one.version for one in sampled} - {version}
    if others:
        raise UserError(
            "the sampler does not hold the trainer's weights",
            where=f"written by {min(others)[:12]}, trained are {version[:12]}",
            why="after a step nobody gave the new weights to the sampler, and what it writes is older than it says",
            fix="call sync() after every step, or rollout.weights=shared",
        )


def alone(prompt: Sequence[int], answer: Sampled | Sequence[int], vocabulary: int = 0) -> Batch:
    """A prompt and its answer as one row [1, n] that nothing shares and nothing pads: what is computed of it depends
    on no other row. `vocabulary`: rows of the head, for an answer that was drawn from a part of it."""
    tokens = answer.tokens if isinstance(answer, Sampled) else tuple(answer)
    row, n, first = [*prompt, *tokens], len(prompt) + len(tokens) - 1, len(prompt) - 1
    weights_BT = torch.zeros(1, n)
    weights_BT[:, first:] = 1.0
    zeros_BT = torch.zeros(1, n, dtype=torch.int32)
    signals = drawn_signals([((0, slice(first, n)), answer)], (1, n), vocabulary) if isinstance(answer, Sampled) else {}
    return Batch(
        tokens_BT=torch.tensor([row[:-1]]), targets_BT=torch.tensor([row[1:]]), weights_BT=weights_BT,
        document_BT=zeros_BT, position_BT=torch.arange(n, dtype=torch.int32)[None], sequence_BT=zeros_BT,
        place_B=torch.zeros(1, dtype=torch.int64),
        signals=signals,
    )  # fmt: skip


def drawn_signals(
    placed: Sequence[tuple[Places, Sampled]], shape: tuple[int, int], vocabulary: int
) -> dict[str, torch.Tensor]:
    """What a batch [B, T] must say of how its targets were drawn; nothing where that was from all ids at temperature 1.

    placed: each answer with the places of its targets in the batch, in order, as an index of [B, T]; targets that are
    in none do not count. vocabulary: V, the rows of the head.
    """
    signals: dict[str, torch.Tensor] = {}
    answers = [answer for _, answer in placed]
    if answers and len(answers[0].never):
        assert all(np.array_equal(one.never, answers[0].never) for one in answers), "answers of several rollouts"
        signals[NEVER] = torch.from_numpy(answers[0].never)
    if any(one.temperature not in (0.0, 1.0) for one in answers):
        signals[TEMPERATURE] = torch.ones(shape, dtype=torch.float64)
    if any(one.kept is not None for one in answers):
        signals[KEPT] = torch.full((*shape, -(-vocabulary // 8)), 255, dtype=torch.uint8)
    for places, one in placed:
        if TEMPERATURE in signals:
            signals[TEMPERATURE][places] = one.temperature or 1.0
        if (bits := one.kept_bits(vocabulary)) is not None:
            signals[KEPT][places] = torch.from_numpy(bits)
    return signals


def score(forward: Forward, batches: Sequence[Batch]) -> list[torch.Tensor]:
    """Log-probabilities [B, T] of each batch's targets, exactly as training on these same batches computes them."""
    # With gradients, which nobody asks for: without, a compiler would fuse other kernels than for training.
    found = []
    for batch in batches:
        logp_BT = forward(batch, ("logp",)).logp_BT
        assert logp_BT is not None
        found.append(logp_BT.detach().cpu())
    return found


def scored(
    forward: Forward, prompts: Sequence[Sequence[int]], sampled: Sequence[Sampled], vocabulary: int
) -> list[Sampled]:
    """The same answers with what the trainer's forward pass says of each as a row of its own. `vocabulary`: rows of the
    head."""
    found = []
    for prompt, one in zip(prompts, sampled, strict=True):
        (logp_1T,) = score(forward, [alone(prompt, one, vocabulary)])
        found.append(replace(one, logp=logp_1T[0, len(prompt) - 1 :].numpy().astype(np.float64)))
    return found
