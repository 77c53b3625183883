"""Completions from a policy that reads token by token."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, Protocol

import torch
from torch import Tensor

from llmtrainer.base.errors import UserError
from llmtrainer.core.protocols import TextStream
from llmtrainer.generation.sampling import Sampling, choose, penalised, require_ids, uniform
from llmtrainer.generation.stopping import Growing

Finish = Literal["end", "stop", "length"]


class Rows(Protocol):
    """What generation asks of a cache."""

    lengths_B: Tensor

    def take(self, rows: Sequence[int]) -> None:
        """Row i becomes what row rows[i] was; as many rows as named."""
        ...


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

    @property
    def control(self) -> Mapping[str, int]:
        """Asked for only where a stop string is looked for, as is `stream`."""
        ...

    def stream(self) -> TextStream: ...


@dataclass(frozen=True)
class Logprobs:
    """How probable a chosen token was, in nats."""

    model: float
    """Under the model's own distribution: its logits as they are, over all rows of its head, which is what training
    computes."""
    sampled: float
    """Under the distribution it was drawn from, after penalties, temperature and filters; 0 at temperature 0."""
    top: tuple[tuple[int, float], ...] = ()
    """(id, log-probability) of the ids that the model holds for the most likely, the likeliest first."""


@dataclass(frozen=True)
class Chosen:
    """One token, as it was chosen."""

    row: int
    """Of the prompts given to `generate`, from 0."""
    token: int
    finish: Finish | None
    """Why it is the row's last; None if it is not."""
    logprobs: Logprobs | None = None


@dataclass(frozen=True)
class Completion:
    """What followed one prompt."""

    tokens: tuple[int, ...]
    """As they were chosen, the end token included: exactly the ids that a policy would be trained on."""
    finish: Finish
    """Whether the model ended it (`end`), a stop id or a stop string did (`stop`), or its room (`length`)."""
    logprobs: tuple[Logprobs, ...] | None = None
    """One for each token, if asked for."""


def generate(
    policy: Reader,
    prompts: Sequence[Sequence[int]],
    sampling: Sampling,
    tokenizer: Vocabulary,
    *,
    seed: int = 0,
    first_row: int = 0,
) -> Iterator[Chosen]:
    """Tokens as they are chosen, row after row, one token each a round.

    Prompts of different lengths are read together, equal ones only once; a row that ends leaves the batch. A row
    ends with the tokenizer's end token or a stop id, which is given out too, with the token that completes a stop
    string, after `max_new_tokens`, or where the model's context is full. `first_row` is the number of the first
    prompt, for a caller that cuts many prompts into batches: a draw is a function of (seed, row, position).
    """
    require_prompts(prompts, policy.context_length, first_row)
    return _generate(policy, [list(prompt) for prompt in prompts], sampling, tokenizer, seed, first_row)


def _generate(
    policy: Reader,
    prompts: list[list[int]],
    sampling: Sampling,
    tokenizer: Vocabulary,
    seed: int,
    first_row: int,
) -> Iterator[Chosen]:
    if not prompts:
        return
    # Never around a yield: whoever consumes this would run without gradients.
    with torch.no_grad():
        batch = _Batch(policy, prompts, sampling, tokenizer, seed, first_row)
    while batch.rows:
        with torch.no_grad():
            chosen = batch.choose()
        yield from chosen
        with torch.no_grad():
            batch.read(chosen)


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
    require_prompts(prompts, policy.context_length, 0)
    written: list[list[Chosen]] = [[] for _ in prompts]
    size = rows_at_once or max(len(prompts), 1)
    # As long as one cache lives, the others share its copy of the weights.
    kept = policy.cache(1, 1) if size < len(prompts) else None
    for start in range(0, len(prompts), size):
        batch = prompts[start : start + size]
        for chosen in generate(policy, batch, sampling, tokenizer, seed=seed, first_row=start):
            written[start + chosen.row].append(chosen)
    del kept
    return [completion(row) for row in written]


def completion(row: Sequence[Chosen]) -> Completion:
    """The tokens of one row as a whole."""
    finish = row[-1].finish
    assert finish is not None
    logprobs = tuple(chosen.logprobs for chosen in row if chosen.logprobs is not None)
    return Completion(tuple(chosen.token for chosen in row), finish, logprobs or None)


def text_stream(sampling: Sampling, tokenizer: Vocabulary, prompt: Sequence[int]) -> Growing:
    """The text of one completion as it grows; it ends where `generate` ends the row."""
    silent = {*tokenizer.control.values(), *sampling.stop_ids, tokenizer.end}
    return Growing(
        tokenizer.stream(), prompt, silent=silent, stop=sampling.stop, unsearched=sampling.min_new_tokens
    )


