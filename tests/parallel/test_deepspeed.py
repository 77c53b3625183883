"""DeepSpeed's engine: what it refuses anywhere; and where DeepSpeed is installed, states and skipped steps."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from llmtrainer.base.errors import UserError
from llmtrainer.core.batch import Batch, Outputs
from llmtrainer.core.protocols import Engine, EngineConfig, Rule
from llmtrainer.optim.groups import group
from llmtrainer.parallel.world import PATIENCE, World
from llmtrainer.parallel.zero_settings import is_installed
from tests.parallel.hooked import resume, save
from tests.parallel.test_single import TinyPolicy, rows
from tests.processes import Processes, processes  # noqa: F401  a fixture
from tests.tolerances import FLOAT32_ENGINES_RELATIVE

needs_deepspeed = pytest.mark.skipif(
    not is_installed(), reason="DeepSpeed is not installed: llmtrainer[deepspeed]"
)
LAYOUTS: list[dict[str, Any]] = [
    {"stage": 0}, {"stage": 1}, {"stage": 2}, {"stage": 3, "whole_below": 0},
    {"stage": 2, "offload_optimizer": "cpu"}, {"stage": 3, "whole_below": 0, "offload_optimizer": "cpu"},
    {"stage": 3, "whole_below": 0, "offload_optimizer": "cpu", "offload_parameters": "cpu"},
]  # fmt: skip
TRIED = pytest.mark.parametrize("layout", LAYOUTS, ids=lambda layout: "-".join(str(value) for value in layout.values()))


@pytest.mark.parametrize(
    ("settings", "precision", "fix"), [
        ({}, "float64", "precision=float32"), ({"compile": True}, "float32", "engine.compile=false"),
        ({"stage": 0, "offload_optimizer": "cpu"}, "float32", "engine.stage=1"),
        ({"offload_parameters": "cpu"}, "float32", "engine.stage=3"),
        ({"quantized_weights": True}, "float32", "engine.stage=3"),
        ({"hpz_partition_size": 8}, "float32", "engine.stage=3"),
        ({"offload_optimizer": "nvme"}, "float32", "engine.nvme_path"),
    ],
)  # fmt: skip
def test_what_cannot_be_is_refused_before_anybody_is_met(settings: dict[str, Any], precision: str, fix: str) -> None:
    with pytest.raises(UserError, match=fix):
        EngineConfig.model_validate({"kind": "deepspeed", "device": "cpu", **settings}).start(precision)


@pytest.mark.skipif(is_installed(), reason="DeepSpeed is installed")
def test_without_deepspeed_the_extra_is_named() -> None:
    with pytest.raises(UserError, match=r"llmtrainer\[deepspeed\]"):
        EngineConfig.model_validate({"kind": "deepspeed", "device": "cpu"}).start("float32")


def engine_of(settings: dict[str, Any], precision: str = "float32") -> tuple[Any, TinyPolicy]:
    World(torch.device("cpu"), PATIENCE)    # holds the process group, so that engines may come and go
    engine = EngineConfig.model_validate({"device": "cpu", **settings}).start(precision)
    policy = TinyPolicy()
    engine.prepare(policy, Rule.model_validate({"kind": "adamw"}), group(policy.named_parameters()))
    return engine, policy


def step(engine: Engine, number: int, clip: float | None = 0.5, spoil: bool = False) -> tuple[float, bool]:
    """One step over a batch that the ranks share."""
    batch = rows(number)
    place = batch.place_B % engine.world_size == engine.rank
    weights = batch.weights_BT * place[:, None]
    with engine.micro(last=True):
        out = engine.forward(batch, ("logp",))
        assert out.logp_BT is not None
        engine.backward(-(weights * out.logp_BT).sum() * (float("inf") if spoil and engine.rank else 1.0))
    norm = float(engine.clip(clip))
    if not spoil or engine.rescales:
        return norm, engine.step(1e-2)
    engine.discard()
    return norm, False


def flat(engine: Engine, policy: TinyPolicy) -> Tensor:
    return torch.cat([value.flatten() for value in engine.weights(policy).values()]).clone()


def trained(settings: dict[str, Any], steps: int, spoiled: tuple[int, ...] = ()) -> dict[str, Any]:
    engine, policy = engine_of(settings)
    told = [step(engine, number, spoil=number in spoiled) for number in range(steps)]
    return {"weights": flat(engine, policy), "told": told}


def alone(steps: int, spoiled: tuple[int, ...] = ()) -> tuple[Tensor, list[float]]:
    """The same by one process."""
    engine, policy = engine_of({"kind": "single"})
    norms = [step(engine, number)[0] for number in range(steps) if number not in spoiled]
    return flat(engine, policy), norms


def continued(before: dict[str, Any], after: dict[str, Any], file: str) -> Tensor:
    """Three steps, a file, three more steps by an engine that began anew."""
    engine, policy = engine_of(before)
    for number in range(3):
        step(engine, number)
    state, weights = engine.state(), engine.weights(policy)
    if engine.rank == 0:
        save(state | {f"weight.{name}": value for name, value in weights.items()}, file)
    engine.world.meet()
    again, fresh = engine_of(after)
    with again.whole(fresh) if after["kind"] == "deepspeed" else torch.no_grad():
        resume(again, fresh, file, state=False)
    resume(again, fresh, file, weights=False)
    for number in range(3, 6):
        step(again, number)
    return flat(again, fresh)


@needs_deepspeed
@TRIED
def test_two_processes_clip_and_learn_as_one_and_leave_out_a_step_that_is_not_finite(
    layout: dict[str, Any], processes: Processes  # noqa: F811
) -> None:
    weights, norms = processes.run(1, alone, 5, (2,))[0]
    for found in processes.run(2, trained, {"kind": "deepspeed", **layout}, 5, (2,)):
        assert float((found["weights"] - weights).abs().max() / weights.abs().max()) <= FLOAT32_ENGINES_RELATIVE
        assert [updated for _, updated in found["told"]] == [True, True, False, True, True]
        finite = [norm for norm, updated in found["told"] if updated]
        assert finite == pytest.approx(norms, rel=FLOAT32_ENGINES_RELATIVE)


@needs_deepspeed
@TRIED
def test_a_saved_run_goes_on_with_the_same_bits(
    layout: dict[str, Any], processes: Processes, tmp_path: Path  # noqa: F811
) -> None:
    settings = {"kind": "deepspeed", **layout}
    whole = processes.run(2, trained, settings, 6)[0]["weights"]
    for found in processes.run(2, continued, settings, settings, str(tmp_path / "state")):
        assert torch.equal(found, whole)


@needs_deepspeed
def test_a_run_goes_on_in_another_engine_and_back(processes: Processes, tmp_path: Path) -> None:  # noqa: F811
    weights, _ = processes.run(1, alone, 6)[0]
    deepspeed = {"kind": "deepspeed", "stage": 2}
    for one, other in ((deepspeed, {"kind": "ddp"}), ({"kind": "ddp"}, deepspeed)):
        found = processes.run(2, continued, one, other, str(tmp_path / "state"))[0]
        assert float((found - weights).abs().max() / weights.abs().max()) <= FLOAT32_ENGINES_RELATIVE


class Spare(TinyPolicy):
    """A policy with a parameter that takes part in some steps only, or in none."""

    def __init__(self) -> None:
        super().__init__()
        self.spare = nn.Parameter(torch.linspace(0.5, 1.5, 7))
        self.asked = False

    def forward(self, batch: Batch, wants: tuple[str, ...]) -> Outputs:
        out = super().forward(batch, wants)
        assert out.logp_BT is not None
        return Outputs(logp_BT=out.logp_BT * self.spare.mean()) if self.asked else out


def idle(settings: dict[str, Any], begins: int | None, file: str) -> dict[str, Any]:
    """Steps with a parameter that takes part from a step on, and decay; what is saved, and steps after it."""
    World(torch.device("cpu"), PATIENCE)
    found: dict[str, Any] = {}
    for life in ("first", "second"):
        engine = EngineConfig.model_validate({"device": "cpu", **settings}).start("float32")
        policy = Spare()
        rule = Rule.model_validate({"kind": "adamw", "weight_decay": 0.1, "epsilon": 1e-2})
        engine.prepare(policy, rule, group(policy.named_parameters(), ()))
        if life == "second":
            with engine.whole(policy):
                resume(engine, policy, file, state=False)
            resume(engine, policy, file, weights=False)
        try:
            for number in range(3):
                policy.asked = begins is not None and number >= begins
                step(engine, number)
        except UserError as error:
            return {"error": str(error)}
        state, weights = engine.state(), engine.weights(policy)
        if life == "first" and engine.rank == 0:
            save(state | {f"weight.{name}": value for name, value in weights.items()}, file)
        if engine.world_size > 1:
            engine.world.meet()
        found[life] = {name: value.clone() for name, value in weights.items()}, sorted(state)
    return found


@needs_deepspeed
@TRIED
def test_what_takes_part_in_no_step_is_left_alone_as_by_one_process(
    layout: dict[str, Any], processes: Processes, tmp_path: Path  # noqa: F811
) -> None:
    """DeepSpeed makes it a gradient of zeros, by which it would decay."""
    alone_one = processes.run(1, idle, {"kind": "single"}, None, str(tmp_path / "alone"))[0]
    for found in processes.run(2, idle, {"kind": "deepspeed", **layout}, None, str(tmp_path / "state")):
        for life, (weights, names) in found.items():
            assert torch.equal(weights["spare"], Spare().spare)
            assert names == alone_one[life][1] and "optimizer.spare.untouched" in names
            for name, value in alone_one[life][0].items():
                assert float((weights[name] - value).abs().max() / value.abs().max()) <= FLOAT32_ENGINES_RELATIVE


@needs_deepspeed
def test_what_takes_part_in_some_steps_only_is_refused(processes: Processes, tmp_path: Path) -> None:  # noqa: F811
    for found in processes.run(2, idle, {"kind": "deepspeed", "stage": 2}, 1, str(tmp_path / "state")):
        assert "take part in some steps and not in others" in found["error"] and "spare" in found["error"]
