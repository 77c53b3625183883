"""DPO and its relatives by hand, against their formulas in numpy, and the shapes that their pairs can have."""

from __future__ import annotations

import math
import random
from dataclasses import replace

import numpy as np
import pytest
import torch

from llmtrainer.base.errors import UserError
from llmtrainer.core.batch import GROUP, KL, REFERENCE
from llmtrainer.core.objective import Objective, count, loss_of
from llmtrainer.core.preferences import thinned
from llmtrainer.objectives.dpo import DPO
from tests.objectives.comparisons import answers, grouped, per_unit
from tests.tolerances import FLOAT64_LOGITS


def settings(**fields: object) -> DPO:
    return DPO.model_validate(fields)


def log_s(x: float) -> float:
    return -math.log1p(math.exp(-x))


# z = 1 at beta 0.1: the policy adds 0.7 to the reference's sum of the better answer and takes 0.3 from the worse one.
ONE_PAIR = ([[-1.0, -2.3], [-4.0, -0.3]], [[-1.5, -2.5], [-3.5, -0.5]])


@pytest.mark.parametrize(("fields", "expected"), [
    ({"loss": "sigmoid"}, 0.6443967), ({"loss": "sigmoid", "label_smoothing": 0.1}, 0.6543967),
    ({"loss": "robust", "label_smoothing": 0.1}, 0.6318967), ({"loss": "hinge"}, 0.9), ({"loss": "ipo"}, 16.0),
    # (0.7 - 5)^2 + (-0.3 + 5)^2
    ({"loss": "sppo_hard"}, 40.58),
    ({"loss": "nca_pair"}, -log_s(0.07) - 0.5 * log_s(-0.07) - 0.5 * log_s(0.03)),
    # the points are max(0, -0.3) = 0 for the better and max(0, 0.7) for the worse; two sequences are the pair's mean
    ({"loss": "kto_pair"}, 0.5 * (1 - math.exp(log_s(0.07)) + 1 - math.exp(log_s(0.1 * (0.7 + 0.3))))),
    ({"loss": "apo_zero"}, 1 - math.exp(log_s(0.07)) + math.exp(log_s(-0.03))),
    ({"loss": "apo_down"}, math.exp(log_s(0.07)) + 1 - math.exp(log_s(0.1))),
    ({"loss": "sigmoid", "gamma": 0.1}, math.log(2)),
    # means: 0.7 / 2 + 0.3 / 2
    ({"loss": "ipo", "average": "mean"}, (0.5 - 5.0) ** 2),
    ({"loss": "sigmoid", "average": "mean"}, -log_s(0.05)),
    ({"loss": "sigmoid", "reference_free": True}, -log_s(0.1 * (-3.3 + 4.3))),
    ({"loss": "sigmoid", "divergence": "forward_kl"}, -log_s(0.1 * (math.exp(0.3) - math.exp(-0.7)))),
    ({"loss": "sigmoid", "divergence": "jensen_shannon"}, -log_s(0.1 * (log_s(0.7) - log_s(-0.3)))),
])  # fmt: skip
def test_a_pair_costs_what_its_formula_says(fields: dict[str, object], expected: float) -> None:
    policy, reference = ONE_PAIR
    sides = answers(policy, None if fields.get("reference_free") else reference)
    assert per_unit(settings(**fields), sides)["loss/preference"] == pytest.approx(expected, abs=6e-8)


def test_exo_is_the_divergence_of_two_probabilities() -> None:
    # p = s(0.1) and labels 0.99, 0.01
    p, eps = 1 / (1 + math.exp(-0.1)), 0.01
    expected = p * math.log(p / (1 - eps)) + (1 - p) * math.log((1 - p) / eps)
    found = per_unit(settings(loss="exo_pair", label_smoothing=eps), answers(*ONE_PAIR))
    assert found["loss/preference"] == pytest.approx(expected, abs=FLOAT64_LOGITS)


ALL = ["sigmoid", "robust", "hinge", "ipo", "exo_pair", "sppo_hard", "nca_pair", "apo_zero", "apo_down", "kto_pair"]


