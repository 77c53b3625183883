"""What is divided among processes and when it travels: state, gradients, weights; and what may not change by it."""

from __future__ import annotations

import threading
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn

from llmtrainer.core.objective import count, loss_of
from llmtrainer.core.pieces import own
from llmtrainer.core.protocols import Engine, EngineConfig, Rule
from llmtrainer.objectives.causal_lm import CausalLM
from llmtrainer.optim.groups import group
from llmtrainer.parallel.early import EarlySteps
from llmtrainer.parallel.engines.single import SingleEngine
from tests.processes import SECONDS, Processes, processes  # noqa: F401  a fixture
from tests.tolerances import FLOAT64_ENGINES_RELATIVE
from tests.worlds import ragged_documents, row_batch, tiny_model

Settings = dict[str, Any]
KINDS = ("zero1", "fsdp2")
RULES = ("adamw", "lion", "muon", "adafactor", "adamw_8bit")
DOCUMENTS = ragged_documents([5, 19, 3, 1, 28, 2, 16, 4, 11, 30])


def started(settings: Settings, precision: str = "float64", rule: str = "adamw") -> tuple[Engine, Any]:
    """An engine and the tiny policy it was given; `alone` is one process that trains by itself."""
    policy = tiny_model(getattr(torch, precision))
    chosen = Rule.model_validate({"kind": rule})
    if settings["kind"] == "alone":
        engine: Engine = SingleEngine(torch.device("cpu"), precision)
    else:
        engine = EngineConfig.model_validate({"device": "cpu", **settings}).start(precision)
    engine.prepare(policy, chosen, group(policy.named_parameters(), ()))
    return engine, policy


def step(engine: Engine, micro_batches: int = 1, clip: float | None = None) -> float:
    """One step over all documents, divided among ranks and micro-batches; the norm of its gradient."""
    mine = DOCUMENTS[engine.rank :: engine.world_size]
    batches = [row_batch(mine[number::micro_batches]) for number in range(micro_batches)]
    counts = engine.sum(count(batches))
    objective = CausalLM()
    engine.begin(1e-2)
    for index, batch in enumerate(batches):
        with engine.micro(last=index == len(batches) - 1):
            engine.backward(loss_of(objective.terms(engine.forward(batch, objective.wants), batch), counts))
    norm = float(engine.clip(clip))
    engine.step(1e-2)
    return norm


def weights(engine: Engine, policy: nn.Module) -> list[float]:
    return torch.cat([value.flatten().double() for value in engine.weights(policy).values()]).tolist()


def farthest(these: list[float], those: list[float]) -> float:
    return max(abs(one - other) for one, other in zip(these, those, strict=True))


# What the optimizer keeps.


def kept(settings: Settings, rule: str) -> tuple[int, int, list[float]]:
    """Bytes of this rank's optimizer state after two steps, bytes of its largest tensor; all weights."""
    engine, policy = started(settings, rule=rule)
    for _ in range(2):
        step(engine, clip=0.5)
    sizes = [own(value).nbytes for name, value in engine.state().items() if name.startswith("optimizer.")]
    return sum(sizes), max(sizes), weights(engine, policy)


@pytest.mark.parametrize(("kind", "rule"), [
    *(("zero1", rule) for rule in RULES), ("fsdp2", "adamw"), ("fsdp2", "lion"),
])  # fmt: skip
def test_a_rank_keeps_half_of_the_optimizers_state_and_learns_the_same(
    kind: str, rule: str, processes: Processes  # noqa: F811  the fixture
) -> None:
    whole, largest, learned = kept({"kind": "alone"}, rule)
    for size, _, found in processes.run(2, kept, {"kind": kind}, rule):
        assert size <= whole / 2 + largest
        assert farthest(found, learned) < FLOAT64_ENGINES_RELATIVE * 1e3 if rule != "adamw_8bit" else True


def resident(settings: Settings) -> dict[str, int]:
    """Bytes of weights, gradients and optimizer state that this rank has between two steps."""
    engine, policy = started(settings)
    step(engine)
    mine = [own(parameter) for parameter in policy.parameters()]
    state = [own(value) for name, value in engine.state().items() if name.startswith("optimizer.")]
    batch = row_batch(DOCUMENTS)
    loss_of(CausalLM().terms(engine.forward(batch, ("logp",)), batch), engine.sum(count([batch]))).backward()
    gradients = [own(parameter.grad) for parameter in policy.parameters() if parameter.grad is not None]
    return {
        name: sum(value.nbytes for value in values)
        for name, values in (("weights", mine), ("gradients", gradients), ("state", state))
    }


