"""Two objectives in one step: each over its own sequences, and nothing of the other where its weight is 0."""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from llmtrainer.core.batch import BESIDE, Batch
from llmtrainer.core.objective import Objective, count, loss_of
from llmtrainer.objectives.mix import Mix
from tests.conformance.objectives import World
from tests.tolerances import FLOAT64_GRADIENT_RELATIVE

MAIN, BESIDES = {"kind": "grpo", "loss": "gspo"}, {"kind": "causal_lm"}


def gradient(world: World, objective: Objective, batches: list[Batch]) -> Tensor:
    world.policy.decoder.zero_grad()
    counts = count(batches)
    for batch in batches:
        loss_of(objective.terms(world.policy(batch, objective.wants), batch), counts).backward()
    return torch.cat([p.grad.flatten() for p in world.policy.decoder.parameters() if p.grad is not None])


def halves(world: World) -> tuple[Batch, Batch, Batch]:
    """The whole step, and the sequences of either objective by themselves, in the same rows."""
    whole = world.batch(0, 12)
    beside_S = whole.signals[BESIDE] > 0
    assert 0 < int(beside_S.sum()) < 12

    def alone(chosen_S: Tensor) -> Batch:
        part = whole.part(chosen_S)
        return replace(part, signals={name: value for name, value in part.signals.items() if name != BESIDE})

    return whole, alone(~beside_S), alone(beside_S)


def test_the_gradient_is_that_of_the_main_objective_plus_the_weighted_other() -> None:
    world = World()
    whole, main, beside = halves(world)
    mixed = gradient(world, Mix.model_validate({"main": MAIN, "beside": BESIDES, "weight": 0.3}), [whole])
    parts = gradient(world, Objective.model_validate(MAIN), [main]), gradient(
        world, Objective.model_validate(BESIDES), [beside]
    )
    expected = parts[0] + 0.3 * parts[1]
    assert float((mixed - expected).norm() / expected.norm()) <= FLOAT64_GRADIENT_RELATIVE
    assert float((mixed - parts[0]).norm() / mixed.norm()) > 1e-3


def test_a_weight_of_0_is_off_to_the_last_bit() -> None:
    world = World()
    whole, _, _ = halves(world)
    plain = replace(whole, signals={name: value for name, value in whole.signals.items() if name != BESIDE})
    tagged = replace(plain, signals={**plain.signals, BESIDE: torch.zeros(12)})
    off = Mix.model_validate({"main": MAIN, "beside": {"kind": "kto"}, "weight": 0.0})
    assert torch.equal(gradient(world, off, [tagged]), gradient(world, Objective.model_validate(MAIN), [plain]))
    assert off.wants == ("logp",) and "liked_S" not in off.reads
    names = [term.name for term in off.terms(world.policy(whole, off.wants), whole)]
    assert not [name for name in names if name.startswith("beside/")]


def test_each_side_is_counted_by_itself() -> None:
    whole, main, beside = halves(World())
    counts = count([whole])
    for prefix, part in (("", main), ("beside/", beside)):
        assert {unit: counts[prefix + unit] for unit in count([part])} == count([part])


def test_a_mix_says_what_both_sides_want_and_read_and_asks_the_main_one_for_credit() -> None:
    mix = Mix.model_validate({"main": {"kind": "ppo", "kl": 0.0}, "beside": {"kind": "causal_lm", "z_loss": 0.1}})
    assert mix.wants == ("logp", "value", "log_partition")
    assert mix.reads == ("old_logp_BT", "advantage_BT", "old_value_BT", "return_BT", "beside_S")
    assert Mix.model_validate({"beside": {"kind": "kto", "point": "own"}}).whole_steps and not mix.whole_steps
