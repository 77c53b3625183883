"""What each engine leaves a process to hold: bytes of weights, gradients and optimizer state, and the most that tensors
took at any moment of a step. Two processes on this machine; prints a table, then one JSON object."""

from __future__ import annotations

import argparse
import json
import os
import socket
import sys
from multiprocessing import get_context
from typing import Any

MIB = 2**20
TRIED: dict[str, dict[str, Any]] = {
    "single": {"kind": "single"}, "ddp": {"kind": "ddp"}, "zero1": {"kind": "zero1"}, "fsdp2": {"kind": "fsdp2"},
    "fsdp2, step_in_backward": {"kind": "fsdp2", "step_in_backward": True},
}
"""Name of a row -> the engine's settings."""
PARTS = ("weights", "gradients", "state", "most")


def held(rank: int, count: int, port: int, settings: dict[str, Any], shape: dict[str, int]) -> dict[str, int]:
    """Bytes of this process after a step and a backward pass."""
    os.environ.update(
        RANK=str(rank), WORLD_SIZE=str(count), LOCAL_RANK=str(rank), MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port)
    )
    import torch

    from llmtrainer.core.batch import Batch
    from llmtrainer.core.pieces import own
    from llmtrainer.core.protocols import EngineConfig, Rule
    from llmtrainer.models.families.llama import Llama
    from llmtrainer.optim.groups import group

    torch.set_num_threads(1)
    engine = EngineConfig.model_validate({"device": "cpu", **settings}).start("bfloat16")
    policy = Llama(context_length=128, **shape).build(8_192, torch.bfloat16)
    policy.initialise(0)
    engine.prepare(policy, Rule.model_validate({"kind": "adamw"}), group(policy.named_parameters(), ()))
    shape_BT = (1, 64)
    tokens_BT = torch.arange(64).expand(shape_BT)
    zeros_BT = torch.zeros(shape_BT, dtype=torch.int32)
    batch = Batch(
        tokens_BT, tokens_BT, torch.ones(shape_BT), zeros_BT, torch.arange(64, dtype=torch.int32).expand(shape_BT),
        zeros_BT, torch.zeros(1, dtype=torch.int64),
    )  # fmt: skip

    def backward() -> None:
        with engine.micro(last=True):
            logp_BT = engine.forward(batch, ("logp",)).logp_BT
            assert logp_BT is not None
            engine.backward(-logp_BT.mean())

    def step() -> None:
        engine.begin(1e-3)
        backward()
        engine.clip(None)
        engine.step(1e-3)

    step()
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as watched:
        step()
    state = [own(value) for name, value in engine.state().items() if name.startswith("optimizer.")]
    engine.begin(1e-3)
    backward()
    gradients = [own(parameter.grad) for parameter in policy.parameters() if parameter.grad is not None]
    found = {
        "weights": sum(own(parameter).nbytes for parameter in policy.parameters()),
        "gradients": sum(gradient.nbytes for gradient in gradients), "state": sum(value.nbytes for value in state),
    }
    found["most"] = found["weights"] + found["state"] + most_allocated(watched)
    engine.close()
    return found


def most_allocated(watched: Any) -> int:
    """The most bytes that a profile saw allocated and not yet freed; what was there before it counts as nothing."""
    events = [event for event in watched.profiler.kineto_results.events() if event.name() == "[memory]"]
    now = most = 0
    for event in sorted(events, key=lambda event: event.start_ns()):
        now += event.nbytes()
        most = max(most, now)
    return most


def largest(settings: dict[str, Any], shape: dict[str, int], processes: int) -> dict[str, int]:
    """Of every part, what the process has that has most of it."""
    count = 1 if settings["kind"] == "single" else processes
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    with get_context("spawn").Pool(count) as pool:
        found = pool.starmap(held, [(rank, count, port, settings, shape) for rank in range(count)], chunksize=1)
    return {part: max(each[part] for each in found) for part in PARTS}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--processes", type=int, default=2)
    parser.add_argument("--layers", type=int, default=8)
    parser.add_argument("--hidden", type=int, default=512)
    asked = parser.parse_args()
    shape = {"hidden_size": asked.hidden, "layers": asked.layers, "heads": 8}
    table = {}
    print(f"{'MiB a process':<26}{'weights':>10}{'gradients':>11}{'state':>8}{'most':>8}")
    for name, settings in TRIED.items():
        table[name] = largest(settings, shape, asked.processes)
        weights, gradients, state, most = (f"{table[name][part] / MIB:,.0f}" for part in PARTS)
        print(f"{name:<26}{weights:>10}{gradients:>11}{state:>8}{most:>8}", flush=True)
    print(json.dumps({"processes": asked.processes, **shape, "bytes": table}))


if __name__ == "__main__":
    sys.exit(main())