@pytest.mark.parametrize("loss", ALL)
def test_the_first_loss_is_known_while_the_policy_is_the_reference(loss: str) -> None:
    known = {"sigmoid": math.log(2), "robust": math.log(2), "hinge": 1.0, "ipo": 25.0, "sppo_hard": 50.0,
             "nca_pair": 2 * math.log(2), "apo_zero": 1.0, "apo_down": 1.0, "kto_pair": 0.5}  # fmt: skip
    objective = settings(loss=loss, label_smoothing=0.2 if loss in ("robust", "exo_pair") else 0.0)
    logp = [[-1.0, -2.0], [-0.1], [-0.7, -0.2, -3.0], [-9.0, -1.0]]
    found = per_unit(objective, answers(logp, logp))
    for name, value in objective.starts_at.items():
        assert found[name] == pytest.approx(value, abs=FLOAT64_LOGITS)
    if loss in known:
        assert objective.starts_at["loss/preference"] == pytest.approx(known[loss], abs=FLOAT64_LOGITS)
    assert settings(reference_free=True).starts_at == {}


def test_the_log_tells_accuracy_margin_rewards_and_log_probabilities_in_means_over_pairs() -> None:
    policy, reference = ONE_PAIR
    # The second pair: rewards 0.1 * -1 and 0.1 * 0.5, so it is the wrong way round.
    found = per_unit(settings(), answers([*policy, [-2.0], [-1.0]], [*reference, [-1.0], [-1.5]]))
    assert found["preference/accuracy"] == 0.5
    assert found["preference/margin"] == pytest.approx((0.1 - 0.15) / 2)
    assert found["reward/chosen"] == pytest.approx((0.07 - 0.1) / 2)
    assert found["reward/rejected"] == pytest.approx((-0.03 + 0.05) / 2)
    assert found["logp/chosen"] == pytest.approx((-3.3 - 2.0) / 2)
    assert found["logp/rejected"] == pytest.approx((-4.3 - 1.0) / 2)


def test_metrics_are_logged_and_never_differentiated() -> None:
    for term in settings(nll_weight=0.5).terms(*answers(*ONE_PAIR)):
        assert (term.coef == 0.0) == (not term.name.startswith("loss/")), term.name
        assert term.total.requires_grad == term.name.startswith("loss/"), term.name


def test_imitation_adds_its_weight_times_the_mean_over_best_answers_of_the_mean_over_tokens() -> None:
    sides = answers([[-1.0, -2.0, -6.0], [-1.0], [-4.0], [-2.0, -2.0]], [[-1.0] * 3, [-1.0], [-1.0], [-1.0] * 2])
    found = per_unit(settings(nll_weight=0.5), sides)
    assert found["loss/nll"] == pytest.approx((3.0 + 4.0) / 2)
    out, batch = sides
    whole = float(loss_of(settings(nll_weight=0.5).terms(out, batch), count([batch])).detach())
    assert whole == pytest.approx(found["loss/preference"] + 0.5 * 3.5)


def test_of_ranked_answers_every_two_are_a_pair_and_the_first_is_the_one_that_is_imitated() -> None:
    rewards = [3.0, 1.0, 2.0, -1.0, 0.5]
    sides = grouped(answers([[value] for value in rewards], [[0.0]] * 5), [3, 2])
    found = per_unit(settings(beta=1.0, nll_weight=1.0), sides)
    gaps = [3.0 - 1.0, 3.0 - 2.0, 1.0 - 2.0, -1.0 - 0.5]
    assert found["loss/preference"] == pytest.approx(np.mean([-log_s(gap) for gap in gaps]))
    assert found["preference/accuracy"] == 0.5
    assert found["loss/nll"] == pytest.approx((3 * -3.0 + 1.0) / 4)


@pytest.mark.parametrize("loss", ["nca_pair", "sppo_hard", "kto_pair"])
def test_a_loss_that_knows_two_answers_refuses_three_by_name(loss: str) -> None:
    with pytest.raises(UserError, match=f"{loss} compares two answers, and a prompt here has 3"):
        settings(loss=loss).terms(*grouped(answers([[-1.0]] * 5, [[-1.0]] * 5), [2, 3]))


