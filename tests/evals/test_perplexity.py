"""Perplexity against a policy whose probabilities are worked out a second time, token by token, in numpy."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from llmtrainer.base.config import Config
from llmtrainer.base.errors import UserError
from llmtrainer.core.batch import Batch, Outputs
from llmtrainer.core.suite import Suite
from llmtrainer.evals.perplexity import DOCUMENTS_AT_ONCE, Perplexity, Totals, figures, windows
from tests.tolerances import FLOAT64_NATS

CONTEXT = 16
TEXTS = [
    "hello", "a", "", "\u4f60\u597d", "x" * 17, "xy" * 16,
    "the quick brown fox jumps over the lazy dog, twice",
]


class Letters:
    """One id per UTF-8 byte: what a text becomes can be read off it."""

    vocabulary, end, pad, control, fingerprint = 256, 0, 0, {}, "letters"
    begin: int | None = None

    def encode(self, text: str) -> list[int]:
        return list(text.encode())

    def encode_continuation(self, text: str) -> list[int]:
        return self.encode(text)

    def encode_batch(self, texts: Sequence[str]) -> list[list[int]]:
        return [self.encode(text) for text in texts]

    def decode(self, ids: Sequence[int], *, skip_control: bool = False) -> str:
        return bytes(ids).decode(errors="replace")

    def pieces(self, ids: Sequence[int]) -> list[str]:
        return [chr(item) for item in ids]

    def save(self, folder: Path) -> None:
        raise NotImplementedError


class MeanPolicy(nn.Module):
    """The next byte's logits are a linear function of the mean embedding of everything in the row so far.

    The simplest policy whose answer depends on all of its context: a window cut or padded wrongly shows.
    """

    def __init__(self) -> None:
        super().__init__()
        draw = torch.Generator().manual_seed(3)
        self.embedding = nn.Parameter(torch.randn(256, 8, generator=draw, dtype=torch.float64))
        self.head = nn.Parameter(torch.randn(8, 256, generator=draw, dtype=torch.float64))
        self.context_length = CONTEXT
        self.areas: list[int] = []
        self.batches: list[Batch] = []

    @property
    def module(self) -> nn.Module:
        return self

    def forward(self, batch: Batch, wants: tuple[str, ...]) -> Outputs:
        assert wants == ("logp",)
        assert not self.training, "dropout would be on"
        assert not torch.is_grad_enabled()
        self.areas.append(batch.tokens_BT.numel())
        self.batches.append(batch)
        real_BT = (batch.document_BT >= 0).double()
        sum_BTD = (self.embedding[batch.tokens_BT] * real_BT[..., None]).cumsum(1)
        mean_BTD = sum_BTD / real_BT.cumsum(1).clamp(min=1.0)[..., None]
        logp_BT = (mean_BTD @ self.head).log_softmax(-1).gather(-1, batch.targets_BT[..., None])[..., 0]
        return Outputs(logp_BT=torch.where(batch.weights_BT > 0, logp_BT, torch.zeros_like(logp_BT)))


@pytest.fixture
def policy() -> MeanPolicy:
    return MeanPolicy()


def surprise(policy: MeanPolicy, seen: list[int], target: int) -> float:
    """The same policy in numpy: nats at `target` after exactly `seen`."""
    embedding, head = policy.embedding.detach().numpy(), policy.head.detach().numpy()
    logits = embedding[seen].mean(0) @ head
    highest = logits.max()
    return float(highest + np.log(np.exp(logits - highest).sum()) - logits[target])


def by_hand(policy: MeanPolicy, text: str, window: int = CONTEXT) -> list[float]:
    """Every token after the first, from the window that starts at the largest multiple of half a window that
    still leaves the token's predecessor inside the window and the token uncounted before."""
    ids = list(text.encode())
    nats = []
    for place in range(1, len(ids)):
        start = 0
        while place > start + window:
            start += window // 2
        nats.append(surprise(policy, ids[start:place], ids[place]))
    return nats


def scores(policy: MeanPolicy, texts: Sequence[str], **settings: int) -> list[tuple[float, ...]]:
    return [score.nats for score in Perplexity(**settings).scores(policy, Letters(), texts)]


def run(policy: MeanPolicy, texts: Sequence[str], **settings: object) -> dict[str, float]:
    return Perplexity(path="texts", **settings).run(policy, Letters(), lambda path: iter(texts))


def test_every_token_of_every_document_has_the_surprise_worked_out_by_hand(policy: MeanPolicy) -> None:
    for nats, text in zip(scores(policy, TEXTS), TEXTS, strict=True):
        assert nats == pytest.approx(by_hand(policy, text), abs=FLOAT64_NATS)


