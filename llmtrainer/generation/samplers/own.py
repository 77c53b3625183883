"""Sample with the trainer's own forward code, in this process."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Protocol

import torch
from pydantic import Field
from torch import Tensor, nn

from llmtrainer.base.errors import UserError
from llmtrainer.core.at_rest import at_rest
from llmtrainer.core.weights_version import weights_version
from llmtrainer.generation.blocks import Blocks
from llmtrainer.generation.continuous import Batching, Reading, Row, Traffic
from llmtrainer.generation.drawing import Drawing
from llmtrainer.generation.loop import Vocabulary, require_prompts
from llmtrainer.generation.sampler import Forward, Held, Mode, Sampled, SamplerKind, numbered, require_trainable, scored
from llmtrainer.generation.sampling import Sampling


class Policy(Protocol):
    """What this asks of a policy."""

    context_length: int

    @property
    def module(self) -> nn.Module: ...

    @property
    def head_weight(self) -> Tensor: ...

    def reading_weights(self, own: bool = False) -> Any: ...

    def pages(self, weights: Any, count: int, size: int, longest: int) -> Reading: ...


class Own(SamplerKind):
    """The trainer's own model: continuous batching over blocks of keys and values, a prompt read once for all its
    answers."""

    max_rows: int = Field(default=64, ge=1)
    """Answers that are written at the same time. More cost memory and, up to some hundred, save time. No token
    depends on it."""

    max_tokens: int | None = Field(default=None, ge=1)
    """Tokens whose keys and values are kept at one time, over all answers: the bound on memory. Rows that do not fit
    wait, and are read again. None: what `max_rows` answers of full length need. No token depends on it."""

    block: int = Field(default=32, ge=1)
    """Tokens of one block of memory. A row wastes half a block on average; smaller ones are slower to gather."""

    def open(
        self, policy: Policy, tokenizer: Vocabulary, forward: Forward, weights: Held = "shared", mode: Mode = "exact"
    ) -> OwnSampler:
        return OwnSampler(self, policy, tokenizer, forward, weights, mode)


class OwnSampler:
    """See Sampler."""

    def __init__(
        self, config: Own, policy: Policy, tokenizer: Vocabulary, forward: Forward, weights: Held, mode: Mode
    ) -> None:
        self.config, self.policy, self.tokenizer, self.forward = config, policy, tokenizer, forward
        self.mode = mode
        self.traffic = Traffic()
        """Of the last call."""
        self._own: Any = None
        self._version = ""
        if weights == "copied":
            self._take()

    @property
    def version(self) -> str:
        return self._version or weights_version(self.policy.module)

    def sync(self) -> None:
        """Only a copy has to be told; shared weights are looked at with every call."""
        if self._version:
            self._take()

    def close(self) -> None:
        self._own = None

    def _take(self) -> None:
        self._own = None    # the old copy goes before the new one comes
        self._own, self._version = self.policy.reading_weights(own=True), weights_version(self.policy.module)

    def sample(
        self, prompts: Sequence[Sequence[int]], each: int, sampling: Sampling, seed: int, *,
        rows: Sequence[int] | None = None,
    ) -> list[Sampled]:  # fmt: skip
        assert self._own is not None or not self._version, "closed"
        require_trainable(sampling)
        require_prompts(prompts, self.policy.context_length, 0)
        assert each > 0
        if not prompts:
            return []
        with torch.no_grad(), at_rest(self.policy.module):
            version = self.version
            answers = self._rows(prompts, each, sampling)
            drawing = Drawing(sampling, self.tokenizer, answers, seed, numbered(len(prompts), each, rows))
            memory, blocks = self._memory(answers)
            batching = Batching(memory, blocks, self.config.max_rows)
            for start in range(0, len(answers), each):
                batching.add(answers[start].prompt, answers[start : start + each])
            batching.run(drawing.choose)
        self.traffic = batching.traffic
        del memory, batching    # before the trainer's forward pass needs room
        sampled = [drawing.sampled(row, version) for row in answers]
        if self.mode == "fast":
            return sampled
        return scored(self.forward, [row.prompt for row in answers], sampled, len(self.policy.head_weight))

    def _rows(self, prompts: Sequence[Sequence[int]], each: int, sampling: Sampling) -> list[Row]:
        context = self.policy.context_length
        return [
            Row(number * each + answer, prompt, min(sampling.max_new_tokens, context - len(prompt)))
            for number, prompt in enumerate(prompts)
            for answer in range(each)
        ]

    def _memory(self, rows: Sequence[Row]) -> tuple[Reading, Blocks]:
        size = self.config.block
        longest = max(len(row.prompt) + row.room for row in rows)
        # A prompt's last block is the group's; a row that goes on from it has one of its own.
        least = -(-longest // size) + 1
        if self.config.max_tokens is None:
            count = least * min(self.config.max_rows, len(rows))
        else:
            count = self.config.max_tokens // size
        if count < least:
            raise UserError(
                f"the longest answer does not fit into {self.config.max_tokens:,} tokens of memory",
                where="rollout.sampler.max_tokens",
                why=f"prompt and answer may have {longest:,} tokens together",
                fix=f"rollout.sampler.max_tokens={least * size}",
            )
        weights = self.policy.reading_weights() if self._own is None else self._own
        return self.policy.pages(weights, count + 1, size, longest), Blocks(count, size)
