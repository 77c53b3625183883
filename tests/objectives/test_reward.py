"""The losses of reward models, by hand."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace

import pytest
import torch

from llmtrainer.base.errors import UserError
from llmtrainer.core.batch import MARGIN, Outputs
from llmtrainer.core.objective import Objective
from llmtrainer.objectives.reward import BradleyTerry
from tests.objectives.comparisons import Sides, answers, grouped, per_unit
from tests.worlds import row_batch

LOSS_OF_1, LOSS_OF_2, LOSS_OF_MINUS_HALF = 0.3132617, 0.1269280, 0.9740770
"""-log sigmoid of 1, 2 and -0.5."""


def scored(*scores: float) -> Sides:
    """One sequence for each score, better and worse in turn."""
    out = Outputs(score_S=torch.tensor(scores, dtype=torch.float64, requires_grad=True))
    return out, row_batch([[1, 2, 3]] * len(scores))


def softplus(x: float) -> float:
    return math.log1p(math.exp(x))


def test_the_loss_is_the_mean_of_minus_log_sigmoid_of_the_gaps() -> None:
    told = per_unit(BradleyTerry(), scored(2.0, 1.0, 0.25, 0.75))
    assert told["loss/reward"] == pytest.approx((LOSS_OF_1 + LOSS_OF_MINUS_HALF) / 2, abs=1e-7)
    assert told["preference/accuracy"] == 0.5 and told["preference/margin"] == pytest.approx(0.25)
    assert told["reward/chosen"] == pytest.approx(1.125) and told["reward/rejected"] == pytest.approx(0.875)


def test_of_a_ranked_list_every_two_answers_are_a_pair() -> None:
    told = per_unit(BradleyTerry(), grouped(scored(2.0, 1.0, 0.0), [3]))
    assert told["loss/reward"] == pytest.approx((2 * LOSS_OF_1 + LOSS_OF_2) / 3, abs=1e-7)
    mixed = per_unit(BradleyTerry(), grouped(scored(2.0, 1.0, 0.0, 0.0, 0.5), [3, 2]))
    assert mixed["loss/reward"] == pytest.approx((2 * LOSS_OF_1 + LOSS_OF_2 + LOSS_OF_MINUS_HALF) / 4, abs=1e-7)
    assert mixed["preference/accuracy"] == 0.75


def test_beta_multiplies_the_gap_and_gamma_is_what_it_must_exceed() -> None:
    told = per_unit(BradleyTerry(beta=2.0, gamma=0.5), scored(2.0, 1.25))
    assert told["loss/reward"] == pytest.approx(softplus(-(2.0 * 0.75 - 0.5)), abs=1e-12)
    assert told["preference/margin"] == pytest.approx(0.75)    # what is told of the scores is before both


def test_each_pair_leads_by_the_margin_of_its_record() -> None:
    out, batch = scored(2.0, 1.0, 0.25, 0.75)
    batch = replace(batch, signals={MARGIN: torch.tensor([0.5, 0.5, 0.0, 0.0])})
    told = per_unit(BradleyTerry(margin=True), (out, batch))
    assert told["loss/reward"] == pytest.approx((softplus(-0.5) + LOSS_OF_MINUS_HALF) / 2, abs=1e-7)
    assert BradleyTerry(margin=True).reads == (MARGIN,) and BradleyTerry().reads == ()
    with pytest.raises(UserError, match="a prompt here has 4"):
        BradleyTerry(margin=True).terms(*grouped((out, batch), [4]))


def test_centring_punishes_the_square_of_the_sum_of_both_scores() -> None:
    plain, centred = (per_unit(BradleyTerry(centre=c), scored(2.0, 1.0, -1.0, -2.0)) for c in (0.0, 0.01))
    assert "loss/centre" not in plain and centred["loss/centre"] == pytest.approx(9.0)
    (term,) = [t for t in BradleyTerry(centre=0.01).terms(*scored(2.0, 1.0)) if t.name == "loss/centre"]
    assert term.coef == 0.01


def test_swapping_the_answers_of_a_pair_negates_its_gap() -> None:
    both = scored(2.0, 1.0, 0.25, 0.75), scored(1.0, 2.0, 0.75, 0.25)
    gaps = [BradleyTerry().spread(*sides)["gap"] for sides in both]
    assert gaps[0].tolist() == [1.0, -0.5] and torch.equal(gaps[0], -gaps[1])
    accuracy = [per_unit(BradleyTerry(), scored(*pair))["preference/accuracy"] for pair in ((2.0, 1.0), (1.0, 2.0))]
    assert accuracy == [1.0, 0.0]


def test_equal_scores_are_no_success_and_cost_log_2() -> None:
    told = per_unit(BradleyTerry(), scored(1.0, 1.0))
    assert told["preference/accuracy"] == 0.0 and told["loss/reward"] == pytest.approx(math.log(2))


def test_gradients_pull_the_two_scores_apart_by_the_doubt_that_is_left() -> None:
    """d -log s(g) / dg = -s(-g)."""
    out, batch = scored(2.0, 1.0)
    assert out.score_S is not None
    (term, *_) = BradleyTerry().terms(out, batch)
    (slope,) = torch.autograd.grad(term.total, out.score_S)
    doubt = 1 / (1 + math.e)
    assert slope.tolist() == pytest.approx([-doubt, doubt])


def test_segments_are_compared_in_pairs_and_the_loss_is_the_mean_over_them() -> None:
    """Two pairs on one prompt, of three and of two tokens each; by hand with sums, with means, and over a reference."""
    def sides(reference: bool) -> Sides:
        logp = [[-1.0, -1.0, -1.0], [-2.0, -1.0, -1.5], [-0.5, -0.5], [-0.25, -0.25]]
        behind = [[-1.5, -1.0, -1.0], [-2.0, -1.0, -1.0], [-1.0, -0.5], [-0.5, -0.25]]
        return grouped(answers(logp, behind if reference else None), [4])

    free = Objective.model_validate({"kind": "segments", "beta": 2.0, "gamma": 0.5, "reference": False})
    first, second = softplus(-(2 * 1.5 - 0.5)), softplus(-(2 * -0.5 - 0.5))
    told = per_unit(free, sides(False))
    assert told["loss/segments"] == pytest.approx((first + second) / 2, abs=1e-12)
    assert told["preference/accuracy"] == 0.5 and told["preference/margin"] == pytest.approx((3.0 - 1.0) / 2)
    means = Objective.model_validate({"kind": "segments", "beta": 2.0, "mean": True, "reference": False})
    told = per_unit(means, sides(False))
    assert told["loss/segments"] == pytest.approx((softplus(-2 * 0.5) + softplus(2 * 0.25)) / 2, abs=1e-12)
    over = Objective.model_validate({"kind": "segments", "beta": 1.0})
    told = per_unit(over, sides(True))
    assert told["loss/segments"] == pytest.approx((softplus(-1.0) + softplus(-0.25)) / 2, abs=1e-12)


def test_two_segment_pairs_on_one_prompt_cost_the_mean_of_the_two_alone() -> None:
    objective = Objective.model_validate({"kind": "segments", "reference": False, "beta": 0.7})
    pairs: Sequence[Sequence[Sequence[float]]] = ([[-1.0, -2.0], [-0.5, -3.0]], [[-0.1], [-4.0]])
    alone = [per_unit(objective, answers(pair))["loss/segments"] for pair in pairs]
    together = per_unit(objective, grouped(answers([*pairs[0], *pairs[1]]), [4]))["loss/segments"]
    assert together == pytest.approx(sum(alone) / 2, abs=1e-12)


def test_a_segment_without_its_pair_is_refused() -> None:
    objective = Objective.model_validate({"kind": "segments", "reference": False})
    with pytest.raises(UserError, match="a prompt has 3 segments"):
        objective.terms(*grouped(answers([[-1.0]] * 4), [3, 1]))
