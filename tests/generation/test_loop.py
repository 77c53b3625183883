"""Completions: with the cache as without it, row by row, until each row's own end."""

from __future__ import annotations

import math
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

    def take(self, rows: Sequence[int]) -> None:
        self.tokens = [list(self.tokens[row]) for row in rows]

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


def test_a_finished_row_leaves_the_batch() -> None:
    policy = Counting()
    sampling = Sampling(temperature=0.0, max_new_tokens=12)
    done = complete(policy, PROMPTS, sampling, Tokens())
    lengths = [len(completion.tokens) for completion in done]
    # The last token of a completion is chosen and never read.
    expected = [[1] * sum(length > place for length in lengths) for place in range(1, max(lengths))]
    assert policy.rows_read == [[len(prompt) for prompt in PROMPTS], *expected]


def test_equal_prompts_are_read_once_and_go_on_by_themselves() -> None:
    policy = Even()
    sampling = Sampling(max_new_tokens=3)
    done = complete(policy, [[5, 5], [7], [5, 5], [5, 5]], sampling, Tokens(end=99), seed=3)
    assert policy.rows_read == [[2, 1], [1] * 4, [1] * 4]
    assert len({completion.tokens for completion in done}) == 4
    alone = complete(Even(), [[5, 5], [7], [5, 5], [5, 5]], sampling, Tokens(end=99), seed=3, rows_at_once=1)
    assert done == alone


def test_a_full_context_ends_a_row() -> None:
    (done,) = complete(Counting(context_length=8), [[5, 5, 5]], GREEDY, Tokens())
    assert done == by_hand([5, 5, 5], 5)
    assert done.finish == "length"
    both = complete(Counting(context_length=30), [[9] * 20, [5]], GREEDY, Tokens())
    assert both == [by_hand([9] * 20, 10), by_hand([5], 29)]


def test_tokens_stream_in_rounds_and_join_to_the_completions() -> None:
    sampling = Sampling(temperature=0.0, max_new_tokens=4)
    streamed = list(generate(Counting(), PROMPTS, sampling, Tokens()))
    assert [chosen.row for chosen in streamed[:5]] == [0, 1, 2, 3, 4]
    done = complete(Counting(), PROMPTS, sampling, Tokens())
    for row, completion in enumerate(done):
        own = [chosen for chosen in streamed if chosen.row == row]
        assert tuple(chosen.token for chosen in own) == completion.tokens
        assert [chosen.finish for chosen in own] == [None] * (len(own) - 1) + [completion.finish]


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


@dataclass
class Spoken(Tokens):
    """Ids that are letters, 65 to 90 -> here 0 to 25; id 26 is a control token, 27 the end."""

    end: int = 27
    control: dict[str, int] = field(default_factory=lambda: {"<|end|>": 27, "<|user|>": 26})

    def stream(self) -> Spoken:
        return self

    def feed(self, token: int) -> str:
        return chr(65 + token)

    def close(self) -> str:
        return ""


@dataclass
class Said(Counting):
    """Says the same text in every row, one letter a token, over and over."""

    text: str = "ABCDEF"
    strength: float = 20.0

    def read(self, tokens_BT: Tensor, lengths_B: Tensor, cache: Rows) -> Tensor:
        super().read(tokens_BT, lengths_B, cache)
        logits_BV = torch.zeros(len(lengths_B), 48, dtype=torch.float64)
        for row, tokens in enumerate(cache.tokens):
            logits_BV[row, ord(self.text[(len(tokens) - 1) % len(self.text)]) - 65] = self.strength
        return logits_BV


def letters(completion: Completion) -> str:
    return "".join(chr(65 + token) for token in completion.tokens)


def test_a_stop_string_across_tokens_ends_a_row_with_the_token_that_completes_it() -> None:
    sampling = Sampling(temperature=0.0, max_new_tokens=20, stop=("XYZ", "CDE"))
    (done, other) = complete(Said(), [[30], [31] * 3], sampling, Spoken())
    assert (letters(done), done.finish) == ("ABCDE", "stop")
    assert (letters(other), other.finish) == ("CDE", "stop")


@pytest.mark.parametrize("ids", [(3,), (9, 3), (3, 4)], ids=str)
def test_a_stop_id_ends_a_row_and_is_given_out(ids: tuple[int, ...]) -> None:
    (done,) = complete(Said(), [[30]], Sampling(temperature=0.0, stop_ids=ids), Spoken())
    assert (letters(done), done.finish) == ("ABCD", "stop")


