"""Ordinal regression: probabilities of classes by hand, and cut points that stay in their order."""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from dataclasses import replace

import pytest
import torch

from llmtrainer.base.errors import UserError
from llmtrainer.core.batch import HIGH, LOW, Outputs
from llmtrainer.core.objective import Objective, count, loss_of
from llmtrainer.models.heads.ordinal import Ordinal as OrdinalHead
from llmtrainer.models.scalar import ScalarHead
from llmtrainer.objectives.ordinal import Ordinal, classes_of, log_probability
from tests.objectives.comparisons import Sides, per_unit
from tests.worlds import row_batch

CUTS = [-1.5, -0.5, 0.5, 1.5]
INFINITE = [-math.inf, *CUTS, math.inf]


def sigmoid(x: float) -> float:
    return 1 / (1 + math.exp(-x)) if x > -700 else 0.0


def graded(scores: Sequence[float], intervals: Sequence[tuple[int, int]], cuts: Sequence[float] = CUTS) -> Sides:
    low, high = (torch.tensor(ends) for ends in zip(*intervals, strict=True))
    batch = replace(row_batch([[1, 2, 3]] * len(scores)), signals={LOW: low, HIGH: high})
    return Outputs(
        score_S=torch.tensor(scores, dtype=torch.float64), cut_points_K=torch.tensor(cuts, dtype=torch.float64)
    ), batch


def test_class_probabilities_loss_and_prediction_of_the_worked_example() -> None:
    """K = 5, cut points -1.5 .. 1.5, s = 0.2: sigmoid(-1.7), (-0.7), (0.3), (1.3) are the sums up to each class."""
    sums = [0.0, 0.1544653, 0.3318122, 0.5744425, 0.7858350, 1.0]
    right = [after - before for before, after in itertools.pairwise(sums)]
    out, _ = graded([0.2] * 5, [(0, 1)] * 5)
    assert out.score_S is not None and out.cut_points_K is not None
    k = torch.arange(5)
    found = log_probability(out.score_S, out.cut_points_K, k, k + 1).exp()
    assert found.tolist() == pytest.approx(right, abs=1e-7) and float(found.sum()) == pytest.approx(1.0, abs=1e-12)
    told = per_unit(Ordinal(), graded([0.2], [(2, 3)]))
    assert told["loss/ordinal"] == pytest.approx(-math.log(0.2426303), abs=1e-6)
    assert classes_of(out.score_S, out.cut_points_K).tolist() == [2] * 5 and told["ordinal/accuracy"] == 1.0


def test_the_loss_is_minus_log_of_a_difference_of_sigmoids_with_infinite_ends() -> None:
    scores = [0.2, -3.0, 1.7, 0.0, 2.5, -0.5]
    intervals = [(0, 2), (1, 4), (3, 5), (0, 5), (4, 5), (2, 3)]
    right = [
        -math.log(sigmoid(INFINITE[high] - s) - sigmoid(INFINITE[low] - s))
        for s, (low, high) in zip(scores, intervals, strict=True)
    ]
    told = per_unit(Ordinal(), graded(scores, intervals))
    assert told["loss/ordinal"] == pytest.approx(sum(right) / len(right), abs=1e-12)


def test_a_prediction_is_right_inside_its_interval_and_a_score_on_a_cut_point_lies_above_it() -> None:
    told = per_unit(Ordinal(), graded([-0.5, 0.2, 9.0, 9.0], [(2, 3), (1, 3), (0, 2), (3, 4)]))
    # Classes 2, 2, 4, 4: inside, inside, 3 classes too high, 1 too high.
    assert told["ordinal/accuracy"] == 0.5 and told["ordinal/distance"] == (0 + 0 + 3 + 1) / 4


def test_a_score_far_from_its_class_has_a_finite_loss_and_a_gradient_that_leads_back() -> None:
    out, batch = graded([60.0, -60.0, 800.0], [(0, 1), (2, 3), (1, 2)])
    assert out.score_S is not None
    score_S = out.score_S.requires_grad_()
    (term, *_) = Ordinal().terms(out, batch)
    (slope,) = torch.autograd.grad(term.total, score_S)
    assert math.isfinite(float(term.total.detach())) and slope.tolist() == pytest.approx([1.0, -1.0, 1.0])


def test_cut_points_stay_ordered_after_100_steps_that_would_cross_them() -> None:
    """Grades of classes 1 and 2 alone, at scores that lie the other way round: the cut between them is pushed past
    its neighbours."""
    head = ScalarHead(2, 4, master=torch.float64)
    head.initialise(0, OrdinalHead(classes=5))
    optimizer = torch.optim.SGD(head.parameters(), lr=1.0)
    states_ND = torch.randn(16, 2, generator=torch.Generator().manual_seed(1), dtype=torch.float64) * 3
    batch = replace(row_batch([[1, 2]] * 16), signals={
        LOW: torch.tensor([3, 1] * 8), HIGH: torch.tensor([4, 2] * 8)
    })  # fmt: skip
    losses = []
    for _ in range(100):
        terms = Ordinal().terms(Outputs(score_S=head(states_ND), cut_points_K=head.cut_points_K), batch)
        loss = loss_of(terms, count([batch]))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(float(loss.detach()))
        assert head.cut_points_K is not None and bool((head.cut_points_K.diff() > 0).all())
    assert losses[-1] < losses[0] - 0.1


@pytest.mark.parametrize("interval", [(-1, 2), (3, 6), (2, 2)])
def test_a_grade_that_the_model_has_no_class_for_is_refused(interval: tuple[int, int]) -> None:
    with pytest.raises(UserError, match="the model has 0 to 4"):
        Ordinal().terms(*graded([0.0], [interval]))


def test_it_asks_for_scores_and_cut_points() -> None:
    objective = Objective.model_validate({"kind": "ordinal"})
    assert objective.wants == ("score", "cut_points") and objective.reads == (LOW, HIGH)
