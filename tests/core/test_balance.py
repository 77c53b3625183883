"""Both answers to a prompt send gradients of the same size into the model, and nothing else changes."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import Tensor

from llmtrainer.base.errors import UserError
from llmtrainer.core import vocab_head
from llmtrainer.core.batch import GROUP, REFERENCE, Batch
from llmtrainer.core.objective import count, loss_of
from llmtrainer.objectives.dpo import DPO
from tests.worlds import row_batch


def pairs() -> tuple[Tensor, Tensor, Batch]:
    """Two pairs of ragged answers, hidden states of every token, and a head of 30 ids."""
    draw = torch.Generator().manual_seed(0)
    batch = row_batch([list(range(9)), list(range(4)), list(range(3)), list(range(12))])
    hidden = torch.randn(*batch.tokens_BT.shape, 8, generator=draw, dtype=torch.float64, requires_grad=True)
    weight = torch.randn(30, 8, generator=draw, dtype=torch.float64)
    reference = torch.randn(batch.tokens_BT.shape, generator=draw, dtype=torch.float64) - 4
    weights = batch.weights_BT.clone()
    weights[:, 0] = 0.0
    signals = {REFERENCE: reference, GROUP: torch.tensor([0, 0, 1, 1])}
    return hidden, weight, replace(batch, weights_BT=weights, signals=signals)


def slope(objective: DPO) -> tuple[float, Tensor]:
    hidden, weight, batch = pairs()
    out = vocab_head.score(hidden, weight, batch, objective.wants)
    loss = loss_of(objective.terms(out, batch), count([batch]))
    return float(loss.detach()), torch.autograd.grad(loss, hidden)[0]


def test_each_side_of_a_pair_gets_the_norm_of_its_smaller_side_and_keeps_its_direction() -> None:
    (plain_loss, plain), (loss, found) = slope(DPO()), slope(DPO(balance=True))
    assert loss == plain_loss
    before, after = plain.flatten(1).norm(dim=1), found.flatten(1).norm(dim=1)
    for pair in (slice(0, 2), slice(2, 4)):
        assert float(before[pair].max() / before[pair].min()) > 1.2, "the pair would prove nothing"
        torch.testing.assert_close(after[pair], before[pair].min().expand(2), rtol=1e-12, atol=0)
    torch.testing.assert_close(found / after[:, None, None], plain / before[:, None, None], rtol=0, atol=1e-12)


def test_a_side_without_a_gradient_silences_the_other_and_gives_no_nan() -> None:
    hidden, weight, batch = pairs()
    out = vocab_head.score(hidden, weight, batch, ("logp", "balanced"))
    assert out.logp_BT is not None
    (found,) = torch.autograd.grad(out.logp_BT[1:].sum(), hidden)
    assert bool(found.isfinite().all()) and not found[:2].any() and bool(found[2:].any())


def test_a_model_that_shows_no_hidden_states_is_refused_by_name() -> None:
    hidden, weight, batch = pairs()
    chosen = vocab_head.weighted_positions(batch)
    with pytest.raises(UserError, match="cannot be balanced"):
        vocab_head.score_logits(vocab_head.gather(hidden @ weight.t(), chosen), batch, chosen, ("logp", "balanced"))