def test_settings_that_contradict_each_other_are_refused() -> None:
    with pytest.raises(ValueError, match="no margin between the answers"):
        settings(loss="nca_pair", gamma=0.5)
    with pytest.raises(ValueError, match=r"needs objective\.label_smoothing"):
        settings(loss="exo_pair")


def test_the_points_of_kto_come_from_a_signal_where_there_is_one_and_then_the_step_may_be_cut() -> None:
    out, batch = answers(*ONE_PAIR)
    told = replace(batch, signals={**batch.signals, KL: torch.tensor([0.4, 0.2])})
    found = per_unit(settings(loss="kto_pair"), (out, told))["loss/preference"]
    s = [1 / (1 + math.exp(-x)) for x in (0.1 * (0.7 - 0.4), 0.1 * (0.2 + 0.3))]
    assert found == pytest.approx((1 - s[0] + 1 - s[1]) / 2, abs=1e-7)
    assert settings(loss="kto_pair").whole_steps and not settings().whole_steps


def test_sampo_counts_the_shortest_answers_length_of_tokens_and_the_same_ones_for_the_same_step() -> None:
    draw = random.Random(0)
    lengths = [9, 4, 2, 7, 5, 5]
    rows = [[draw.uniform(-3, 0) for _ in range(length)] for length in lengths]
    out, batch = answers(rows, [[0.0] * length for length in lengths])
    counted = thinned(batch, 7).weights_BT
    assert counted.sum(1).tolist() == [4, 4, 2, 2, 5, 5]
    assert torch.equal(counted, thinned(batch, 7).weights_BT) and not torch.equal(counted, thinned(batch, 8).weights_BT)
    assert bool((counted <= batch.weights_BT).all())
    found = per_unit(settings(sampo=True, beta=1.0), (out, batch))["loss/preference"]
    assert out.logp_BT is not None
    sums = (out.logp_BT.detach() * counted).sum(1)
    by_hand = np.mean([-log_s(float(sums[i] - sums[i + 1])) for i in (0, 2, 4)]) if batch.dropout_key == 7 else None
    assert found == pytest.approx(by_hand)


def test_sampo_draws_each_place_about_as_often_as_any_other() -> None:
    _, batch = answers([[-1.0] * 10, [-1.0] * 5])
    taken = sum(thinned(batch, key).weights_BT[0, 1:11] for key in range(400))
    assert float(taken.min()) > 150 and float(taken.max()) < 250


@pytest.mark.parametrize("loss", ALL)
@pytest.mark.parametrize("average", ["sum", "mean"])
def test_gradients_are_finite_differences(loss: str, average: str) -> None:
    draw = random.Random(3)
    rows = [[draw.uniform(-2, 0) for _ in range(n)] for n in (3, 5, 4, 1)]
    smoothing = 0.1 if loss in ("sigmoid", "robust", "exo_pair") else 0.0
    objective: Objective = settings(loss=loss, average=average, label_smoothing=smoothing, beta=0.3, nll_weight=0.2)
    out, batch = answers(rows, [[-0.9] * len(row) for row in rows])
    batch = replace(batch, signals={**batch.signals, KL: torch.tensor([0.3, 0.1, 0.3, 0.1])})
    counts = count([batch])

    def loss_at(logp_BT: torch.Tensor) -> torch.Tensor:
        return loss_of(objective.terms(replace(out, logp_BT=logp_BT), batch), counts)

    assert torch.autograd.gradcheck(loss_at, (out.logp_BT,))


def test_a_reference_of_another_type_is_read_in_the_policys() -> None:
    out, batch = answers(*ONE_PAIR)
    single = replace(batch, signals={REFERENCE: batch.signals[REFERENCE].float()})
    found, expected = per_unit(settings(), (out, single)), per_unit(settings(), (out, batch))
    assert found["loss/preference"] == pytest.approx(expected["loss/preference"], abs=1e-7)
    assert settings().reads == (REFERENCE,) and settings(reference_free=True).reads == ()


def test_groups_told_by_a_signal_are_the_pairs_that_stand_side_by_side_without_one() -> None:
    sides = answers([[-1.0], [-2.0], [-0.5], [-0.1]], [[-1.0]] * 4)
    assert per_unit(settings(), sides) == per_unit(settings(), grouped(sides, [2, 2]))
    assert GROUP not in sides[1].signals