def test_the_tokenizers_own_begin_is_read_and_the_first_token_of_the_text_predicted(policy: MeanPolicy) -> None:
    tokenizer = Letters()
    tokenizer.begin = 7
    (score,) = Perplexity().scores(policy, tokenizer, ["hello"])
    ids = [7, *b"hello"]
    assert score.ids == tuple(ids) and score.bytes == 5
    assert score.nats == pytest.approx(
        [surprise(policy, ids[:place], ids[place]) for place in range(1, 6)], abs=FLOAT64_NATS
    )


def test_a_shorter_window_is_the_same_rule_with_that_window(policy: MeanPolicy) -> None:
    (nats,) = scores(policy, ["the quick brown fox"], max_length=5)
    assert nats == pytest.approx(by_hand(policy, "the quick brown fox", window=5), abs=FLOAT64_NATS)


def test_neighbours_and_padding_change_nothing(policy: MeanPolicy) -> None:
    together = scores(policy, TEXTS)
    for nats, text in zip(together, TEXTS, strict=True):
        assert nats == pytest.approx(scores(policy, [text])[0], abs=FLOAT64_NATS)


@pytest.mark.parametrize("budget", [CONTEXT, 40, 1000])
def test_the_memory_knob_changes_no_figure(policy: MeanPolicy, budget: int) -> None:
    expected = run(policy, TEXTS)
    assert run(policy, TEXTS, tokens_per_batch=budget) == pytest.approx(expected, abs=FLOAT64_NATS)


def test_no_batch_is_larger_than_the_memory_knob_and_the_largest_comes_first(policy: MeanPolicy) -> None:
    run(policy, TEXTS * 20, tokens_per_batch=50)
    assert max(policy.areas) <= 50
    assert policy.areas[0] == 48    # three rows of 16: one more would be 64


def test_what_is_padding_is_marked_as_padding(policy: MeanPolicy) -> None:
    run(policy, ["hello", "hi"])
    (batch,) = policy.batches
    assert batch.document_BT.tolist() == [[0, 0, 0, 0], [0, -1, -1, -1]]
    assert batch.position_BT.tolist() == [[0, 1, 2, 3], [0, 0, 0, 0]]
    assert batch.sequence_BT.tolist() == [[0, 0, 0, 0], [1, -1, -1, -1]]
    assert batch.weights_BT.tolist() == [[1, 1, 1, 1], [1, 0, 0, 0]]
    assert (batch.input_tokens, batch.sequences, batch.place_B.tolist()) == (5, 2, [0, 1])


def test_the_figures_follow_from_the_sums(policy: MeanPolicy) -> None:
    nats = [value for text in TEXTS for value in by_hand(policy, text)]
    size = sum(len(text.encode()) for text in TEXTS)
    found = run(policy, TEXTS)
    loss = math.fsum(nats) / len(nats)
    assert found == pytest.approx({
        "loss": loss, "perplexity": math.exp(loss), "bits_per_byte": math.fsum(nats) / math.log(2) / size,
        "tokens": len(nats), "bytes": size, "documents": len(TEXTS),
    }, rel=FLOAT64_NATS)


def test_bits_per_byte_counts_utf8_bytes_not_characters() -> None:
    # Two characters, six bytes, 12 bits in all.
    found = figures(12 * math.log(2), tokens=1, bytes=len("\u4f60\u597d".encode()))
    assert found["bits_per_byte"] == pytest.approx(2.0)


def test_a_uniform_policy_has_the_perplexity_of_its_vocabulary(policy: MeanPolicy) -> None:
    policy.head.data.zero_()
    found = run(policy, TEXTS)
    assert found["perplexity"] == pytest.approx(256.0)
    # A byte a token: 8 bits for each byte but the first of every document, which is not predicted.
    assert found["bits_per_byte"] == pytest.approx(8.0 * found["tokens"] / found["bytes"])


def test_the_loss_is_no_mean_of_document_means(policy: MeanPolicy) -> None:
    mean_of_a, mean_of_b = (float(np.mean(by_hand(policy, text))) for text in ("zz", "the quick brown"))
    # 1 and 14 predicted tokens.
    assert mean_of_a != pytest.approx(mean_of_b, rel=0.1)
    assert run(policy, ["zz", "the quick brown"])["loss"] == pytest.approx((mean_of_a + 14 * mean_of_b) / 15)


def test_more_documents_than_are_sorted_together_come_back_in_their_order(policy: MeanPolicy) -> None:
    texts = [f"{number} " * (1 + number % 3) for number in range(DOCUMENTS_AT_ONCE + 9)]
    found = [bytes(score.ids).decode() for score in Perplexity().scores(policy, Letters(), texts)]
    assert found == texts


