"""A few steps under a hook with gradients that are told: what one of several processes does."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from llmtrainer.core.batch import Outputs
from llmtrainer.core.protocols import Engine, EngineConfig, Rule
from llmtrainer.optim.groups import group
from llmtrainer.parallel.engines.ddp import DdpEngine
from llmtrainer.parallel.hook import Bucket, Hook, Onward
from llmtrainer.parallel.world import PATIENCE, World

SHAPES: dict[str, tuple[int, ...]] = {
    "first": (24, 20), "bias": (12,), "cube": (14, 6, 5), "second": (18, 24), "narrow": (3, 40), "last": (5,),
}
"""Matrices, vectors between them, and a tensor of three axes."""
BUCKET_MIB = 1e-3
"""So that there are several."""


class Halved(Hook):
    """Half of every gradient."""

    def exchange(self, bucket: Bucket, onward: Onward) -> None:
        onward(bucket)
        bucket.buffer.mul_(0.5)


class Counted(Hook):
    """Adds 1 for every time that it sees a number."""

    def exchange(self, bucket: Bucket, onward: Onward) -> None:
        onward(bucket)
        for item in bucket.tensors:
            item.add_(1.0)


class Broken(Hook):
    """Cannot."""

    def exchange(self, bucket: Bucket, onward: Onward) -> None:
        raise ValueError("the third wheel")


class Given(nn.Module):
    """Parameters whose gradients are told, and not worked out from a loss that anybody would want."""

    def __init__(self, shapes: Mapping[str, tuple[int, ...]], dtype: torch.dtype) -> None:
        super().__init__()
        for name, shape in shapes.items():
            self.register_parameter(name, nn.Parameter(torch.zeros(shape, dtype=dtype)))

    def forward(self, batch: Wanted, wants: tuple[str, ...]) -> Outputs:
        products = [(parameter * batch.gradients[name]).sum() for name, parameter in self.named_parameters()]
        return Outputs(logp_BT=torch.stack(products))


class Wanted:
    """Stands for a batch."""

    def __init__(self, gradients: Mapping[str, Tensor]) -> None:
        self.gradients = gradients

    def to(self, device: torch.device) -> Wanted:
        return self


def gradients(
    step: int, rank: int, shapes: Mapping[str, tuple[int, ...]] = SHAPES, dtype: torch.dtype = torch.float64
) -> dict[str, Tensor]:
    """Of one rank: any numbers."""
    draw = torch.Generator().manual_seed(1_000 * step + rank)
    return {name: torch.randn(shape, generator=draw, dtype=torch.float64).to(dtype) for name, shape in shapes.items()}


def started(hook: Mapping[str, Any], precision: str, shapes: Mapping[str, tuple[int, ...]]) -> tuple[DdpEngine, Given]:
    World(torch.device("cpu"), PATIENCE)    # holds the process group, so that engines may come and go
    settings = {"kind": "ddp", "device": "cpu", "hook": dict(hook), "bucket_mib": BUCKET_MIB}
    engine = EngineConfig.model_validate(settings).start(precision)
    assert isinstance(engine, DdpEngine)
    policy = Given(shapes, torch.float64 if precision == "float64" else torch.float32)
    engine.prepare(policy, Rule.model_validate({"kind": "adamw"}), group(policy.named_parameters()))
    return engine, policy


def step(engine: DdpEngine, policy: Given, told: Mapping[str, Tensor], pieces: int = 1) -> dict[str, Tensor]:
    """The gradients that an optimizer would see, after which it has seen them."""
    for piece in range(pieces):
        with engine.micro(last=piece == pieces - 1):
            share = {name: value / pieces for name, value in told.items()}
            out = engine.forward(Wanted(share), ("logp",))  # type: ignore[arg-type]
            assert out.logp_BT is not None
            engine.backward(out.logp_BT.sum())
    engine.clip(None)
    seen = {name: parameter.grad.clone() for name, parameter in policy.named_parameters() if parameter.grad is not None}
    engine.step(1e-3)
    return seen


def exchanged(
    hook: Mapping[str, Any], steps: int, precision: str = "float64", pieces: int = 1,
    shapes: Mapping[str, tuple[int, ...]] = SHAPES,
) -> dict[str, Any]:
    """What every step saw; what the hook remembers; what was sent."""
    engine, policy = started(hook, precision, shapes)
    dtype = torch.float64 if precision == "float64" else torch.float32
    seen, remembered, sent = [], [], []
    for number in range(steps):
        seen.append(step(engine, policy, gradients(number, engine.rank, shapes, dtype), pieces))
        remembered.append({
            name: value.clone() for name, value in engine.state().items() if name.startswith("engine.hook.")
        })
        sent.append(engine.told())
    weights = {name: value.clone() for name, value in engine.weights(policy).items()}
    engine.close()
    return {"seen": seen, "remembered": remembered, "sent": sent, "weights": weights, "buckets": engine.collectives}


def continued(hook: Mapping[str, Any], before: int, after: int, file: str) -> tuple[dict[str, Tensor], ...]:
    """Weights of a run, and of one that was saved on rank 0, ended and went on in new objects."""
    whole = exchanged(hook, before + after)
    engine, policy = started(hook, "float64", SHAPES)
    for number in range(before):
        step(engine, policy, gradients(number, engine.rank))
    state = engine.state()
    if engine.rank == 0:
        save(state | {f"weight.{name}": value for name, value in engine.weights(policy).items()}, file)
    engine.world.meet()
    engine.close()
    again, fresh = started(hook, "float64", SHAPES)
    resume(again, fresh, file)
    for number in range(before, before + after):
        step(again, fresh, gradients(number, again.rank))
    found = {name: value.clone() for name, value in again.weights(fresh).items()}
    again.close()
    return whole["weights"], found


def save(tensors: Mapping[str, Tensor], file: str) -> None:
    from safetensors.torch import save_file

    save_file({name: value.detach().clone().contiguous() for name, value in tensors.items()}, file)


def resume(engine: Engine, policy: nn.Module, file: str, weights: bool = True, state: bool = True) -> None:
    """Put back what `save` wrote."""
    from safetensors.torch import load_file

    held = load_file(file)
    with torch.no_grad():
        for name, parameter in policy.named_parameters():
            value = held.pop(f"weight.{name}")
            if weights:
                parameter.copy_(value)
    if state:
        engine.load_state(held)


def saved(hook: Mapping[str, Any], steps: int, file: str) -> dict[str, Tensor]:
    engine, policy = started(hook, "float64", SHAPES)
    for number in range(steps):
        step(engine, policy, gradients(number, engine.rank))
    state = engine.state()
    if engine.rank == 0:
        save(state | {f"weight.{name}": value for name, value in engine.weights(policy).items()}, file)
    engine.close()
    return state


def loaded(hook: Mapping[str, Any], file: str) -> dict[str, Tensor]:
    engine, policy = started(hook, "float64", SHAPES)
    resume(engine, policy, file)
    state = engine.state()
    engine.close()
    return state


def outer(hook: Mapping[str, Any]) -> dict[str, Tensor]:
    """A gradient of rank one, cut among the ranks."""
    engine, policy = started(hook, "float64", {"one": (20, 30)})
    left, right = torch.linspace(-1, 2, 20, dtype=torch.float64), torch.linspace(1, 3, 30, dtype=torch.float64)
    whole = torch.outer(left, right)
    found = step(engine, policy, {"one": whole * (engine.rank + 1)})["one"]
    engine.close()
    return {"found": found, "wanted": 3 * whole}


def overflowed(hook: Mapping[str, Any]) -> dict[str, Any]:
    """Three steps in float16 with a loss scale, of which the second overflows on rank 1."""
    shapes = {"first": (24, 20), "bias": (12,)}
    engine, policy = started(hook, "float16", shapes)
    updated, total = [], torch.zeros(24, 20)
    for number in range(3):
        told = gradients(number, engine.rank, shapes, torch.float32)
        if number == 1 and engine.rank == 1:
            told["first"][3, 4] = float("inf")
        out = engine.forward(Wanted(told), ("logp",))   # type: ignore[arg-type]
        assert out.logp_BT is not None
        engine.backward(out.logp_BT.sum())
        engine.clip(None)
        seen = policy.get_parameter("first").grad
        assert seen is not None
        seen = seen.clone()
        updated.append(engine.step(1e-3))
        total += seen if updated[-1] else 0.0
    state = {name: value.clone() for name, value in engine.state().items()}
    own = state[f"engine.hook.rank{engine.rank}.error.first"]
    everybody = engine.world.sum({str(place): float(value) for place, value in enumerate(own.flatten())})
    left = torch.tensor([everybody[str(place)] for place in range(own.numel())]).view_as(own)
    wanted = sum(gradients(number, rank, shapes, torch.float32)["first"] for number in (0, 2) for rank in range(2))
    engine.close()
    assert isinstance(wanted, Tensor)
    return {"updated": updated, "state": state, "total": total + left, "wanted": wanted}
