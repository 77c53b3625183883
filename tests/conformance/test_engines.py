"""What every engine of several processes owes: for every objective, the steps of one process that has all the rows."""

from __future__ import annotations

import gc
import weakref
from functools import cache
from typing import Any

import pytest
import torch
import torch.distributed as dist

from llmtrainer.base.kinds import kinds_in
from llmtrainer.core.objective import Objective, count, loss_of
from llmtrainer.core.protocols import Engine, EngineConfig, Rule
from llmtrainer.optim.groups import group
from llmtrainer.parallel.engines.single import SingleEngine
from tests.conformance.objectives import TRIED, Settings, World, name_of
from tests.processes import Processes, processes  # noqa: F401  a fixture
from tests.tolerances import FLOAT32_ENGINES_RELATIVE, FLOAT64_ENGINES_RELATIVE

KINDS = [kind for kind in kinds_in(EngineConfig.folder) if kind != "single"]
SETTINGS: dict[str, dict[str, Any]] = {kind: {"find_unused_parameters": True} for kind in ("ddp", "zero1")}
"""Beside a kind's defaults."""
FLOAT32 = ("deepspeed",)
"""Kinds that know no float64."""
CUTS: list[list[tuple[int, ...]]] = [[(2, 1), (1, 2)], [(4,), (2,)]]
"""How each of a few steps is cut: the prompts of each micro-batch of each rank, uneven on purpose."""


def trained(
    engine: Engine, settings: Settings, steps: list[list[tuple[int, ...]]], precision: str = "float64"
) -> list[float]:
    """Norms of the gradients of a few clipped steps, and all weights after them."""
    objective, world = Objective.model_validate(settings), World(settings, dropout=0.1)
    policy = world.policy.to(getattr(torch, precision))
    # In float32, where a gradient is nothing but rounding, its sign must not decide a whole step of Adam's.
    epsilon = 1e-8 if precision == "float64" else 1e-2
    rule = Rule.model_validate({"kind": "adamw", "weight_decay": 0.1, "epsilon": epsilon})
    engine.prepare(policy, rule, group(policy.named_parameters(), ()))
    told = []
    for step in steps:
        sizes = [size for share in step for size in share]
        begin = sum(len(share) for share in step[: engine.rank])
        batches = world.step(sizes)[begin : begin + len(step[engine.rank])]
        counts = engine.sum(count(batches))
        engine.begin(1e-2)
        for index, batch in enumerate(batches):
            with engine.micro(last=index == len(batches) - 1):
                engine.backward(loss_of(objective.terms(engine.forward(batch, objective.wants), batch), counts))
        told.append(float(engine.clip(0.5)))
        engine.step(1e-2)
    return told + torch.cat([value.flatten() for value in engine.weights(policy).values()]).tolist()


@cache
def alone(number: int, precision: str) -> torch.Tensor:
    """What one process makes of all the rows; worked out once, whatever the engine it is held against."""
    engine = SingleEngine(torch.device("cpu"), precision)
    cuts = [[sum(step, ())] for step in CUTS]
    return torch.tensor(trained(engine, TRIED[number], cuts, precision), dtype=torch.float64)


def apart(kind: str) -> list[float]:
    """In each process: the farthest number from those of one process, for every objective, relative to the largest of
    its sort."""
    found = []
    dist.init_process_group("gloo")     # for all engines, which leave it to each other
    for number, settings in enumerate(TRIED):
        config = EngineConfig.model_validate({"kind": kind, "device": "cpu", **SETTINGS.get(kind, {})})
        precision = "float32" if kind in FLOAT32 else "float64"
        engine = config.start(precision)
        mine = torch.tensor(trained(engine, settings, CUTS, precision), dtype=torch.float64)
        whole = alone(number, precision) if engine.rank == 0 else torch.empty_like(mine)
        dist.broadcast(whole, src=0)
        engine.close()
        parts = [slice(0, len(CUTS)), slice(len(CUTS), None)]     # norms, and weights, which are much smaller
        found.append(max(float((mine[part] - whole[part]).abs().max() / whole[part].abs().max()) for part in parts))
    return found


@pytest.fixture(scope="module")
def distances(processes: Processes) -> Any:  # noqa: F811  the fixture
    """Kind -> for each of two processes, the distances of all objectives; worked out once, in processes kept for it."""
    return cache(lambda kind: processes.run(2, apart, kind))


@pytest.mark.parametrize("number", range(len(TRIED)), ids=[name_of(settings) for settings in TRIED])
@pytest.mark.parametrize("kind", KINDS)
def test_two_processes_learn_what_one_learns_from_every_objective(
    kind: str, number: int, distances: Any
) -> None:
    if kind in FLOAT32:
        pytest.importorskip(kind, reason=f"{kind} is not installed: llmtrainer[{kind}]")
    limit = FLOAT32_ENGINES_RELATIVE if kind in FLOAT32 else FLOAT64_ENGINES_RELATIVE
    for rank, found in enumerate(distances(kind)):
        assert found[number] <= limit, f"rank {rank}"


def gathered(kind: str) -> list[list[list[int]]]:
    """What a process is told of lists of different lengths, one of them empty."""
    engine = EngineConfig.model_validate({"kind": kind, "device": "cpu"}).start("float32")
    lists = (range(3 * engine.rank), range(engine.rank, 2), ())
    return [[one.tolist() for one in engine.gather(torch.tensor(list(own), dtype=torch.int64))] for own in lists]


@pytest.mark.parametrize("kind", KINDS)
def test_what_each_rank_has_every_rank_is_told(kind: str, processes: Processes) -> None:  # noqa: F811
    if kind in FLOAT32:
        pytest.importorskip(kind, reason=f"{kind} is not installed: llmtrainer[{kind}]")
    for found in processes.run(2, gathered, kind):
        assert found == [[[], [0, 1, 2]], [[0, 1], [1]], [[], []]]


def left_behind(kind: str) -> list[str]:
    """In each process: what still exists of an engine that has trained a model and ended."""
    config = EngineConfig.model_validate({"kind": kind, "device": "cpu", **SETTINGS.get(kind, {})})
    engine = config.start("float32")
    assert isinstance(engine, SingleEngine)
    trained(engine, TRIED[0], CUTS, "float32")
    engine.close()
    seen = {"the engine": weakref.ref(engine), "the first parameter": weakref.ref(engine._parameters[0])}
    del engine
    gc.collect()
    return [name for name, still in seen.items() if still() is not None]


@pytest.mark.parametrize("kind", KINDS)
def test_an_ended_engine_and_its_model_are_freed(kind: str, processes: Processes) -> None:  # noqa: F811
    """Else each run of one process, as in a notebook or a search, would keep the models of all runs before."""
    if kind in FLOAT32:
        pytest.importorskip(kind, reason=f"{kind} is not installed: llmtrainer[{kind}]")
    for found in processes.run(2, left_behind, kind):
        assert found == []
