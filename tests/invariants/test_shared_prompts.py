"""Answers that share their prompt in a row are read as each is alone, by every path; and cannot see each other."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor

from llmtrainer.core.batch import GROUP, ROW, Batch
from llmtrainer.data.branches import AnswerRows, collate_comparisons
from llmtrainer.data.comparison_source import ComparisonSource
from llmtrainer.data.packed import Store
from llmtrainer.models.decoder import Decoder
from tests.data.compared import compared_store, random_comparisons
from tests.tolerances import FLOAT64_GRADIENT_RELATIVE, SHARED_PROMPT_FLOAT32
from tests.worlds import row_batch, tiny_model

# Prompts of one token, of a few and beyond a block of queries; answers that cross its border; four answers; one alone.
SIZES = [(5, 3, 7), (1, 4, 2), (140, 30, 9), (2, 1, 1), (90, 50, 60), (12, 6, 5, 4, 3), (8, 9)]
PATHS = ["blocks", "sdpa", "reference"]
TOLERANCE = {torch.float64: FLOAT64_GRADIENT_RELATIVE, torch.float32: SHARED_PROMPT_FLOAT32}


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> Store:
    return compared_store(tmp_path_factory.mktemp("data") / "store", random_comparisons(SIZES))


def source(store: Store, share: bool, budget: int = 2000) -> ComparisonSource:
    return ComparisonSource(
        store, pairs_per_step=len(SIZES), tokens_per_batch=budget, seed=1, share_prompt=share, prefetch=False
    )


def apart(store: Store, row: int) -> Batch:
    """A prompt and one answer alone in a row, as they have always been read."""
    weights = store.weights(row)
    assert weights is not None
    batch = row_batch([store.read(row).tolist()])
    counts = torch.zeros_like(batch.weights_BT)
    counts[0] = torch.tensor(weights[1:])
    return Batch(**{**{name: getattr(batch, name) for name in batch.__dataclass_fields__}, "weights_BT": counts})


def learned(policy: Decoder, batches: list[Batch], rows: list[list[int]]) -> tuple[dict[int, Tensor], Tensor]:
    """Of each row of the store the log-probability of its answer, and the gradient of a sum that weighs each row
    otherwise, so that what is swapped between two shows."""
    policy.zero_grad()
    found: dict[int, Tensor] = {}
    for batch, numbers in zip(batches, rows, strict=True):
        logp_BT = policy(batch, ("logp",)).logp_BT
        logp_S = batch.sum_by_sequence(logp_BT)
        factors_S = torch.tensor([1.0 + number % 5 for number in numbers], dtype=logp_S.dtype)
        (logp_S * factors_S).sum().backward()
        found |= dict(zip(numbers, logp_S.detach(), strict=True))
    return found, torch.cat([item.grad.flatten() for item in policy.parameters() if item.grad is not None])


@pytest.mark.parametrize("window", [None, 24], ids=["whole", "window"])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
@pytest.mark.parametrize("path", PATHS)
def test_shared_prompts_give_each_answer_the_log_probability_and_gradient_of_a_row_of_its_own(
    store: Store, path: str, dtype: torch.dtype, window: int | None
) -> None:
    policy = tiny_model(dtype, sliding_window=window, context_length=256)
    policy.path = path
    alone, gradient = learned(
        policy, [apart(store, row) for row in range(store.documents)], [[row] for row in range(store.documents)]
    )
    for share in (True, False):
        batches = source(store, share, budget=330).batches(0)
        assert len(batches) > 1
        found, packed = learned(policy, batches, [batch.signals[ROW].tolist() for batch in batches])
        assert found.keys() == alone.keys()
        for row, logp in found.items():
            assert abs(float(logp - alone[row])) <= TOLERANCE[dtype] * max(1.0, abs(float(alone[row]))), row
        assert float((packed - gradient).abs().max()) <= TOLERANCE[dtype] * float(gradient.abs().max())


@pytest.mark.parametrize("changed", [0, 1])
@pytest.mark.parametrize("window", [None, 24], ids=["whole", "window"])
@pytest.mark.parametrize("path", PATHS)
def test_another_answer_leaves_the_bits_of_the_one_beside_it_as_they_are(
    path: str, window: int | None, changed: int
) -> None:
    policy = tiny_model(torch.float32, sliding_window=window, context_length=256)
    policy.path = path
    ((prompt, answers),) = random_comparisons([(70, 20, 90)])

    def read(given: list[list[int]]) -> Tensor:
        rows = tuple(torch.tensor([*prompt, *answer]).numpy() for answer in given)
        weights = tuple(torch.cat([torch.zeros(70), torch.ones(len(answer))]).numpy() for answer in given)
        batch = collate_comparisons([AnswerRows(rows, weights, 70, 0, 0)], share=True, liked=False, margin=False)
        with torch.no_grad():
            logp_BT = policy(batch, ("logp",)).logp_BT
        return torch.stack([(logp_BT * (batch.sequence_BT == number)).flatten() for number in (0, 1)])

    other = list(answers)
    other[changed] = [(token + 7) % 320 for token in answers[changed]]
    before, after = read(answers), read(other)
    assert torch.equal(before[1 - changed], after[1 - changed])
    assert not torch.equal(before[changed], after[changed])


def test_a_pair_takes_prompt_and_answers_once_and_one_token_more() -> None:
    def tokens(share: bool, prompt: int, *answers: int) -> int:
        (one,) = random_comparisons([(prompt, *answers)])
        rows = tuple(torch.tensor([*one[0], *answer]).numpy() for answer in one[1])
        weights = tuple(torch.cat([torch.zeros(prompt), torch.ones(n)]).numpy() for n in answers)
        item = AnswerRows(rows, weights, prompt, 0, 0)
        return collate_comparisons([item], share=share, liked=False, margin=False).input_tokens

    assert tokens(True, 30, 8, 5) == 30 + 8 + 5 + 1
    assert tokens(False, 30, 8, 5) == 2 * 30 + 8 + 5
    assert tokens(True, 30, 8, 5, 4) == 30 + 8 + 5 + 4 + 2


def test_a_shared_row_is_the_prompt_then_its_last_token_before_every_answer(tmp_path: Path) -> None:
    store = compared_store(tmp_path / "store", [([5, 6, 7], [[11, 12], [13]])])
    (batch,) = ComparisonSource(
        store, pairs_per_step=1, tokens_per_batch=100, seed=0, prefetch=False
    ).batches(0)  # fmt: skip
    assert batch.tokens_BT.tolist() == [[5, 6, 7, 11, 12, 7, 13]]
    assert batch.targets_BT.tolist()[0][2:4] == [11, 12] and batch.targets_BT.tolist()[0][5] == 13
    assert batch.weights_BT.tolist() == [[0, 0, 1, 1, 0, 1, 0]]
    assert batch.position_BT.tolist() == [[0, 1, 2, 3, 4, 2, 3]]
    assert batch.sequence_BT.tolist() == [[-1, -1, 0, 0, 0, 1, 1]]
    assert batch.document_BT.tolist() == [[0] * 7]
    assert batch.place_BT is not None and batch.place_BT.tolist() == [[0, 0, 0, 0, 0, 1, 1]]
    assert batch.signals[GROUP].tolist() == [0, 0] and batch.signals[ROW].tolist() == [0, 1]
