"""SimPO, CPO, ORPO and KTO by hand, and the logarithm that odds need."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch

from llmtrainer.core.batch import KL, LIKED
from llmtrainer.core.maths import log1mexp
from llmtrainer.core.objective import Objective
from llmtrainer.objectives.cpo import CPO
from llmtrainer.objectives.kto import KTO
from llmtrainer.objectives.orpo import ORPO
from llmtrainer.objectives.simpo import SimPO
from tests.objectives.comparisons import Sides, answers, per_unit
from tests.tolerances import FLOAT64_LOGITS


def s(x: float) -> float:
    return 1 / (1 + math.exp(-x))


# Means -0.5 and -0.8 over two and three tokens.
MEANS = [[-0.2, -0.8], [-0.5, -1.4, -0.5]]


def test_simpo_compares_means_and_asks_for_a_lead() -> None:
    # 2 * 0.3 - 0.5 = 0.1
    assert per_unit(SimPO(beta=2.0, gamma=0.5), answers(MEANS))["loss/preference"] == pytest.approx(0.6443967, abs=6e-8)


def test_orpo_weighs_the_odds_ratio_beside_imitation() -> None:
    found = per_unit(ORPO(beta=0.1), answers(MEANS))
    odds = [mean - math.log(1 - math.exp(mean)) for mean in (-0.5, -0.8)]
    assert 0.1 * found["loss/odds_ratio"] == pytest.approx(0.0424833, abs=6e-8)
    assert found["loss/odds_ratio"] == pytest.approx(-math.log(s(odds[0] - odds[1])), abs=FLOAT64_LOGITS)
    assert found["loss/nll"] == pytest.approx(0.5) and found["preference/accuracy"] == 1.0


def test_cpo_is_the_sum_without_a_reference_plus_imitation() -> None:
    found = per_unit(CPO(beta=0.1), answers(MEANS))
    assert found["loss/preference"] == pytest.approx(-math.log(s(0.1 * (-1.0 + 2.4))), abs=FLOAT64_LOGITS)
    assert found["loss/nll"] == pytest.approx(0.5)
    means = per_unit(CPO(beta=0.1, loss="ipo"), answers(MEANS))["loss/preference"]
    assert means == pytest.approx((0.3 - 5.0) ** 2, abs=FLOAT64_LOGITS)


def liked(signs: list[float], point: float | None = None) -> Sides:
    # Log-ratios 0.5, -0.3 and 1.0.
    out, batch = answers([[-1.0, -2.0], [-0.8], [-0.5, -0.5]], [[-1.5, -2.0], [-0.5], [-1.0, -1.0]])
    told = {} if point is None else {KL: torch.full((3,), point)}
    return out, replace(batch, signals={**batch.signals, LIKED: torch.tensor(signs), **told})


def test_kto_brings_liked_answers_above_the_point_and_the_others_below() -> None:
    sides = liked([1.0, 0.0, 0.0], 0.2)
    objective = KTO(beta=0.5, liked_weight=2.0, disliked_weight=0.5)
    found = per_unit(objective, sides)
    by_hand = 2.0 * (1 - s(0.5 * 0.3)) + 0.5 * (1 - s(0.5 * 0.5)) + 0.5 * (1 - s(0.5 * -0.8))
    assert found["loss/preference"] == pytest.approx(by_hand / 3, abs=1e-7)
    assert found["preference/accuracy"] == pytest.approx(2 / 3) and found["preference/liked"] == pytest.approx(1 / 3)
    assert found["preference/margin"] == pytest.approx(0.5 * (0.3 + 0.5 - 0.8) / 3, abs=1e-7)


def test_without_an_estimate_the_point_is_the_steps_own_mean_and_no_gradient_goes_through_it() -> None:
    out, batch = liked([1.0, 0.0, 0.0])
    objective = KTO(beta=0.5)
    assert KTO(point="own").whole_steps and not objective.whole_steps and KL in objective.reads
    for without in (KTO(loss="apo_zero"), KTO(loss="apo_zero", point="own")):
        assert not without.whole_steps and KL not in without.reads
    point = 0.4
    by_hand = (1 - s(0.5 * (0.5 - point)) + 1 - s(0.5 * (point + 0.3)) + 1 - s(0.5 * (point - 1.0))) / 3
    found = per_unit(objective, (out, batch))["loss/preference"]
    assert found == pytest.approx(by_hand, abs=FLOAT64_LOGITS)
    slopes = []
    for sides in ((out, batch), liked([1.0, 0.0, 0.0], point)):
        (term, *_) = objective.terms(*sides)
        assert sides[0].logp_BT is not None
        slopes.append(torch.autograd.grad(term.total, sides[0].logp_BT)[0])
    torch.testing.assert_close(*slopes, rtol=0, atol=1e-7)


def test_a_policy_below_its_reference_everywhere_has_its_point_at_zero() -> None:
    out, batch = answers([[-3.0], [-4.0]], [[-1.0], [-1.0]])
    batch = replace(batch, signals={**batch.signals, LIKED: torch.tensor([1.0, 0.0])})
    found = per_unit(KTO(beta=1.0), (out, batch))["loss/preference"]
    assert found == pytest.approx((1 - s(-2.0) + 1 - s(3.0)) / 2, abs=FLOAT64_LOGITS)
    assert found == pytest.approx(per_unit(KTO(beta=1.0, loss="apo_zero"), (out, batch))["loss/preference"])


def test_kto_starts_at_a_half() -> None:
    logp = [[-1.0], [-0.2, -0.3]]
    out, batch = answers(logp, logp)
    batch = replace(batch, signals={**batch.signals, LIKED: torch.tensor([1.0, 0.0])})
    assert per_unit(KTO(), (out, batch))["loss/preference"] == KTO().starts_at["loss/preference"] == 0.5
    assert KTO(liked_weight=2.0).starts_at == {}


@pytest.mark.parametrize("objective", [SimPO(), ORPO(), CPO(), CPO(loss="hinge")], ids=lambda item: item.kind)
def test_slopes_by_finite_differences(objective: Objective) -> None:
    out, batch = answers([*MEANS, [-3.0, -0.1, -0.4], [-0.01]])

    def total(logp_BT: torch.Tensor) -> torch.Tensor:
        return sum((t.total * t.coef for t in objective.terms(replace(out, logp_BT=logp_BT), batch)), torch.zeros(()))

    assert torch.autograd.gradcheck(total, (out.logp_BT,))


def test_the_logarithm_of_the_contrary_keeps_its_digits_from_one_end_to_the_other() -> None:
    x = torch.tensor([-1e-12, -1e-6, -0.3, -math.log(2), -1.0, -40.0, -700.0], dtype=torch.float64)
    # log(1 - e^-1e-12) = log(1e-12) - 5e-13, log(1 - e^-40) = -e^-40
    expected = [math.log(1e-12), math.log(1e-6), math.log(1 - math.exp(-0.3)), -math.log(2), math.log(1 - math.exp(-1)),
                -math.exp(-40), -math.exp(-700)]  # fmt: skip
    for ours, theirs in zip(log1mexp(x).tolist(), expected, strict=True):
        assert ours == pytest.approx(theirs, rel=1e-6)
    assert torch.autograd.gradcheck(log1mexp, (x[2:6].clone().requires_grad_(),))
    edge = torch.tensor([0.0, -1e9], requires_grad=True)
    log1mexp(edge).sum().backward()
    assert edge.grad is not None and bool(edge.grad.isfinite().all())
