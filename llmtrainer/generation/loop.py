"""Completions from a policy that reads token by token."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Literal, Protocol

import torch
from torch import Tensor

from llmtrainer.base.errors import UserError
from llmtrainer.generation.sampling import Sampling, choose, uniform


class Reader(Protocol):
    """What generation asks of a policy."""

    context_length: int

    def cache(self, rows: int, capacity: int) -> Any: ...

    def read(self, tokens_BT: Tensor, lengths_B: Tensor, cache: Any) -> Tensor:
        """Append the first `lengths_B` of each row's tokens to that row; logits [B, V] of what follows them.
        A row of length 0 stays as it is, and its logits mean nothing."""
        ...


class Vocabulary(Protocol):
    """What generation asks of a tokenizer."""

    @property
    def vocabulary(self) -> int: ...

    @property
    def end(self) -> int: ...


@dataclass(frozen=True)
class Completion:
    """What followed one prompt."""

    tokens: tuple[int, ...]
    """As they were chosen, the end token included: exactly the ids that a policy would be trained on."""
    finish: Literal["end", "length"]
    """Whether the model ended it, or its room did."""


def generate(
    policy: Reader,
    prompts: Sequence[Sequence[int]],
    sampling: Sampling,
    tokenizer: Vocabulary,
    *,
    seed: int = 0,
    first_row: int = 0,
) -> Iterator[tuple[int, int]]:
    """(row, token) as they are chosen, row after row, one token each a round.

    Prompts of different lengths are read together. A row stops by itself: with the tokenizer's end token,
    which is given out too, after `max_new_tokens`, or where the model's context is full. `first_row` is the
    number of the first prompt, for a caller that cuts many prompts into batches: a draw is a function of
    (seed, row, position).
    """
    _require_prompts(prompts, policy.context_length, first_row)
    return _generate(policy, [list(prompt) for prompt in prompts], sampling, tokenizer, seed, first_row)


def _generate(
    policy: Reader,
    prompts: list[list[int]],
    sampling: Sampling,
    tokenizer: Vocabulary,
    seed: int,
    first_row: int,
) -> Iterator[tuple[int, int]]:
    if not prompts:
        return
    room = [min(sampling.max_new_tokens, policy.context_length - len(prompt)) for prompt in prompts]
    cache = policy.cache(len(prompts), max(len(prompt) + n for prompt, n in zip(prompts, room, strict=True)))
    device = cache.lengths_B.device
    unread = prompts
    done = [0] * len(prompts)
    while any(unread):
        # Never around a yield: whoever consumes this would run without gradients.
        with torch.no_grad():
            tokens_BT, lengths_B = _padded(unread, device)
            logits_BV = policy.read(tokens_BT, lengths_B, cache)
            open_rows = [row for row, tokens in enumerate(unread) if tokens]
            uniform_B = torch.tensor(
                [uniform(seed, first_row + row, len(prompts[row]) + done[row]) for row in open_rows],
                dtype=torch.float64,
            )
            chosen = choose(logits_BV[open_rows], sampling, uniform_B, tokenizer.vocabulary).tolist()
        unread = [[] for _ in prompts]
        for row, token in zip(open_rows, chosen, strict=True):
            done[row] += 1
            if token != tokenizer.end and done[row] < room[row]:
                unread[row] = [token]
            yield row, token


def complete(
    policy: Reader,
    prompts: Sequence[Sequence[int]],
    sampling: Sampling,
    tokenizer: Vocabulary,
    *,
    seed: int = 0,
    rows_at_once: int | None = None,
) -> list[Completion]:
    """One completion per prompt. `rows_at_once` bounds the memory of the cache and changes no token."""
    _require_prompts(prompts, policy.context_length, 0)
    tokens: list[list[int]] = [[] for _ in prompts]
    size = rows_at_once or max(len(prompts), 1)
    for start in range(0, len(prompts), size):
        batch = prompts[start : start + size]
        for row, token in generate(policy, batch, sampling, tokenizer, seed=seed, first_row=start):
            tokens[start + row].append(token)
    return [Completion(tuple(row), "end" if row[-1] == tokenizer.end else "length") for row in tokens]


def _padded(rows: Sequence[Sequence[int]], device: torch.device) -> tuple[Tensor, Tensor]:
    """Rows of different lengths as one tensor [B, T], padded on the right, and their lengths [B]."""
    longest = max(map(len, rows))
    tokens_BT = torch.tensor([[*row, *[0] * (longest - len(row))] for row in rows], dtype=torch.int64)
    lengths_B = torch.tensor([len(row) for row in rows], dtype=torch.int64)
    return tokens_BT.to(device), lengths_B.to(device)


def _require_prompts(prompts: Sequence[Sequence[int]], context_length: int, first_row: int) -> None:
    for row, prompt in enumerate(prompts, start=first_row):
        if not prompt:
            raise UserError(
                f"prompt {row:,} is empty",
                why="a model continues a text; it has learned no token that stands before one",
                fix="give it at least one character to continue",
            )
        if len(prompt) >= context_length:
            raise UserError(
                f"prompt {row:,} has {len(prompt):,} tokens",
                why=f"the model's context is {context_length:,} tokens, and the answer has to fit in it too",
                fix=f"cut the prompt to {context_length - 1:,} tokens or fewer",
            )
