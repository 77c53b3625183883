"""Three policies: weights and rejections where the sampler and the trainer disagree, by hand."""

from __future__ import annotations

import math
from dataclasses import replace

import numpy as np
import pytest
import torch

from llmtrainer.core.batch import OLD, ROLLOUT
from llmtrainer.core.correction import Correction
from tests.objectives.comparisons import Sides, answers, placed
from tests.objectives.rollouts import rollout_of

# Gaps log rho of 0.2 and -0.1 in the first answer, of 1.0, 0.1 and 0 in the second.
OLDS = [[-1.0, -1.0], [-1.0, -1.0, -1.0]]
SAMPLED = [[-1.2, -0.9], [-2.0, -1.1, -1.0]]


def disagreeing() -> Sides:
    out, batch = answers(OLDS)
    return out, replace(batch, signals={OLD: placed(OLDS, batch), ROLLOUT: placed(SAMPLED, batch)})


def weights(**fields: object) -> list[list[float]]:
    out, batch = disagreeing()
    assert out.logp_BT is not None
    weight_BT, _ = Correction.model_validate(fields).apply(batch, out.logp_BT)
    assert weight_BT is not None and not weight_BT.requires_grad
    return [weight_BT[0, 1:3].tolist(), weight_BT[1, 1:4].tolist()]


E = math.exp


@pytest.mark.parametrize(("fields", "first", "second"), [
    ({"weights": "token"}, [E(0.2), E(-0.1)], [2.0, E(0.1), 1.0]),
    ({"weights": "token", "cap": 5.0}, [E(0.2), E(-0.1)], [E(1.0), E(0.1), 1.0]),
    ({"weights": "sequence", "cap": 5.0}, [E(0.1)] * 2, [E(1.1)] * 3),
    ({"reject": "token"}, [1.0, 1.0], [0.0, 1.0, 1.0]),
    ({"reject": "token", "bounds": (0.95, 9.0)}, [1.0, 0.0], [1.0, 1.0, 1.0]),
    ({"reject": "sequence"}, [1.0, 1.0], [0.0] * 3),
    # The geometric mean of the second is e^(1.1 / 3) = 1.443.
    ({"reject": "mean"}, [1.0, 1.0], [1.0] * 3),
    ({"reject": "mean", "bounds": (0.5, 1.4)}, [1.0, 1.0], [0.0] * 3),
    # KL(sampler || trainer) by k1: the means of -log rho are -0.05 and -0.367.
    ({"reject": "k1", "bounds": (0.0, -0.1)}, [0.0, 0.0], [1.0] * 3),
    # By k3: the mean of rho - 1 - log rho of the second is (0.71828 + 0.00517 + 0) / 3 = 0.241.
    ({"reject": "k3", "bounds": (0.0, 0.2)}, [1.0, 1.0], [0.0] * 3),
    ({"reject": "k3", "bounds": (0.0, 0.25), "weights": "token"}, [E(0.2), E(-0.1)], [2.0, E(0.1), 1.0]),
])  # fmt: skip
def test_weights_and_rejections_by_hand(fields: dict[str, object], first: list[float], second: list[float]) -> None:
    found = weights(**fields)
    assert found[0] == pytest.approx(first) and found[1] == pytest.approx(second)


def test_the_gap_is_told_whether_or_not_anything_is_done_about_it() -> None:
    out, batch = disagreeing()
    assert out.logp_BT is not None
    weight, terms = Correction().apply(batch, out.logp_BT)
    figures = {term.name: float(term.total) / 5 for term in terms}
    gaps = np.array([0.2, -0.1, 1.0, 0.1, 0.0])
    assert weight is None and all(term.coef == 0.0 and term.unit == "tokens" for term in terms)
    assert figures["rollout/kl"] == pytest.approx(np.mean(np.exp(gaps) - 1 - gaps))
    assert figures["rollout/chi2"] == pytest.approx(np.mean(np.exp(gaps) ** 2) - 1)
    assert figures["rollout/weight"] == 1.0 and figures["rollout/rejected"] == 0.0
    _, terms = Correction(reject="token").apply(batch, out.logp_BT)
    assert {term.name: float(term.total) for term in terms}["rollout/rejected"] == 1.0


def test_each_way_says_which_of_the_policies_it_needs() -> None:
    assert Correction().reads == (OLD,) and Correction(bypass=True).reads == (ROLLOUT,)
    assert Correction(weights="token").reads == Correction(reject="k3").reads == (OLD, ROLLOUT)


def test_with_bypass_the_surrogate_is_anchored_at_the_sampler_and_rejects_by_the_policy_of_now() -> None:
    out, batch = disagreeing()
    assert out.logp_BT is not None
    now_BT = (out.logp_BT.detach() - 0.8).requires_grad_()
    correction = Correction(bypass=True, reject="token", bounds=(0.5, 2.0))
    torch.testing.assert_close(correction.anchor(batch, now_BT), batch.signals[ROLLOUT], rtol=0, atol=0)
    weight_BT, _ = correction.apply(replace(batch, signals={ROLLOUT: batch.signals[ROLLOUT]}), now_BT)
    # Gaps -0.6, -0.9 and 0.2, -0.7, -0.8: below log 0.5 = -0.69 is out.
    assert weight_BT is not None
    assert weight_BT[0, 1:3].tolist() == [1.0, 0.0] and weight_BT[1, 1:4].tolist() == [1.0, 0.0, 0.0]


@pytest.mark.parametrize("reject", ["sequence", "mean", "k1", "k3"])
def test_answers_rejected_before_training_are_those_that_the_loss_would_leave_out(reject: str) -> None:
    correction = Correction.model_validate({"reject": reject, "bounds": (0.9, 1.2) if reject != "k3" else (0.0, 0.1)})
    rollout = rollout_of(
        [1.0, 0.0], [0, 0], lengths=[2, 3], old_logp=tuple(map(np.array, SAMPLED)),
        trainer_logp=tuple(map(np.array, OLDS)),
    )  # fmt: skip
    out, batch = disagreeing()
    assert out.logp_BT is not None
    weight_BT, _ = correction.apply(batch, out.logp_BT)
    assert weight_BT is not None
    assert correction.keeps(rollout).tolist() == (weight_BT[:, 1] > 0).tolist()
    assert correction.keeps(replace(rollout, trainer_logp=None)).all()