def test_documents_are_read_as_they_are_scored_not_all_at_once(policy: MeanPolicy) -> None:
    taken = 0

    def endless() -> Iterator[str]:
        nonlocal taken
        while True:
            taken += 1
            yield "hello"

    next(Perplexity().scores(policy, Letters(), endless()))
    assert taken == DOCUMENTS_AT_ONCE


def test_the_report_adds_up_to_the_bytes_of_all_text(policy: MeanPolicy) -> None:
    told: list[int] = []
    Perplexity(path="texts").run(policy, Letters(), lambda path: TEXTS, told.append)
    assert sum(told) == sum(len(text.encode()) for text in TEXTS)


@pytest.mark.parametrize("training", [True, False])
def test_the_policy_is_left_in_the_mode_it_was_found_in(policy: MeanPolicy, training: bool) -> None:
    policy.train(training)
    run(policy, TEXTS)
    assert policy.training is training


def test_the_policy_is_left_in_its_mode_when_it_fails(
    policy: MeanPolicy, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(batch: Batch, wants: tuple[str, ...]) -> Outputs:
        raise RuntimeError("out of memory")

    policy.train()
    monkeypatch.setattr(policy, "forward", broken)
    with pytest.raises(RuntimeError):
        run(policy, TEXTS)
    assert policy.training


def test_what_a_module_caches_while_measured_can_be_trained_through_afterwards() -> None:
    class Caching(MeanPolicy):
        cached: Tensor | None = None

        def forward(self, batch: Batch, wants: tuple[str, ...]) -> Outputs:
            self.cached = torch.ones(8, dtype=torch.float64)
            return super().forward(batch, wants)

    policy = Caching()
    run(policy, TEXTS)
    assert policy.cached is not None
    (policy.embedding * policy.cached).sum().backward()    # an inference tensor would refuse


def test_a_window_above_the_context_is_refused(policy: MeanPolicy) -> None:
    with pytest.raises(UserError, match="max_length=17 is more than the model's context of 16"):
        run(policy, TEXTS, max_length=17)


def test_a_memory_knob_that_holds_no_window_is_refused(policy: MeanPolicy) -> None:
    with pytest.raises(UserError, match="tokens_per_batch=15 does not hold one window of 16"):
        run(policy, TEXTS, tokens_per_batch=15)
    run(policy, TEXTS, tokens_per_batch=15, max_length=15)


@pytest.mark.parametrize("texts", [[], [""], ["a", "b"]], ids=str)
def test_data_without_a_token_to_predict_is_refused_by_name(policy: MeanPolicy, texts: list[str]) -> None:
    with pytest.raises(UserError, match="no token to predict") as caught:
        run(policy, texts)
    assert caught.value.where == f"texts: {len(texts)} documents"


def test_a_suite_without_a_path_is_refused(policy: MeanPolicy) -> None:
    with pytest.raises(UserError, match="nothing to read"):
        Perplexity().run(policy, Letters(), lambda path: TEXTS)


def test_perplexity_of_an_absurd_loss_is_infinite_not_a_crash() -> None:
    assert figures(nats=800.0, tokens=1, bytes=1)["perplexity"] == math.inf


@given(positions=st.integers(0, 200), length=st.integers(2, 40))
@settings(max_examples=200, deadline=None)
def test_windows_count_each_position_once_with_half_a_window_before_it(positions: int, length: int) -> None:
    found = windows(0, positions, length)
    assert [place for row in found for place in range(row.first, row.stop)] == list(range(positions))
    assert all(row.start <= row.first < row.stop <= row.start + length for row in found)
    assert all(row.start == number * (length // 2) for number, row in enumerate(found))
    assert all(row.first - row.start >= length // 2 for row in found[1:])


def test_a_suite_in_a_recipe_is_a_perplexity_unless_it_says_otherwise() -> None:
    class Holder(Config):
        suites: tuple[Suite, ...] = ()

    (suite,) = Holder.model_validate({"suites": [{"path": "held.txt", "name": "held"}]}).suites
    assert isinstance(suite, Perplexity)
    assert (suite.path, suite.title) == ("held.txt", "held")
    assert Perplexity().title == "perplexity"


def test_totals_of_two_halves_are_the_totals_of_the_whole(policy: MeanPolicy) -> None:
    total = Totals()
    for half in (TEXTS[:3], TEXTS[3:]):
        for score in Perplexity().scores(policy, Letters(), half):
            total.add(score)
    assert total.figures("texts") == pytest.approx(run(policy, TEXTS), abs=FLOAT64_NATS)