class _Batch:
    """The rows that still go on, and the logits of what follows each."""

    def __init__(
        self,
        policy: Reader,
        prompts: list[list[int]],
        sampling: Sampling,
        tokenizer: Vocabulary,
        seed: int,
        first_row: int,
    ) -> None:
        self.policy, self.prompts, self.sampling, self.tokenizer = policy, prompts, sampling, tokenizer
        self.seed, self.first_row = seed, first_row
        self.rows = list(range(len(prompts)))
        """The row in each place of the batch."""
        self.done = [0] * len(prompts)
        self.room = [min(sampling.max_new_tokens, policy.context_length - len(prompt)) for prompt in prompts]
        self.texts = [text_stream(sampling, tokenizer, prompt) for prompt in prompts] if sampling.stop else []
        distinct = list(dict.fromkeys(map(tuple, prompts)))
        longest = max(len(prompt) + room for prompt, room in zip(prompts, self.room, strict=True))
        self.cache: Rows = policy.cache(len(distinct), longest)
        self.logits_BV = policy.read(*padded(distinct, self.cache.lengths_B.device), self.cache)
        if len(distinct) < len(prompts):
            index = {prompt: place for place, prompt in enumerate(distinct)}
            places = [index[tuple(prompt)] for prompt in prompts]
            self.cache.take(places)
            self.logits_BV = self.logits_BV[places]
        V = self.logits_BV.shape[1]
        require_ids(sampling.stop_ids, V, "stop_ids")
        require_ids(sampling.penalty_exempt, V, "penalty_exempt")
        self.ends_N = _marked([tokenizer.end, *sampling.stop_ids], self.logits_BV).nonzero()[:, 0]
        """The ids that end a row."""
        self.counted_V = ~_marked(sampling.penalty_exempt, self.logits_BV)
        """bool [V]: the ids that penalties may change."""
        self.count_BV = self._counts() if sampling.penalises else None

    def choose(self) -> list[Chosen]:
        """The next token of every row."""
        sampling, logits_BV = self.sampling, self.logits_BV
        if self.count_BV is not None:
            logits_BV = penalised(logits_BV, sampling, self.count_BV)
        if self.done[self.rows[0]] < sampling.min_new_tokens:    # all rows of a batch are equally far
            logits_BV = logits_BV.index_fill(1, self.ends_N, -torch.inf)
        uniform_B = torch.tensor(
            [
                uniform(self.seed, self.first_row + row, len(self.prompts[row]) + self.done[row])
                for row in self.rows
            ],
            dtype=torch.float64,
        )
        token_B, sampled_B = choose(logits_BV, sampling, uniform_B, self.tokenizer.vocabulary)
        tokens = token_B.tolist()
        told = self._logprobs(token_B, sampled_B)
        if self.count_BV is not None and sampling.penalty_over != "prompt":
            self.count_BV.scatter_add_(1, token_B[:, None], self.counted_V[token_B, None].int())
        chosen = []
        for row, token, logprobs in zip(self.rows, tokens, told, strict=True):
            self.done[row] += 1
            chosen.append(Chosen(row, token, self._finish(row, token), logprobs))
        return chosen

    def read(self, chosen: Sequence[Chosen]) -> None:
        """Let rows that ended leave, and read the others' tokens."""
        places = [place for place, one in enumerate(chosen) if one.finish is None]
        if not places:
            self.rows = []
            return
        if len(places) < len(chosen):
            places = _closed_up(places)
            self.cache.take(places)
            self.rows = [self.rows[place] for place in places]
            if self.count_BV is not None:
                self.count_BV = self.count_BV[places]
        tokens_BT, lengths_B = padded([[chosen[place].token] for place in places], self.cache.lengths_B.device)
        self.logits_BV = self.policy.read(tokens_BT, lengths_B, self.cache)

    def _finish(self, row: int, token: int) -> Finish | None:
        if token == self.tokenizer.end:
            return "end"
        if self.texts:
            self.texts[row].feed(token)
        if token in self.sampling.stop_ids or (self.texts and self.texts[row].stopped):
            return "stop"
        return "length" if self.done[row] >= self.room[row] else None

    def _counts(self) -> Tensor:
        """How often each id occurred where penalties look, in the prompts so far: [B, V]."""
        count_BV = torch.zeros_like(self.logits_BV, dtype=torch.int32)
        if self.sampling.penalty_over != "completion":
            for row, prompt in enumerate(self.prompts):
                count_BV[row] = torch.bincount(torch.tensor(prompt), minlength=count_BV.shape[1])
        return count_BV * self.counted_V

    def _logprobs(self, token_B: Tensor, sampled_B: Tensor) -> Sequence[Logprobs | None]:
        if self.sampling.logprobs is None:
            return [None] * len(self.rows)
        model_BV = self.logits_BV.log_softmax(dim=1)
        model_B = model_BV.gather(1, token_B[:, None])[:, 0]
        top = model_BV.topk(min(self.sampling.logprobs, model_BV.shape[1]), dim=1)
        tops = [tuple(zip(*both, strict=True)) for both in zip(top.indices.tolist(), top.values.tolist(), strict=True)]
        return [Logprobs(*one) for one in zip(model_B.tolist(), sampled_B.tolist(), tops, strict=True)]


def _marked(ids: Sequence[int], logits_BV: Tensor) -> Tensor:
    """bool [V], true at these ids; the head may have no row for some."""
    marked_V = torch.zeros(logits_BV.shape[1], dtype=torch.bool, device=logits_BV.device)
    marked_V[[number for number in ids if 0 <= number < len(marked_V)]] = True
    return marked_V


def _closed_up(places: Sequence[int]) -> list[int]:
    """The same places, the last ones moved into the gaps: fewest rows change their place."""
    kept, last = set(places), list(places)
    return [place if place in kept else last.pop() for place in range(len(places))]


def padded(rows: Sequence[Sequence[int]], device: torch.device) -> tuple[Tensor, Tensor]:
    """Rows of different lengths as one tensor [B, T], padded on the right, and their lengths [B]."""
    longest = max(map(len, rows))
    tokens_BT = torch.tensor([[*row, *[0] * (longest - len(row))] for row in rows], dtype=torch.int64)
    lengths_B = torch.tensor([len(row) for row in rows], dtype=torch.int64)
    return tokens_BT.to(device), lengths_B.to(device)


def require_prompts(prompts: Sequence[Sequence[int]], context_length: int, first_row: int) -> None:
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
