"""The price of exact sums: the same steps of the same model by engine.exact and without, in turn in the same processes.

Three ways take turns: a rank's rows as one micro-batch, the same rows cut as exact sums cut them, and exact sums. The
weights that four processes and one learn by exact sums are compared first: different bits are refused.
"""

from __future__ import annotations

import argparse
import datetime
import hashlib
import json
import multiprocessing
import os
import socket
import statistics
import sys
import time
from typing import Any

WAYS = ("plain", "cut", "exact")
ROWS, LENGTH, VOCABULARY = 32, 64, 4096


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    parser.add_argument("--processes", type=int, default=2)
    parser.add_argument("--kind", default="ddp", help="which engine: ddp, zero1 or fsdp2")
    parser.add_argument("--precision", default="float32")
    parser.add_argument("--shards", type=int, default=8)
    parser.add_argument("--width", type=int, default=256, help="of the model; 256 makes 10 million parameters")
    parser.add_argument("--rounds", type=int, default=7, help="steps of each way that are timed")
    wish = parser.parse_args()
    alone, several = run({**vars(wish), "processes": 1, "rounds": 2}), run({**vars(wish), "rounds": 2, "processes": 4})
    if alone[0]["bits"] != several[0]["bits"]:
        raise SystemExit("exact.py: four processes learned other bits than one")
    (told, *_) = run(vars(wish))
    medians = {way: statistics.median(told["seconds"][way]) for way in WAYS}
    print(json.dumps({
        "work": f"{told['parameters']:,} parameters, {ROWS} rows of at most {LENGTH} tokens a step, {wish.kind}, "
        f"{wish.processes} processes, {wish.precision}, {wish.shards} virtual shards",
        "unit": "seconds a step", **medians, "price": medians["exact"] / medians["plain"],
        "price_of_sums": medians["exact"] / medians["cut"], "price_of_cut": medians["cut"] / medians["plain"],
        "runs": told["seconds"], "bits": alone[0]["bits"],
    }))  # fmt: skip


def run(wish: dict[str, Any]) -> list[dict[str, Any]]:
    """What each of some processes says of its steps."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    context = multiprocessing.get_context("spawn")
    answers: Any = context.Queue()
    started = [context.Process(target=steps, args=(rank, port, wish, answers)) for rank in range(wish["processes"])]
    for process in started:
        process.start()
    found = [answers.get(timeout=3600) for _ in started]
    for process in started:
        process.join()
    return sorted(found, key=lambda told: told["rank"])


def steps(rank: int, port: int, wish: dict[str, Any], answers: Any) -> None:
    """Steps of all three ways in turn, in one of the processes."""
    os.environ.update(
        RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(wish["processes"]), MASTER_ADDR="127.0.0.1",
        MASTER_PORT=str(port), OMP_NUM_THREADS="1",
    )
    import torch
    import torch.distributed as dist

    from llmtrainer.core.objective import Objective
    from llmtrainer.parallel.world import World

    torch.set_num_threads(1)
    world = World(torch.device("cpu"), datetime.timedelta(minutes=30))     # met once: the engines find it
    made = {way: prepared(way, wish) for way in WAYS}
    seconds: dict[str, list[float]] = {way: [] for way in WAYS}
    for number in range(wish["rounds"] + 1):
        for way, (engine, _) in made.items():
            world.meet()
            began = time.perf_counter()
            step(engine, Objective.model_validate({"kind": "causal_lm"}), batches(way, engine, wish, number))
            if number:
                seconds[way].append(time.perf_counter() - began)
    engine, policy = made["exact"]
    digest = hashlib.sha256()
    for name, value in sorted(engine.weights(policy).items()):
        digest.update(name.encode() + value.contiguous().numpy().tobytes())
    parameters = sum(value.numel() for value in policy.parameters())
    answers.put({"rank": rank, "seconds": seconds, "bits": digest.hexdigest(), "parameters": parameters})
    world.meet()
    dist.destroy_process_group()


def prepared(way: str, wish: dict[str, Any]) -> tuple[Any, Any]:
    """An engine with its model."""
    import torch

    from llmtrainer.core.protocols import EngineConfig, Rule
    from llmtrainer.models.families.llama import Llama
    from llmtrainer.optim.groups import group

    wide, precision = wish["width"], wish["precision"]
    shape = Llama.model_validate({
        "hidden_size": wide, "layers": 8, "heads": 4, "kv_heads": 2, "intermediate_size": 3 * wide,
        "context_length": LENGTH, "dropout": 0.1, "tied_head": True,
    })  # fmt: skip
    policy = shape.build(VOCABULARY, getattr(torch, precision))
    policy.initialise(0)
    exact = {"exact": True, "virtual_shards": wish["shards"]} if way == "exact" else {}
    engine = EngineConfig.model_validate({"kind": wish["kind"], "device": "cpu", **exact}).start(precision)
    rule = Rule.model_validate({"kind": "adamw", "implementation": "foreach"})
    engine.prepare(policy, rule, group(policy.named_parameters()))
    return engine, policy


def batches(way: str, engine: Any, wish: dict[str, Any], number: int) -> list[Any]:
    """This process's micro-batches of a step: rows of other lengths, padded within each shard."""
    from dataclasses import replace

    import numpy as np

    from llmtrainer.core.share import Share
    from llmtrainer.data.collate import Row, collate, filler

    share = engine.share
    if way == "cut":
        each = wish["shards"] // wish["processes"]
        share = Share(tuple(range(engine.rank * each, (engine.rank + 1) * each)), wish["shards"])
    found = []
    for part in share.mine:
        rows = []
        for place in range(part, ROWS, share.of) if part < share.of else ():
            draw = np.random.default_rng((number, place))
            tokens = draw.integers(0, VOCABULARY, draw.integers(LENGTH // 2, LENGTH) + 1)
            rows.append(Row(tokens, np.zeros(len(tokens), dtype=np.int32), place))
        found.append(replace(collate(rows or [filler(ROWS + part)]), shard=part, dropout_key=number))
    return found


def step(engine: Any, objective: Any, micro: list[Any]) -> None:
    from llmtrainer.core.objective import count, loss_of

    counts = engine.sum(count(micro))
    engine.begin(1e-3)
    for index, batch in enumerate(micro):
        with engine.micro(last=index == len(micro) - 1):
            engine.backward(loss_of(objective.terms(engine.forward(batch, objective.wants), batch), counts))
    engine.clip(1.0)
    engine.step(1e-3)


if __name__ == "__main__":
    sys.exit(main())