def test_before_the_least_length_neither_the_end_nor_a_stop_is_chosen() -> None:
    ends = Said(text=chr(65 + 27))
    plain = Sampling(temperature=0.0, max_new_tokens=9)
    assert complete(ends, [[30]], plain, Spoken())[0] == Completion((27,), "end")
    (done,) = complete(ends, [[30]], plain.model_copy(update={"min_new_tokens": 4}), Spoken())
    assert len(done.tokens) == 5 and done.tokens[4] == 27 and 27 not in done.tokens[:4]
    stop = Sampling(temperature=0.0, max_new_tokens=20, min_new_tokens=8, stop=("CD",), stop_ids=(0,))
    (done,) = complete(Said(), [[30]], stop, Spoken())
    # The stop id 0 is A, so another id, the lowest, stands in its place until it may be chosen.
    assert (letters(done), done.finish) == ("BBCDEFBBCD", "stop")
    both = complete(ends, [[30]], Sampling(max_new_tokens=6, min_new_tokens=6), Spoken())
    assert both[0].finish == "length" and 27 not in both[0].tokens


@pytest.mark.parametrize(
    ("over", "exempt", "expected"),
    [
        # The prompt is C C, and the model says ABC ABC. A token that occurred loses to the lowest id that did not.
        ("completion", (), "ABCDEF"),
        ("prompt", (), "ABAABA"),
        ("both", (), "ABDEFG"),
        ("both", (1,), "ABBBBB"),
    ],
)
def test_penalties_look_where_they_are_told_to(over: str, exempt: tuple[int, ...], expected: str) -> None:
    sampling = Sampling.model_validate(
        {
            "temperature": 0.0, "max_new_tokens": 6, "presence_penalty": 30.0, "penalty_over": over,
            "penalty_exempt": exempt,
        }
    )  # fmt: skip
    (done,) = complete(Said(text="CAB"), [[2, 2]], sampling, Spoken())
    assert letters(done) == expected


def test_the_frequency_penalty_counts_and_counts_leave_with_their_rows() -> None:
    # 20 for the letter that is said, 6 less each time: it goes on three times, until another 0 is as large.
    sampling = Sampling(temperature=0.0, max_new_tokens=5, frequency_penalty=6.0, stop_ids=(1,))
    done = complete(Said(text="F"), [[30], [31], [32]], sampling, Spoken())
    assert [letters(one) for one in done] == ["FFFFA"] * 3
    short = complete(Said(text="AF"), [[30], [31, 31], [32], [33, 33]], sampling, Spoken())
    assert [letters(one) for one in short[::2]] == [letters(short[0])] * 2
    for row, one in enumerate(short):
        prompts: list[list[int]] = [[30], [31, 31], [32], [33, 33]]
        assert complete(Said(text="AF"), [prompts[row]], sampling, Spoken())[0] == one


def test_logprobs_are_those_of_the_model_and_of_what_was_drawn_from() -> None:
    sampling = Sampling(temperature=0.5, top_k=1, max_new_tokens=2, logprobs=2)
    (done,) = complete(Said(strength=2.0), [[30]], sampling, Spoken())
    assert done.logprobs is not None and len(done.logprobs) == 2
    total = math.log(math.exp(2.0) + 47)
    for place, one in enumerate(done.logprobs):
        assert (one.model, one.sampled) == pytest.approx((2.0 - total, 0.0))
        assert one.top[0] == (place, pytest.approx(2.0 - total))
        assert len(one.top) == 2 and one.top[1][1] == pytest.approx(-total)
    warm = Sampling(temperature=0.5, max_new_tokens=1, logprobs=0)
    (done,) = complete(Said(strength=2.0), [[30]], warm, Spoken(), seed=1)
    assert done.logprobs is not None and done.logprobs[0].top == ()
    weight = {0: 4.0}.get(done.tokens[0], 0.0)    # 2 / 0.5; only 40 of the head's 48 rows are ids
    assert done.logprobs[0].sampled == pytest.approx(weight - math.log(math.exp(4.0) + 39))
    (silent,) = complete(Said(), [[30]], GREEDY, Spoken())
    assert silent.logprobs is None


@pytest.mark.parametrize("name", ["stop_ids", "penalty_exempt"])
def test_ids_that_the_model_does_not_have_are_refused(name: str) -> None:
    with pytest.raises(UserError, match=f"{name} names id 48"):
        complete(Said(), [[30]], Sampling.model_validate({name: (48,)}), Spoken())


def test_with_every_setting_a_row_says_what_it_says_alone() -> None:
    decoder = tiny()
    vocabulary = Spoken(vocabulary=60, end=59)
    sampling = Sampling(
        temperature=1.2, top_p=0.97, min_p=0.01, repetition_penalty=1.1, presence_penalty=0.2, frequency_penalty=0.1,
        penalty_over="both", penalty_exempt=(7,), max_new_tokens=25, min_new_tokens=2, suppress=(9,), stop_ids=(11,),
        stop=("AB", "Q"), logprobs=3,
    )
    many = [*prompts(), *prompts()]
    done = complete(decoder, many, sampling, vocabulary, seed=2)
    assert {one.finish for one in done} >= {"stop", "length"}
    for rows_at_once in (1, 3):
        again = complete(decoder, many, sampling, vocabulary, seed=2, rows_at_once=rows_at_once)
        assert [(one.tokens, one.finish) for one in again] == [(one.tokens, one.finish) for one in done]
