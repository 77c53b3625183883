"""Distillation by hand, against dense logits in float64, and what a short list of ids leaves out."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch
from torch import Tensor
from torch.nn.functional import cross_entropy, kl_div

from llmtrainer.base.errors import UserError
from llmtrainer.core import listed, vocab_head
from llmtrainer.core.batch import TEACHER_IDS, TEACHER_LOGP, TEACHER_TEMPERATURE, Batch
from llmtrainer.core.objective import count, loss_of
from llmtrainer.objectives.distill import Distill
from tests.tolerances import FLOAT64_LOGITS
from tests.worlds import row_batch, tiny_model

KINDS = ("forward_kl", "reverse_kl", "jensen_shannon", "cross_entropy")


def settings(**fields: object) -> Distill:
    return Distill.model_validate(fields)


def taught(batch: Batch, teacher_BTV: Tensor, k: int | None = None, temperature: float = 1.0) -> Batch:
    """The batch with the teacher's k likeliest ids, all of them where no number is named."""
    logp = (teacher_BTV / temperature).log_softmax(-1)
    found = logp.topk(k or logp.shape[-1], dim=-1)
    told = {TEACHER_LOGP: found.values, TEACHER_IDS: found.indices, TEACHER_TEMPERATURE: torch.tensor(temperature)}
    return replace(batch, signals=told)


def loss(objective: Distill, hidden_BTD: Tensor, weight_VD: Tensor, batch: Batch, chunk: int | None = None) -> Tensor:
    out = vocab_head.score(hidden_BTD, weight_VD, batch, objective.wants, chunk)
    return loss_of(objective.terms(out, batch), count([batch]))


def of_logits(objective: Distill, student: list[float], teacher: list[float], label: int) -> dict[str, float]:
    """One position whose logits are those numbers."""
    batch = taught(row_batch([[0, label]]), torch.tensor([[teacher]], dtype=torch.float64))
    hidden, weight = torch.tensor([[student]], dtype=torch.float64), torch.eye(len(student), dtype=torch.float64)
    out = vocab_head.score(hidden, weight, batch, objective.wants)
    terms = objective.terms(out, batch)
    return {"total": float(loss_of(terms, count([batch]))), **{term.name: float(term.total) for term in terms}}


def test_the_published_numbers_of_one_position() -> None:
    found = of_logits(settings(coefficient=0.4, divergence="cross_entropy"), [1.0, 2.0, 0.0], [2.0, 1.0, 0.0], 1)
    assert found["loss/distill"] == pytest.approx(1.2529081, abs=5e-8)
    assert found["loss/lm"] == pytest.approx(0.4076060, abs=5e-8)
    assert found["total"] == pytest.approx(0.7457268, abs=5e-8)


def test_forward_kl_is_the_cross_entropy_less_the_teachers_own_entropy() -> None:
    p = [math.exp(x) / (math.exp(2) + math.exp(1) + 1) for x in (2, 1, 0)]
    entropy = -sum(x * math.log(x) for x in p)
    found = of_logits(settings(coefficient=1.0), [1.0, 2.0, 0.0], [2.0, 1.0, 0.0], 1)
    assert found["loss/distill"] == pytest.approx(1.2529081 - entropy, abs=5e-8) and "loss/lm" not in found


def step(seed: int = 0) -> tuple[Tensor, Tensor, Batch, Tensor]:
    """Hidden states, a head of 40 ids, two ragged rows, the first target of each without weight, and a teacher."""
    draw = torch.Generator().manual_seed(seed)
    batch = row_batch([list(range(7)), list(range(4))])
    weights = batch.weights_BT.clone()
    weights[:, 0] = 0.0
    weights[0, 2] = 2.0
    hidden = torch.randn(2, 6, 12, generator=draw, dtype=torch.float64, requires_grad=True)
    weight = torch.randn(40, 12, generator=draw, dtype=torch.float64, requires_grad=True)
    teacher = torch.randn(2, 6, 40, generator=draw, dtype=torch.float64) * 2
    return hidden, weight, replace(batch, weights_BT=weights), teacher


