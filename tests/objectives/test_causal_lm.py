"""Next-token loss by hand."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch

from llmtrainer.core.batch import Batch, Outputs
from llmtrainer.core.objective import Term, count, loss_of
from llmtrainer.objectives.causal_lm import CausalLM
from tests.tolerances import FLOAT32_LOSS, FLOAT64_LOGITS
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


@pytest.mark.parametrize("smoothing", [0.1, 0.7])
@pytest.mark.parametrize("tied_head", [True, False])
def test_the_smoothed_loss_and_its_gradient_are_torchs(smoothing: float, tied_head: bool) -> None:
    policy, batch = tiny_model(torch.float64, tied_head=tied_head), row_batch([list(range(40)), list(range(9, 50))])
    objective = CausalLM(label_smoothing=smoothing)
    ours = loss_of(objective.terms(policy(batch, objective.wants), batch), count([batch]))
    logits = policy.hidden(batch) @ policy.head_weight.t()
    theirs = torch.nn.functional.cross_entropy(
        logits.flatten(0, 1)[batch.weights_BT.flatten() > 0], batch.targets_BT[batch.weights_BT > 0],
        label_smoothing=smoothing,
    )  # fmt: skip
    assert float(ours.detach()) == pytest.approx(float(theirs.detach()), abs=FLOAT64_LOGITS)
    gradients = [torch.autograd.grad(loss, list(policy.parameters())) for loss in (ours, theirs)]
    for our, their in zip(*gradients, strict=True):
        torch.testing.assert_close(our, their, rtol=0, atol=FLOAT64_LOGITS)


def test_smoothing_is_a_term_of_its_own_and_the_plain_loss_is_still_told() -> None:
    # 0.75 * 3.5 from above + 0.25 * (1 * 6 + 3 * 8) / 4 = 2.625 + 1.875
    batch = two_targets()
    out = Outputs(logp_BT=torch.tensor([[-2.0, -4.0]]), mean_logp_BT=torch.tensor([[-6.0, -8.0]]))
    objective = CausalLM(label_smoothing=0.25)
    plain, smoothing = objective.terms(out, batch)
    assert float(loss_of([plain, smoothing], count([batch]))) == 4.5
    assert (plain.name, float(plain.total), smoothing.name) == ("loss/lm", 14.0, "loss/smoothing")
    assert objective.wants == ("logp", "mean_logp")


def test_padding_rows_of_the_head_get_no_share_of_the_smoothing() -> None:
    policy, batch = tiny_model(torch.float64), row_batch([list(range(40))])
    whole = policy(batch, ("mean_logp",)).mean_logp_BT
    policy.ids = 300
    logp = (policy.hidden(batch) @ policy.head_weight.t()).log_softmax(-1)
    real = policy(batch, ("mean_logp",)).mean_logp_BT
    torch.testing.assert_close(real, logp[..., :300].mean(-1), rtol=0, atol=FLOAT64_LOGITS)
    assert not torch.allclose(real, whole, atol=1e-6)


def test_a_metric_is_summed_and_never_differentiated() -> None:
    metric = Term("accuracy", torch.tensor(3.0, requires_grad=True), "tokens", coef=0.0)
    assert not loss_of([metric], {"tokens": 4.0}).requires_grad


def test_an_untrained_model_is_as_surprised_as_blind_guessing() -> None:
    policy, batch = tiny_model(), row_batch([list(range(50))])
    objective = CausalLM()
    loss = loss_of(objective.terms(policy(batch, objective.wants), batch), count([batch]))
    assert float(loss.detach()) == pytest.approx(math.log(policy.vocabulary), abs=0.3)


def critical(logits_TV: torch.Tensor, labels: list[int], tokens: set[int], alpha: float) -> torch.Tensor:
    """The loss of one row whose targets count alpha where they are critical."""
    batch = replace(
        row_batch([[0, *labels]]), weights_BT=torch.tensor([[alpha if label in tokens else 1.0 for label in labels]])
    )
    logp_BT = logits_TV.log_softmax(-1)[range(len(labels)), labels][None]
    return loss_of(CausalLM().terms(Outputs(logp_BT=logp_BT), batch), count([batch]))


def test_a_critical_token_counts_alpha_times_in_the_loss_and_in_what_it_is_divided_by() -> None:
    # log(e + e^2 + 1) = 2.4076060: losses 0.4076060 and 1.4076060; (0.4076060 + 2 * 1.4076060) / 3
    logits_TV = torch.tensor([[1.0, 2.0, 0.0], [1.0, 2.0, 0.0]], dtype=torch.float64)
    assert float(critical(logits_TV, [1, 0], {0}, 2.0)) == pytest.approx(1.0742726, abs=1e-7)
    assert float(critical(logits_TV, [1, 0], {0}, 1.0)) == pytest.approx(0.9076060, abs=1e-7)


def test_critical_tokens_are_torchs_class_weights_and_alpha_1_changes_no_bit() -> None:
    logits_TV = torch.randn(9, 5, generator=torch.Generator().manual_seed(0))
    labels = [0, 3, 1, 4, 3, 2, 0, 3, 1]
    weights_V = torch.tensor([2.5, 1.0, 1.0, 2.5, 1.0])
    theirs = torch.nn.functional.cross_entropy(logits_TV, torch.tensor(labels), weight=weights_V)
    assert float(critical(logits_TV, labels, {0, 3}, 2.5)) == pytest.approx(float(theirs), abs=FLOAT32_LOSS)
    assert torch.equal(critical(logits_TV, labels, {0, 3}, 1.0), critical(logits_TV, labels, set(), 2.5))