def test_fsdp2_leaves_a_rank_its_share_of_weights_gradients_and_state(
    processes: Processes,  # noqa: F811  the fixture
) -> None:
    """Rows of every tensor are even here, so that shares are exact but for the state's counters of steps."""
    whole = resident({"kind": "alone"})
    for found in processes.run(2, resident, {"kind": "fsdp2"}):
        assert found["weights"] == whole["weights"] // 2
        assert found["gradients"] == whole["gradients"] // 2
        assert whole["state"] // 2 <= found["state"] < whole["state"] // 2 + 200


# How often anything travels.


def messages(settings: Settings, micro_batches: int) -> list[int]:
    """Reductions, gatherings and broadcasts of each of three steps."""
    engine, _ = started(settings)
    counted = {"reduce": 0, "gather": 0, "broadcast": 0}

    def counting(name: str, run: Callable[..., Any]) -> Callable[..., Any]:
        def call(*arguments: Any, **named: Any) -> Any:
            counted[name] += 1
            return run(*arguments, **named)

        return call

    replaced = {"reduce_scatter_single": "reduce", "all_gather_single": "gather", "broadcast": "broadcast"}
    before = {name: getattr(dist, name) for name in replaced}
    for name, kind in replaced.items():
        setattr(dist, name, counting(kind, before[name]))
    try:
        found = []
        for _ in range(3):
            at = dict(counted), getattr(engine, "collectives", 0)
            step(engine, micro_batches)
            reduced = counted["reduce"] - at[0]["reduce"] + getattr(engine, "collectives", 0) - at[1]
            found += [reduced, counted["gather"] - at[0]["gather"], counted["broadcast"] - at[0]["broadcast"]]
        return found
    finally:
        for name, run in before.items():
            setattr(dist, name, run)


@pytest.mark.parametrize("micro_batches", [1, 2, 5])
def test_gradients_travel_once_a_step_however_many_micro_batches_it_has(
    micro_batches: int, processes: Processes  # noqa: F811  the fixture
) -> None:
    for found in processes.run(2, messages, {"kind": "zero1"}, micro_batches):
        assert found == [1, 0, 2] * 3       # one bucket of gradients; the new weights of each rank
    # Two blocks and the rest: summed once a step. Gathered for each forward, and the blocks for each backward again.
    for found in processes.run(2, messages, {"kind": "fsdp2"}, micro_batches):
        assert found == [3, 5 * micro_batches, 0] * 3
    for found in processes.run(2, messages, {"kind": "fsdp2", "reshard_after_forward": False}, micro_batches):
        assert found == [3, 3 * micro_batches, 0] * 3


# In which order.


def order(settings: Settings) -> tuple[list[str], list[float]]:
    """What happens in the third step, in its order; all weights afterwards."""
    engine, policy = started(settings)
    told: list[str] = []
    updated, watched = threading.Event(), list[bool]()

    def telling(word: str, run: Callable[..., Any]) -> Callable[..., Any]:
        def call(*arguments: Any, **named: Any) -> Any:
            told.append(word)
            if word == "update":
                updated.set()
            return run(*arguments, **named)

        return call

    def reducing(run: Callable[..., Any]) -> Callable[..., Any]:
        """Holds the last bucket back until something was updated: which of two threads is faster decides nothing."""
        def call(bucket: Any) -> Any:
            if watched and settings.get("step_in_backward") and bucket.is_last():
                updated.wait(SECONDS / 4)
            told.append("reduce")
            return run(bucket)

        return call

    replaced: list[tuple[Any, str, str]] = [
        (dist, "reduce_scatter_single", "reduce"), (dist, "all_gather_single", "gather"),
        (EarlySteps, "update", "update"),
    ]
    if settings["kind"] == "ddp":
        replaced.append((engine, "_reduce", "reduce"))
    first = policy.model.layers[0]
    first.register_forward_hook(lambda *_: told.append("forward of the first block ends"))
    first.register_full_backward_hook(lambda *_: told.append("backward of the first block ends"))
    before = [getattr(owner, name) for owner, name, _ in replaced]
    for (owner, name, word), run in zip(replaced, before, strict=True):
        setattr(owner, name, reducing(run) if name == "_reduce" else telling(word, run))
    try:
        for number in range(3):
            told.clear()
            updated.clear()
            watched += [True] * (number == 2)    # torch lays its buckets out anew after the first step
            step(engine, 2)
        return list(told), weights(engine, policy)
    finally:
        for (owner, name, _), run in zip(replaced, before, strict=True):
            setattr(owner, name, run)


SMALL: Settings = {"kind": "ddp", "bucket_mib": 0.02}
"""So that there are many buckets."""
ENDS = "backward of the first block ends"