def dense(kind: str, hidden: Tensor, weight: Tensor, batch: Batch, teacher: Tensor, t: float = 1.0) -> Tensor:
    """The mean over weighted targets of the divergence of whole distributions, times the temperature squared."""
    counting = batch.weights_BT > 0
    q, p = (hidden @ weight.t() / t).log_softmax(-1)[counting], (teacher / t).log_softmax(-1)[counting]
    match kind:
        case "forward_kl":
            found = kl_div(q, p, reduction="none", log_target=True)
        case "reverse_kl":
            found = kl_div(p, q, reduction="none", log_target=True)
        case "cross_entropy":
            found = -p.exp() * q
        case _:
            m = (0.3 * p.exp() + 0.7 * q.exp()).log()
            found = 0.3 * p.exp() * (p - m) + 0.7 * q.exp() * (q - m)
    weights_N = batch.weights_BT[counting].double()
    return t**2 * (weights_N * found.sum(-1)).sum() / weights_N.sum()


@pytest.mark.parametrize("temperature", [1.0, 2.5])
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("chunk", [None, 2])
def test_with_the_whole_vocabulary_loss_and_gradients_are_those_of_dense_logits(
    kind: str, temperature: float, chunk: int | None
) -> None:
    hidden, weight, batch, teacher = step()
    objective = settings(coefficient=1.0, divergence=kind, mixture=0.3, temperature=temperature)
    ours = loss(objective, hidden, weight, taught(batch, teacher, temperature=temperature), chunk)
    theirs = dense(kind, hidden, weight, batch, teacher, temperature)
    assert float(ours.detach()) == pytest.approx(float(theirs.detach()), abs=FLOAT64_LOGITS)
    for mine, other in zip(*(torch.autograd.grad(x, (hidden, weight)) for x in (ours, theirs)), strict=True):
        torch.testing.assert_close(mine, other, rtol=0, atol=FLOAT64_LOGITS)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("k", [1, 5, 39])
def test_what_is_not_listed_is_compared_as_one_id_of_its_exact_mass(kind: str, k: int) -> None:
    hidden, weight, batch, teacher = step(1)
    objective = settings(coefficient=1.0, divergence=kind, mixture=0.3)
    ours = loss(objective, hidden, weight, taught(batch, teacher, k), 3)
    ids = teacher.topk(k, -1).indices

    def gathered(logits: Tensor) -> Tensor:
        logp = logits.log_softmax(-1)
        rest = logp.scatter(-1, ids, -math.inf).logsumexp(-1, keepdim=True)
        return torch.cat([logp.gather(-1, ids), rest], -1)

    # A head that gives the K + 1 numbers themselves: dense() then takes the softmax of what already is one.
    few = gathered(hidden @ weight.t())
    theirs = dense(kind, few, torch.eye(k + 1, dtype=torch.float64), batch, gathered(teacher))
    assert float(ours.detach()) == pytest.approx(float(theirs.detach()), abs=1e-9)
    for mine, other in zip(*(torch.autograd.grad(x, (hidden, weight)) for x in (ours, theirs)), strict=True):
        torch.testing.assert_close(mine, other, rtol=0, atol=1e-9)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("k", [None, 4])
def test_a_student_that_is_its_teacher_has_no_divergence_and_no_gradient(kind: str, k: int | None) -> None:
    hidden, weight, batch, _ = step(2)
    teacher = (hidden @ weight.t()).detach()
    objective = settings(coefficient=1.0, divergence=kind)
    found = loss(objective, hidden, weight, taught(batch, teacher, k))
    entropy = float(dense("cross_entropy", hidden, weight, batch, teacher).detach()) if k is None else None
    if kind != "cross_entropy":
        assert float(found.detach()) == pytest.approx(0.0, abs=1e-12)
    elif entropy is not None:
        assert float(found.detach()) == pytest.approx(entropy, abs=1e-12)
    assert all(float(g.abs().max()) < 1e-12 for g in torch.autograd.grad(found, (hidden, weight)))


def test_a_teacher_that_knows_the_text_is_the_text() -> None:
    """The id that a teacher is sure of is the next one: no shift is left to anybody."""
    hidden, weight, batch, _ = step(3)
    sure = {TEACHER_IDS: batch.targets_BT[..., None], TEACHER_LOGP: torch.zeros(2, 6, 1)}
    ours = loss(settings(coefficient=1.0), hidden, weight, replace(batch, signals=sure))
    counting = batch.weights_BT > 0
    each = cross_entropy((hidden @ weight.t())[counting], batch.targets_BT[counting], reduction="none")
    weights_N = batch.weights_BT[counting].double()
    assert float(ours.detach()) == pytest.approx(float((weights_N * each).sum().detach()) / float(weights_N.sum()))


