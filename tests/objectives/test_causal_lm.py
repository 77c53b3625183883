"""Next-token loss by hand, and what every objective must do with a batch that holds nothing."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch

from llmtrainer.base.kinds import kinds_in
from llmtrainer.core.batch import Batch, Outputs
from llmtrainer.core.objective import Objective, Term, count, loss_of
from llmtrainer.objectives.causal_lm import CausalLM
from tests.worlds import row_batch, tiny_model


def two_targets() -> Batch:
    batch = row_batch([[0, 1, 0]])
    return replace(batch, weights_BT=torch.tensor([[1.0, 3.0]]))


def test_the_loss_is_the_weighted_sum_over_the_weighted_count() -> None:
    # log p = -2 with weight 1 and -4 with weight 3: (2 + 12) / 4 = 3.5
    batch = two_targets()
    terms = CausalLM().terms(Outputs(logp_BT=torch.tensor([[-2.0, -4.0]])), batch)
    assert float(loss_of(terms, count([batch]))) == 3.5


def test_the_z_loss_is_the_weighted_square_of_the_log_partition() -> None:
    # 0.1 * (1 * 2^2 + 3 * 1^2) / 4 = 0.175 on top of the 3.5 above
    batch = two_targets()
    out = Outputs(logp_BT=torch.tensor([[-2.0, -4.0]]), log_partition_BT=torch.tensor([[2.0, 1.0]]))
    objective = CausalLM(z_loss=0.1)
    assert float(loss_of(objective.terms(out, batch), count([batch]))) == pytest.approx(3.675)
    assert objective.wants == ("logp", "log_partition") and CausalLM().wants == ("logp",)


def test_a_metric_is_summed_and_never_differentiated() -> None:
    metric = Term("accuracy", torch.tensor(3.0, requires_grad=True), "tokens", coef=0.0)
    assert not loss_of([metric], {"tokens": 4.0}).requires_grad


def test_an_untrained_model_is_as_surprised_as_blind_guessing() -> None:
    policy, batch = tiny_model(), row_batch([list(range(50))])
    objective = CausalLM()
    loss = loss_of(objective.terms(policy(batch, objective.wants), batch), count([batch]))
    assert float(loss.detach()) == pytest.approx(math.log(policy.vocabulary), abs=0.3)


@pytest.mark.parametrize("kind", kinds_in("llmtrainer.objectives"))
def test_a_batch_of_padding_gives_zero_and_finite_zero_gradients(kind: str) -> None:
    objective, policy = Objective.model_validate({"kind": kind}), tiny_model()
    batch = row_batch([[1, 2, 3]])
    empty = replace(
        batch, weights_BT=torch.zeros(1, 2), document_BT=torch.full((1, 2), -1, dtype=torch.int32),
        sequence_BT=torch.full((1, 2), -1, dtype=torch.int32),
    )  # fmt: skip
    loss = loss_of(objective.terms(policy(empty, objective.wants), empty), {"tokens": 7.0, "sequences": 1.0})
    loss.backward()
    assert float(loss.detach()) == 0.0
    assert all(p.grad is None or not p.grad.any() for p in policy.parameters())
