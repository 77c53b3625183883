"""Loss and gradients do not depend on how a step is cut into micro-batches."""

from __future__ import annotations

import random
from collections.abc import Sequence

import pytest
import torch
from torch import Tensor

from llmtrainer.core.batch import Batch
from llmtrainer.core.objective import Objective, Term, count, loss_of
from llmtrainer.models.decoder import Decoder
from tests.tolerances import FLOAT64_GRADIENT_RELATIVE
from tests.worlds import ragged_documents, row_batch, tiny_model

# Uneven on purpose, and 1 among them: with equal rows the mean of means is the mean, and nothing is proved.
LENGTHS = [5, 19, 3, 1, 28, 2, 16, 4, 11, 30, 7, 1, 23, 9]
SPLITS = 200


def cut(draw: random.Random, rows: int) -> list[int]:
    """Sizes of micro-batches that add up to `rows`, any of them, the last one often shorter."""
    sizes = []
    while sum(sizes) < rows:
        sizes.append(min(draw.randint(1, rows), rows - sum(sizes)))
    return sizes


def batches_of(documents: Sequence[Sequence[int]], weights: Sequence[float], sizes: Sequence[int]) -> list[Batch]:
    batches, first = [], 0
    for size in sizes:
        rows = slice(first, first + size)
        batches.append(row_batch(documents[rows], weights[rows], first))
        first += size
    return batches


def gradient(policy: Decoder, objective: Objective, batches: list[Batch]) -> tuple[Tensor, Tensor]:
    """Loss and the gradients of all parameters as one vector."""
    policy.zero_grad()
    counts, total = count(batches), torch.zeros((), dtype=torch.float64)
    for batch in batches:
        terms = objective.terms(policy(batch, objective.wants), batch)
        share = loss_of(terms, counts)
        share.backward()
        total += share.detach()
    return total, torch.cat([p.grad.flatten() for p in policy.parameters() if p.grad is not None])


def relative(a: Tensor, b: Tensor) -> float:
    return float((a - b).norm() / b.norm())


# Of the others tests/conformance/test_objectives.py says the same, on batches that hold what they read.
OBJECTIVES = [
    {"kind": "causal_lm"},
    {"kind": "causal_lm", "label_smoothing": 0.2, "z_loss": 1e-2},
]


@pytest.mark.parametrize("settings", OBJECTIVES, ids=lambda settings: "+".join(settings))
def test_gradients_of_200_random_ragged_splits_are_equal(settings: dict[str, object]) -> None:
    objective = Objective.model_validate(settings)
    # Dropout is on: its masks follow the row's place in the step, so they must not depend on the cut either.
    policy = tiny_model(torch.float64, dropout=0.1)
    draw = random.Random(44)
    documents = ragged_documents(LENGTHS)
    weights = [draw.choice([0.5, 1.0, 2.0]) for _ in documents]
    loss, whole = gradient(policy, objective, batches_of(documents, weights, [len(documents)]))
    for _ in range(SPLITS):
        sizes = cut(draw, len(documents))
        cut_loss, cut_gradient = gradient(policy, objective, batches_of(documents, weights, sizes))
        assert relative(cut_gradient, whole) <= FLOAT64_GRADIENT_RELATIVE, sizes
        assert abs(float(cut_loss - loss)) <= FLOAT64_GRADIENT_RELATIVE * float(loss), sizes


def test_a_mean_inside_a_micro_batch_would_be_found() -> None:
    """The control: with the usual mean of means, the same comparison fails by far more than rounding."""
    objective = Objective.model_validate({"kind": "causal_lm"})
    policy, documents = tiny_model(torch.float64), ragged_documents(LENGTHS)
    weights = [1.0] * len(documents)
    _, whole = gradient(policy, objective, batches_of(documents, weights, [len(documents)]))
    policy.zero_grad()
    for batch in batches_of(documents, weights, [7, 7]):
        (term,) = objective.terms(policy(batch, objective.wants), batch)
        (term.total / count([batch])["tokens"] / 2).backward()
    wrong = torch.cat([p.grad.flatten() for p in policy.parameters() if p.grad is not None])
    assert relative(wrong, whole) > 1e-3


def test_the_hand_worked_loss_of_two_uneven_rows() -> None:
    """Rows of 1 and 3 targets with losses 2 and 5, 5, 5: the loss is 17 / 4, not the mean of means 7 / 2."""
    batches = [row_batch([[1, 2]]), row_batch([[1, 2, 3, 4]])]
    totals = (torch.tensor(2.0), torch.tensor(15.0))
    counts = count(batches)
    loss = sum(float(loss_of([Term("loss/lm", total, "tokens")], counts)) for total in totals)
    assert counts["tokens"] == 4.0 and loss == 17 / 4


def test_tokens_of_weight_zero_have_no_influence_on_the_gradient() -> None:
    objective = Objective.model_validate({"kind": "causal_lm"})
    policy, documents = tiny_model(torch.float64), ragged_documents([6, 9])
    changed = [documents[0], [*documents[1][:-1], (documents[1][-1] + 1) % 256]]
    gradients = [gradient(policy, objective, [row_batch(rows, [1.0, 0.0])])[1] for rows in (documents, changed)]
    assert torch.equal(*gradients)


def test_dropout_masks_follow_the_place_in_the_step_and_not_the_batch() -> None:
    policy, documents = tiny_model(torch.float64, dropout=0.3), ragged_documents([12, 12])
    together = policy(row_batch(documents), ("logp",)).logp_BT
    apart = [policy(row_batch([document], first=place), ("logp",)).logp_BT for place, document in enumerate(documents)]
    assert torch.allclose(together, torch.cat(apart), atol=1e-12, rtol=0)
    elsewhere = policy(row_batch(documents[:1], first=5), ("logp",)).logp_BT
    assert not torch.allclose(elsewhere, apart[0], atol=1e-3)
