"""Packed sequences learn what padded ones and single ones learn, and cannot see each other."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from llmtrainer.core.batch import Batch
from llmtrainer.core.objective import Objective, count, loss_of
from llmtrainer.data.budget_source import BudgetSource
from llmtrainer.data.collate import Row, collate
from llmtrainer.data.packed import Store
from llmtrainer.models import paths
from llmtrainer.models.decoder import Decoder
from tests.data.worlds import make_store
from tests.tolerances import FLOAT32_GRADIENT, FLOAT32_LOSS, FLOAT64_GRADIENT_RELATIVE
from tests.worlds import VOCABULARY, tiny_model

# Of one token to read and of more than a block of queries, and sums that cross its border.
LENGTHS = [60, 2, 19, 140, 2, 33, 97, 5, 128, 12]
HERE = paths.that_can_run(torch.device("cpu"), torch.float64)
OBJECTIVE = Objective.model_validate({"kind": "causal_lm", "label_smoothing": 0.1, "z_loss": 1e-2})


def weights_of(document: Sequence[int]) -> list[float]:
    """A prompt of a third that does not count, an answer that does, and some tokens twice."""
    prompt = len(document) // 3
    return [0.0 if place < prompt else 2.0 if token % 5 == 0 else 1.0 for place, token in enumerate(document)]


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> Store:
    random = np.random.default_rng(3)
    documents = [random.integers(0, VOCABULARY, length).tolist() for length in LENGTHS]
    path = tmp_path_factory.mktemp("data") / "store"
    return make_store(path, documents, weights=[weights_of(document) for document in documents])


def step_of(store: Store, budget: int, ranks: int = 1) -> list[Batch]:
    """The micro-batches of all ranks of step 0, which draws each sequence once."""
    found = []
    for rank in range(ranks):
        source = BudgetSource(
            store, sequence_length=140, sequences_per_step=len(LENGTHS), tokens_per_batch=budget, seed=1, rank=rank,
            world_size=ranks, prefetch=False,
        )  # fmt: skip
        found += source.batches(0)
    return [replace(batch, dropout_key=11) for batch in found]


def padded(store: Store, cuts: Sequence[int]) -> list[Batch]:
    """The same sequences at the same places, one a row, padded: what a trainer without packing reads."""
    source = BudgetSource(
        store, sequence_length=140, sequences_per_step=len(LENGTHS), tokens_per_batch=140, seed=1, prefetch=False
    )
    rows = []
    for place in range(len(LENGTHS)):
        row = source.row(0, place)
        tokens, weights = np.array(row["tokens"]), np.array(row["weights"], dtype=np.float32)
        rows.append(Row(tokens, np.zeros(len(tokens), dtype=np.int32), place, weights))
    edges = np.cumsum([0, *cuts])
    return [
        replace(collate(rows[start:stop]), dropout_key=11)
        for start, stop in itertools.pairwise(edges)
    ]


def learned(policy: Decoder, batches: list[Batch]) -> tuple[Tensor, Tensor]:
    """Loss of a step and all gradients as one vector."""
    policy.zero_grad()
    counts, total = count(batches), torch.zeros((), dtype=torch.float64)
    for batch in batches:
        share = loss_of(OBJECTIVE.terms(policy(batch, OBJECTIVE.wants), batch), counts)
        share.backward()
        total += share.detach()
    return total, torch.cat([p.grad.flatten() for p in policy.parameters() if p.grad is not None])


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
@pytest.mark.parametrize("path", HERE)
def test_packed_padded_and_one_by_one_have_the_same_loss_and_gradients(
    store: Store, path: str, dtype: torch.dtype
) -> None:
    # Dropout is on: the mask of a token must not depend on who shares its row either.
    policy = tiny_model(dtype, dropout=0.1, context_length=160)
    policy.path = path
    single = padded(store, [1] * len(LENGTHS))
    loss, gradient = learned(policy, single)
    cuts = {
        "padded": padded(store, [len(LENGTHS)]), "padded in two": padded(store, [3, 7]),
        "one row": step_of(store, 1000), "in rows of 200": step_of(store, 200),
        "on three ranks": step_of(store, 140, 3),
    }  # fmt: skip
    assert len(cuts["one row"]) == 1 and len(cuts["in rows of 200"]) == 3
    exact = dtype == torch.float64
    for name, batches in cuts.items():
        assert count(batches)["tokens"] == count(single)["tokens"] > 0, name
        found, found_gradient = learned(policy, batches)
        away = float((found_gradient - gradient).norm() / gradient.norm())
        assert away <= (FLOAT64_GRADIENT_RELATIVE if exact else FLOAT32_GRADIENT), name
        assert abs(float(found / loss) - 1) <= (FLOAT64_GRADIENT_RELATIVE if exact else FLOAT32_LOSS), name


def test_packed_batches_hold_no_padding_at_all(store: Store) -> None:
    read = sum(length - 1 for length in LENGTHS)
    for budget in (140, 200, 1000):
        batches = step_of(store, budget)
        assert sum(batch.tokens_BT.numel() for batch in batches) == read
        assert sum(batch.input_tokens for batch in batches) == read


@pytest.mark.parametrize("path", HERE)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_who_shares_a_row_is_neither_seen_nor_learned_from(store: Store, path: str, dtype: torch.dtype) -> None:
    policy = tiny_model(dtype, dropout=0.1, context_length=160)
    policy.path = path
    (batch,) = step_of(store, 1000)
    for number in (0, 4, len(LENGTHS) - 1):
        mine = batch.document_BT == number
        other = replace(batch, tokens_BT=torch.where(mine, (batch.tokens_BT + 1) % VOCABULARY, batch.tokens_BT))
        results = []
        for read in (batch, other):
            policy.zero_grad()
            out = policy(read, ("logp",)).logp_BT
            (out * ~mine).sum().backward()
            gradients = {name: p.grad.clone() for name, p in policy.named_parameters() if "embed" not in name}
            results.append((out.detach(), gradients))
        (first, first_gradients), (second, second_gradients) = results
        assert torch.equal(first[~mine], second[~mine])
        assert number == 4 or not torch.equal(first[mine], second[mine])
        for name, gradient in first_gradients.items():
            assert torch.equal(gradient, second_gradients[name]), name


@pytest.mark.parametrize("ranks", [2, 4, 16])
def test_filler_of_a_rank_without_sequences_changes_nothing(store: Store, ranks: int) -> None:
    policy = tiny_model(torch.float64)
    loss, gradient = learned(policy, step_of(store, 1000))
    batches = step_of(store, 1000, ranks)
    assert any(batch.input_tokens == 0 for batch in batches) == (ranks == 16)
    found, found_gradient = learned(policy, batches)
    assert float((found_gradient - gradient).norm() / gradient.norm()) <= FLOAT64_GRADIENT_RELATIVE
    assert abs(float(found / loss) - 1) <= FLOAT64_GRADIENT_RELATIVE


def test_a_critical_token_counts_by_its_weight_in_the_store(tmp_path: Path) -> None:
    """Two targets with logits 1, 2, 0 each, labels 1 and 0; label 0 counts twice. By hand: with L = log(e + e^2 + 1),
    (L - 2 + 2 (L - 1)) / 3."""

    store = make_store(tmp_path / "store", [[2, 1, 0]], weights=[[1.0, 1.0, 2.0]])
    source = BudgetSource(
        store, sequence_length=4, sequences_per_step=1, tokens_per_batch=4, seed=0, prefetch=False
    )
    (batch,) = source.batches(0)
    partition = float(np.log(np.exp([1.0, 2.0, 0.0]).sum()))
    logp_BT = torch.tensor([[2.0 - partition, 1.0 - partition]])
    total = -(logp_BT * batch.weights_BT).sum() / count([batch])["tokens"]
    assert float(total) == pytest.approx((partition - 2 + 2 * (partition - 1)) / 3, abs=1e-6)
    assert float(total) == pytest.approx(1.0742726, abs=1e-6)
