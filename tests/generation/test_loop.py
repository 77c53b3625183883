"""Completions: with the cache as without it, row by row, until each row's own end."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import pytest
import torch
from torch import Tensor

from llmtrainer.base.errors import UserError
from llmtrainer.core.batch import Batch
from llmtrainer.generation.loop import Completion, complete, generate
from llmtrainer.generation.sampling import Sampling, uniform
from llmtrainer.models.decoder import Decoder
from llmtrainer.models.families.llama import Llama

END = 3
GREEDY = Sampling(temperature=0.0, max_new_tokens=50)


@dataclass
class Tokens:
    """As much of a tokenizer as generation needs."""

    vocabulary: int = 40
    end: int = END


@dataclass
class Rows:
    """A cache that remembers the tokens themselves."""

    tokens: list[list[int]]
    capacity: int

    @property
    def lengths_B(self) -> Tensor:
        return torch.tensor([len(row) for row in self.tokens])


@dataclass
class Counting:
    """A policy that can be worked out by hand: after a row of n tokens that ends with t comes t + n, modulo
    40.

    48 rows in the head for 40 ids; the padding rows are as likely as anything can be.
    """

    context_length: int = 64
    rows_read: list[list[int]] = field(default_factory=list)

    def cache(self, rows: int, capacity: int) -> Rows:
        return Rows([[] for _ in range(rows)], capacity)

    def read(self, tokens_BT: Tensor, lengths_B: Tensor, cache: Rows) -> Tensor:
        self.rows_read.append(lengths_B.tolist())
        logits_BV = torch.zeros(len(lengths_B), 48)
        logits_BV[:, 40:] = 1e4
        for row, (tokens, length) in enumerate(zip(tokens_BT.tolist(), lengths_B.tolist(), strict=True)):
            cache.tokens[row] += tokens[:length]
            assert len(cache.tokens[row]) <= min(cache.capacity, self.context_length)
            if length:
                logits_BV[row, self.follows(cache.tokens[row])] = 100.0
            else:
                logits_BV[row] = torch.nan  # means nothing, so nobody may look at it
        return logits_BV

    @staticmethod
    def follows(row: Sequence[int]) -> int:
        return (row[-1] + len(row)) % 40


def by_hand(prompt: Sequence[int], room: int) -> Completion:
    row = list(prompt)
    for _ in range(room):
        row.append(Counting.follows(row))
        if row[-1] == END:
            return Completion(tuple(row[len(prompt) :]), "end")
    return Completion(tuple(row[len(prompt) :]), "length")


PROMPTS = [[7], [1, 2, 4], [8, 8], [9] * 20, [33]]


def test_each_row_goes_on_until_its_own_end_or_length() -> None:
    expected = [by_hand(prompt, 12) for prompt in PROMPTS]
    assert {completion.finish for completion in expected} == {"end", "length"}
    assert len({len(completion.tokens) for completion in expected}) > 2
    sampling = Sampling(temperature=0.0, max_new_tokens=12)
    assert complete(Counting(), PROMPTS, sampling, Tokens()) == expected


def test_a_finished_row_reads_nothing_more() -> None:
    policy = Counting()
    sampling = Sampling(temperature=0.0, max_new_tokens=12)
    done = complete(policy, PROMPTS, sampling, Tokens())
    for row, (prompt, completion) in enumerate(zip(PROMPTS, done, strict=True)):
        # The last token of a completion is chosen and never read.
        assert sum(lengths[row] for lengths in policy.rows_read) == len(prompt) + len(completion.tokens) - 1
    assert len(policy.rows_read) == max(len(completion.tokens) for completion in done)


def test_a_full_context_ends_a_row() -> None:
    (done,) = complete(Counting(context_length=8), [[5, 5, 5]], GREEDY, Tokens())
    assert done == by_hand([5, 5, 5], 5)
    assert done.finish == "length"
    both = complete(Counting(context_length=30), [[9] * 20, [5]], GREEDY, Tokens())
    assert both == [by_hand([9] * 20, 10), by_hand([5], 29)]


def test_tokens_stream_in_rounds_and_join_to_the_completions() -> None:
    sampling = Sampling(temperature=0.0, max_new_tokens=4)
    streamed = list(generate(Counting(), PROMPTS, sampling, Tokens()))
    assert [row for row, _ in streamed[:5]] == [0, 1, 2, 3, 4]
    done = complete(Counting(), PROMPTS, sampling, Tokens())
    for row, completion in enumerate(done):
        assert tuple(token for place, token in streamed if place == row) == completion.tokens


def test_a_consumer_of_the_stream_keeps_its_gradients() -> None:
    for _ in generate(Counting(), [[5]], GREEDY, Tokens()):
        assert torch.is_grad_enabled()
        break


class Even(Counting):
    """A policy to which all ids are alike: what a row says is its random numbers and nothing else."""

    def read(self, tokens_BT: Tensor, lengths_B: Tensor, cache: Rows) -> Tensor:
        super().read(tokens_BT, lengths_B, cache)
        return torch.zeros(len(lengths_B), 48)


def test_every_token_is_drawn_with_the_number_of_its_row_and_position() -> None:
    sampling = Sampling(max_new_tokens=30)
    done = complete(Even(), [[5, 5], [5]], sampling, Tokens(end=99), seed=8)
    for row, (length, completion) in enumerate(zip((2, 1), done, strict=True)):
        assert list(completion.tokens) == [int(uniform(8, row, length + place) * 40) for place in range(30)]


def test_no_prompts_give_no_completions() -> None:
    assert complete(Counting(), [], GREEDY, Tokens()) == []


def test_prompts_that_cannot_be_continued_are_refused_before_anything_is_read() -> None:
    policy = Counting(context_length=8)
    with pytest.raises(UserError, match="prompt 1 is empty"):
        generate(policy, [[5], []], GREEDY, Tokens())
    with pytest.raises(UserError, match="prompt 2 has 8 tokens"):
        complete(policy, [[5], [6], [1] * 8], GREEDY, Tokens(), rows_at_once=1)
    assert policy.rows_read == []


def tiny(**shape: object) -> Decoder:
    """A random decoder whose next token depends on all before: large weights, or every row repeats one
    token."""
    family = Llama.model_validate(
        {
            "hidden_size": 32,
            "layers": 2,
            "heads": 4,
            "kv_heads": 2,
            "context_length": 96,
            "init_std": 0.3,
            **shape,
        }
    )
    decoder = family.build(64, torch.float64)
    decoder.initialise(0)
    return decoder


PROMPT_LENGTHS = (1, 7, 23, 12)


def prompts() -> list[list[int]]:
    chance = torch.Generator().manual_seed(1)
    return [torch.randint(4, 60, (length,), generator=chance).tolist() for length in PROMPT_LENGTHS]


def without_cache(decoder: Decoder, prompt: list[int], room: int, vocabulary: Tokens) -> list[int]:
    """Greedy, by the forward pass of training over the whole row for every token."""
    row = list(prompt)
    decoder.eval()
    for _ in range(room):
        tokens_BT = torch.tensor([row])
        zeros_BT = torch.zeros_like(tokens_BT, dtype=torch.int32)
        batch = Batch(
            tokens_BT=tokens_BT, targets_BT=torch.zeros_like(tokens_BT), weights_BT=torch.ones(1, len(row)),
            document_BT=zeros_BT, position_BT=torch.arange(len(row), dtype=torch.int32)[None],
            sequence_BT=zeros_BT, place_B=torch.zeros(1, dtype=torch.int64),
        )  # fmt: skip
        with torch.no_grad():
            logits_V = decoder.head_weight @ decoder.hidden(batch)[0, -1]
        row.append(int(logits_V[: vocabulary.vocabulary].argmax()))
        if row[-1] == vocabulary.end:
            break
    decoder.train()
    return row[len(prompt) :]


@pytest.mark.parametrize(
    "shape", [{}, {"sliding_window": 9}, {"dropout": 0.5, "query_key_norm": True}], ids=str
)
def test_greedy_with_the_cache_is_greedy_without_for_rows_of_different_lengths(
    shape: dict[str, object],
) -> None:
    decoder, vocabulary = tiny(**shape), Tokens(vocabulary=60)
    done = complete(decoder, prompts(), GREEDY, vocabulary)
    for prompt, completion in zip(prompts(), done, strict=True):
        assert list(completion.tokens) == without_cache(decoder, prompt, 50, vocabulary)
        assert len(set(completion.tokens)) > 5
    # The same rows, where the first token that row 2 says is the end: rows stop one by one.
    vocabulary = Tokens(vocabulary=60, end=done[2].tokens[4])
    stopped = complete(decoder, prompts(), GREEDY, vocabulary)
    assert stopped[2].finish == "end" and len(stopped[2].tokens) <= 5
    for prompt, completion in zip(prompts(), stopped, strict=True):
        assert list(completion.tokens) == without_cache(decoder, prompt, 50, vocabulary)
        assert (completion.finish == "end") == (completion.tokens[-1] == vocabulary.end)


def test_what_a_row_says_depends_on_no_other_row_and_on_the_seed() -> None:
    decoder, vocabulary = tiny(), Tokens(vocabulary=60)
    sampling = Sampling(temperature=1.0, top_k=30, top_p=0.95, max_new_tokens=30)
    many = [*prompts(), *prompts()]
    done = complete(decoder, many, sampling, vocabulary, seed=5)
    for rows_at_once in (1, 3):
        again = complete(decoder, many, sampling, vocabulary, seed=5, rows_at_once=rows_at_once)
        assert again == done
    # The same prompt in another row is another sample, and so is another seed.
    assert done[:4] != done[4:]
    assert complete(decoder, many, sampling, vocabulary, seed=6) != done
    assert max(token for completion in done for token in completion.tokens) < 60