@pytest.mark.parametrize("settings", [SMALL, {"kind": "fsdp2"}])
def test_gradients_are_on_their_way_before_backward_has_come_to_the_first_block(
    settings: Settings, processes: Processes  # noqa: F811  the fixture
) -> None:
    for told, _ in processes.run(2, order, settings):
        assert "reduce" in told
        last_backward = len(told) - told[::-1].index(ENDS) - 1
        assert told.index("reduce") < last_backward


def test_without_overlap_they_wait_for_its_end_and_weights_are_the_same_bits(
    processes: Processes,  # noqa: F811  the fixture
) -> None:
    overlapping = processes.run(2, order, SMALL)
    waiting = processes.run(2, order, {**SMALL, "overlap_reduce": False})
    for (told, found), (_, expected) in zip(waiting, overlapping, strict=True):
        last_backward = len(told) - told[::-1].index(ENDS) - 1
        assert told.count("reduce") > 2 and told.index("reduce") > last_backward
        assert found == expected


@pytest.mark.parametrize("settings", [SMALL, {"kind": "fsdp2"}])
def test_the_first_parameters_are_updated_before_the_last_gradients_travel_and_become_the_same_bits(
    settings: Settings, processes: Processes  # noqa: F811  the fixture
) -> None:
    later = processes.run(2, order, settings)
    early = processes.run(2, order, {**settings, "step_in_backward": True})
    for (told, found), (_, expected) in zip(early, later, strict=True):
        assert told.index("update") < len(told) - told[::-1].index("reduce") - 1
        assert found == expected


def test_a_block_is_gathered_while_the_one_before_computes_and_numbers_stay_the_same_bits(
    processes: Processes,  # noqa: F811  the fixture
) -> None:
    plain = processes.run(2, order, {"kind": "fsdp2"})
    ahead = processes.run(2, order, {"kind": "fsdp2", "prefetch": 1})
    for (before, expected), (told, found) in zip(plain, ahead, strict=True):
        ends = "forward of the first block ends"
        assert before[: before.index(ends)].count("gather") == 2    # embeddings, the first block
        assert told[: told.index(ends)].count("gather") == 3        # and the second
        assert found == expected


# Parameters that take part twice, sometimes, or never.


@dataclass(frozen=True)
class Asked:
    """A batch of numbers, and which of two weights reads them."""

    x: Tensor
    gate: int

    def to(self, device: torch.device) -> Asked:
        return self


class Gate(nn.Module):
    """A block with two weights, of which one is used."""

    def __init__(self) -> None:
        super().__init__()
        self.either = nn.ParameterList(nn.Parameter(torch.randn(4, 4, dtype=torch.float64)) for _ in range(2))

    def forward(self, gate: int, x: Tensor) -> Tensor:
        return torch.tanh(x @ self.either[gate])