@pytest.mark.parametrize("kind", KINDS)
def test_targets_without_weight_have_no_influence(kind: str) -> None:
    hidden, weight, batch, teacher = step(4)
    changed = torch.where((batch.weights_BT > 0)[..., None], teacher, -teacher)
    objective = settings(divergence=kind)
    pair = [loss(objective, hidden, weight, taught(batch, each, 6)) for each in (teacher, changed)]
    assert torch.equal(*pair)
    (slope,) = torch.autograd.grad(pair[0], hidden)
    assert not slope[batch.weights_BT == 0].any() and bool(slope[batch.weights_BT > 0].any())


@pytest.mark.parametrize("kind", KINDS)
def test_ids_that_a_side_holds_for_impossible_give_no_nan(kind: str) -> None:
    """Logits of -inf, as where rows of a head only pad it."""
    _, _, batch, teacher = step(5)
    draw = torch.Generator().manual_seed(6)
    logits = torch.randn(2, 6, 40, generator=draw, dtype=torch.float64)
    logits[..., 30:] = -math.inf
    logits.requires_grad_()
    teacher = teacher.clone()
    teacher[..., 20:25] = -math.inf
    for k in (None, 8):
        told = taught(batch, teacher, k)
        objective = settings(divergence=kind, coefficient=0.5)
        chosen = vocab_head.weighted_positions(told)
        out = vocab_head.score_logits(vocab_head.gather(logits, chosen), told, chosen, objective.wants)
        found = loss_of(objective.terms(out, told), count([told]))
        (slope,) = torch.autograd.grad(found, logits)
        assert bool(found.isfinite()) and bool(slope.isfinite().all())


def test_logits_that_a_model_makes_itself_give_the_same_as_hidden_states() -> None:
    hidden, weight, batch, teacher = step(6)
    told, objective = taught(batch, teacher, 5), settings()
    chosen = vocab_head.weighted_positions(told)
    logits = vocab_head.gather(hidden @ weight.t(), chosen)
    out = vocab_head.score_logits(logits, told, chosen, objective.wants)
    ours, theirs = loss_of(objective.terms(out, told), count([told])), loss(objective, hidden, weight, told)
    assert float(ours.detach()) == pytest.approx(float(theirs.detach()), abs=FLOAT64_LOGITS)
    for mine, other in zip(*(torch.autograd.grad(x, (hidden, weight)) for x in (ours, theirs)), strict=True):
        torch.testing.assert_close(mine, other, rtol=0, atol=FLOAT64_LOGITS)


def test_a_list_made_at_another_temperature_is_refused_by_name() -> None:
    hidden, weight, batch, teacher = step()
    with pytest.raises(UserError, match=r"of temperature 1, and objective\.temperature is 2"):
        loss(settings(temperature=2.0), hidden, weight, taught(batch, teacher))
    assert TEACHER_TEMPERATURE in settings(temperature=2.0).reads and TEACHER_TEMPERATURE not in settings().reads


@pytest.mark.parametrize("k", [3, 320])
def test_a_teacher_that_runs_beside_tells_the_same_as_its_dense_logits(k: int) -> None:
    teacher, student = tiny_model(torch.float64, seed=1), tiny_model(torch.float64)
    batch = row_batch([list(range(9)), list(range(20, 24))])
    weights = batch.weights_BT.clone()
    weights[0, :3] = 0.0
    batch = replace(batch, weights_BT=weights)
    hidden = teacher.hidden(batch).detach()
    told = listed.told_by(hidden, teacher.head_weight, batch, k, 2.0, rows=4)
    dense = taught(batch, hidden @ teacher.head_weight.detach().t(), k, 2.0)
    objective = settings(temperature=2.0)
    losses = []
    for each in (replace(batch, signals=told), dense):
        out = student(each, objective.wants)
        losses.append(float(loss_of(objective.terms(out, each), count([each])).detach()))
    assert losses[0] == pytest.approx(losses[1], abs=FLOAT64_LOGITS)
    assert not told[TEACHER_LOGP].requires_grad


def test_the_log_tells_how_often_both_agree_and_how_much_was_not_listed() -> None:
    found = of_logits(settings(), [1.0, 2.0, 0.0], [2.0, 1.0, 0.0], 1)
    assert found["distill/agreement"] == 0.0 and found["distill/unlisted"] == pytest.approx(0.0, abs=1e-12)
    assert of_logits(settings(), [1.0, 2.0, 0.0], [1.0, 3.0, 0.0], 1)["distill/agreement"] == 1.0
