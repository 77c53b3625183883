"""What every objective owes: no matter how a step is cut, nothing from nothing, settings that are read, true slopes."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from llmtrainer.base.config import forget_reads, unread
from llmtrainer.base.kinds import kinds_in
from llmtrainer.core.credit import FRESH
from llmtrainer.core.objective import Objective, count, loss_of
from tests.conformance.objectives import ROLLOUT, TRIED, VARIANTS, Settings, World, name_of
from tests.tolerances import FINITE_DIFFERENCE_RELATIVE, FLOAT64_GRADIENT_RELATIVE

DETACHED = ("cispo", "vespo")
"""Methods whose loss is no number to go down: a weight in it changes with the policy and is not differentiated."""



def turned(settings: Settings) -> bool:
    """Whether what is followed is on purpose not the slope of the loss."""
    return settings.get("loss") in DETACHED or bool(settings.get("balance"))


every_objective = pytest.mark.parametrize("settings", TRIED, ids=name_of)


def gradient(world: World, objective: Objective, sizes: list[int]) -> tuple[float, Tensor, dict[str, float]]:
    """Loss, the gradients of all parameters as one vector, and every Term of the step."""
    decoder = world.policy.decoder
    decoder.zero_grad()
    batches, loss = world.step(sizes), 0.0
    counts, told = count(batches), dict[str, float]()
    for batch in batches:
        terms = objective.terms(world.policy(batch, objective.wants), batch)
        share = loss_of(terms, counts)
        share.backward()
        loss += float(share.detach())
        for term in terms:
            told[term.name] = told.get(term.name, 0.0) + float(term.total.detach()) / counts[term.unit]
    return loss, torch.cat([p.grad.flatten() for p in decoder.parameters() if p.grad is not None]), told


@every_objective
def test_loss_gradient_and_log_do_not_depend_on_how_a_step_is_cut(settings: Settings) -> None:
    objective, world = Objective.model_validate(settings), World(settings, dropout=0.1)
    loss, whole, told = gradient(world, objective, [6])
    assert float(whole.norm()) > 0
    for sizes in ([1] * 6, [3, 1, 2]):
        cut_loss, cut, cut_told = gradient(world, objective, sizes)
        assert float((cut - whole).norm() / whole.norm()) <= FLOAT64_GRADIENT_RELATIVE, sizes
        assert abs(cut_loss - loss) <= FLOAT64_GRADIENT_RELATIVE * max(1.0, abs(loss)), sizes
        assert cut_told == pytest.approx(told, rel=1e-10, abs=1e-12)


@every_objective
def test_a_batch_of_padding_gives_zero_and_finite_zero_gradients(settings: Settings) -> None:
    objective, world = Objective.model_validate(settings), World(settings)
    empty = world.empty()
    terms = objective.terms(world.policy(empty, objective.wants), empty)
    assert all(float(term.total.detach()) == 0.0 for term in terms)
    counts = dict.fromkeys(count(world.step([6])), 7.0)
    loss_of(terms, counts).backward()
    assert all(p.grad is None or not p.grad.any() for p in world.policy.decoder.parameters())


@every_objective
def test_an_objective_loads_back_from_what_it_is_dumped_as(settings: Settings) -> None:
    objective = Objective.model_validate(settings)
    again = Objective.model_validate(objective.plain())
    assert again == objective and type(again) is type(objective)


@every_objective
def test_every_setting_is_read_and_every_signal_is_declared(settings: Settings) -> None:
    objective, world = Objective.model_validate(settings), World(settings)
    forget_reads(objective)
    batch = world.batch(0, 4)
    needed = {"group_S", "kl_S", *objective.reads}
    batch.signals.update({name: batch.signals.pop(name) for name in needed & set(batch.signals)})
    for name in set(batch.signals) - needed:
        del batch.signals[name]
    objective.terms(world.policy(batch, objective.wants), batch)
    if "advantage_BT" in objective.reads:
        state = objective.advance(FRESH, ROLLOUT)
        objective.credit(ROLLOUT, state)
        objective.returns(ROLLOUT, state)
    assert unread(objective) == []


@pytest.mark.parametrize("kind", kinds_in("llmtrainer.objectives"))
def test_every_field_is_tried_with_something_else_than_its_default(kind: str) -> None:
    fields = type(Objective.model_validate({"kind": kind})).model_fields
    tried = {name for settings in VARIANTS.get(kind, []) for name in settings}
    assert tried == set(fields), "a new field needs a line in tests/conformance/objectives.py"


@pytest.mark.parametrize("settings", [item for item in TRIED if not turned(item)], ids=name_of)
def test_the_gradient_is_the_slope_of_the_loss(settings: Settings) -> None:
    objective, world = Objective.model_validate(settings), World(settings)
    _, whole, _ = gradient(world, objective, [6])
    parameters = [p for p in world.policy.decoder.parameters() if p.grad is not None]
    draw = torch.Generator().manual_seed(48)
    way = torch.randn(whole.shape, generator=draw, dtype=torch.float64)
    way = way / way.norm() + whole / whole.norm()
    losses = []
    step = 1e-6
    for size in (step, -2 * step):
        torch.nn.utils.vector_to_parameters(torch.nn.utils.parameters_to_vector(parameters) + size * way, parameters)
        batch = world.batch(0, 12)
        with torch.no_grad():
            terms = objective.terms(world.policy(batch, objective.wants), batch)
            losses.append(float(loss_of(terms, count([batch]))))
    slope = (losses[0] - losses[1]) / (2 * step)
    assert slope == pytest.approx(float(whole @ way), rel=FINITE_DIFFERENCE_RELATIVE)