class Gated(nn.Module):
    """Two blocks between one weight that is used twice; another is never used."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(5)
        self.shared = nn.Parameter(torch.randn(4, 4, dtype=torch.float64))
        self.never = nn.Parameter(torch.randn(4, 4, dtype=torch.float64))
        self.layers = nn.ModuleList(Gate() for _ in range(2))

    def blocks(self) -> list[nn.Module]:
        return list(self.layers)

    def forward(self, batch: Asked, wants: tuple[str, ...]) -> Tensor:
        x = batch.x @ self.shared
        for block in self.layers:
            x = block(batch.gate, x)
        return x @ self.shared


def gated(settings: Settings, gates: list[int]) -> list[float]:
    """Weights after two steps in which rank r goes through gate `gates[r]`; one process goes through all."""
    policy = Gated()
    if settings["kind"] == "alone":
        engine: Any = SingleEngine(torch.device("cpu"), "float64")
    else:
        engine = EngineConfig.model_validate({"device": "cpu", **settings}).start("float64")
    engine.prepare(policy, Rule.model_validate({"kind": "adamw"}), group(policy.named_parameters(), ()))
    alone = settings["kind"] == "alone"
    for _ in range(2):
        mine = list(enumerate(gates)) if alone else [(engine.rank, gates[engine.rank])]
        for number, (place, gate) in enumerate(mine):
            x = torch.linspace(-1, 1, 8, dtype=torch.float64).view(2, 4) * (place + 1)
            with engine.micro(last=number == len(mine) - 1):
                engine.backward(engine.forward(Asked(x, gate), ()).square().sum())
        engine.clip(0.5)
        engine.step(1e-2)
    return weights(engine, policy)


@pytest.mark.parametrize("gates", [[0, 1], [0, 0]])
@pytest.mark.parametrize("kind", ["ddp", "zero1", "fsdp2"])
def test_parameters_used_twice_on_one_rank_alone_or_never_become_what_they_do_in_one_process(
    kind: str, gates: list[int], processes: Processes  # noqa: F811  the fixture
) -> None:
    """The one that is never used is not even decayed."""
    expected = gated({"kind": "alone"}, gates)
    settings = {"kind": kind} if kind == "fsdp2" else {"kind": kind, "find_unused_parameters": True}
    for found in processes.run(2, gated, settings, gates):
        assert farthest(found, expected) < FLOAT64_ENGINES_RELATIVE


def given_up(settings: Settings) -> list[float]:
    """Weights after a step behind one that was given up before its last micro-batch."""
    engine, policy = started(settings)
    batch = row_batch(DOCUMENTS)
    for _ in range(2):
        with engine.micro(last=False):
            logp_BT = engine.forward(batch, ("logp",)).logp_BT
            assert logp_BT is not None
            engine.backward(logp_BT.sum())
    engine.discard()
    step(engine, 2)
    return weights(engine, policy)


@pytest.mark.parametrize("settings", [{"kind": "zero1"}, {"kind": "fsdp2"}])
def test_nothing_of_a_step_that_was_given_up_is_in_the_next(
    settings: Settings, processes: Processes  # noqa: F811  the fixture
) -> None:
    expected = given_up({"kind": "alone"})
    for found in processes.run(2, given_up, settings):
        assert farthest(found, expected) < FLOAT64_ENGINES_RELATIVE


# The whole model for a while.


def read_between(settings: Settings) -> list[float]:
    """What rank 1 alone reads of the whole policy before the first step and after it, and all weights after two."""
    engine, policy = started(settings)
    told = []
    for _ in range(2):
        with engine.whole(policy), torch.no_grad():
            if engine.rank == engine.world_size - 1:
                told += policy.hidden(row_batch(DOCUMENTS[:1])).flatten().tolist()
        step(engine)
    told = told if told else [0.0]
    return told + weights(engine, policy)


def test_one_process_may_read_the_whole_policy_by_itself_before_and_between_steps(
    processes: Processes,  # noqa: F811  the fixture
) -> None:
    expected = read_between({"kind": "alone"})
    _, found = processes.run(2, read_between, {"kind": "fsdp2"})
    assert farthest(found, expected) < FLOAT64_ENGINES_RELATIVE


# 16 bits.


def overflowing(settings: Settings) -> tuple[bool, bool, float, float]:
    """A step whose loss overflows on the last rank alone: whether it was made, whether weights stayed, and by what the
    loss is scaled before and after; then one that does not overflow."""
    engine, policy = started(settings, "float16")
    step(engine)
    before, scale = weights(engine, policy), float(engine.state().get("engine.loss_scale", torch.zeros(())))
    batch = row_batch(DOCUMENTS)
    out = engine.forward(batch, ("logp",)).logp_BT
    assert out is not None
    with engine.micro(last=True):
        engine.backward(out.sum() * (float("inf") if engine.rank == engine.world_size - 1 else 1.0))
    engine.clip(1.0)
    made = engine.step(1e-2)
    stayed = weights(engine, policy) == before
    after = float(engine.state().get("engine.loss_scale", torch.zeros(())))
    step(engine)
    return made, stayed and weights(engine, policy) != before, scale, after


@pytest.mark.parametrize("kind", KINDS)
def test_an_overflow_on_one_rank_is_a_step_that_no_rank_makes(
    kind: str, processes: Processes  # noqa: F811  the fixture
) -> None:
    found = processes.run(2, overflowing, {"kind": kind})
    assert found[0][:2] == found[1][:2] == (False, True)
    assert found[0][2:] == (2.0**16, 2.0**15)


def narrow(settings: Settings) -> list[float]:
    engine, policy = started(settings, "bfloat16")
    for _ in range(3):
        step(engine, 2, clip=1.0)
    return weights(engine, policy)


@pytest.mark.parametrize("settings", [
    {"kind": "zero1"}, {"kind": "fsdp2"}, {"kind": "fsdp2", "gather": "compute"},
])  # fmt: skip
def test_in_bfloat16_masters_stay_float32_and_equal_on_every_rank(
    settings: Settings, processes: Processes  # noqa: F811  the fixture
) -> None:
    alone = narrow({"kind": "alone"})
    first, second = processes.run(2, narrow, settings)
    assert first == second
    assert any(value != float(torch.tensor(value).bfloat16()) for value in first)
    apart = [abs(one - other) for one, other in zip(first, alone, strict=True)]
    assert sum(apart) / len(apart) < 1e-3    # a tenth of a step, where single gradients near 0 may change sign
