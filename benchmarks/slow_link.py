"""A thin link between two processes: what each hook sends, and how long each takes to the same loss.

The work: a small Llama of two blocks is pretrained by two processes of one thread each (engine.kind=ddp) from the same
weights on the same rows, once with every hook. The link is the loopback device of a network namespace of their own,
held to `--megabits` a second by the kernel (`tc`, where root may); else every message waits as long as it would take
there (`simulated` in the result says which). The loss to reach is what `none` ends with, averaged over ten steps; a
hook may take up to twice as many steps to get there.
"""

from __future__ import annotations

import json
import os
import shutil
import socket
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import turns
from turns import Figures

POWERSGD = {"kind": "powersgd", "rank": 8, "start_step": 10}
HOOKS: dict[str, dict[str, Any]] = {
    "none": {"kind": "none"}, "fp16": {"kind": "fp16"}, "bf16": {"kind": "bf16"}, "powersgd": POWERSGD,
    "powersgd+bf16": {"kind": "chain", "of": [POWERSGD, {"kind": "bf16"}]},
}
SHAPE = {
    "hidden_size": 256, "layers": 2, "heads": 4, "kv_heads": 4, "intermediate_size": 704, "context_length": 128,
    "tied_head": True,
}  # fmt: skip
VOCABULARY, LENGTH, ROWS, WINDOW = 1024, 128, 16, 10


def recipe(folder: Path, data: str | None) -> Path:
    """Tokenizer, store, first weights and the recipe that every turn changes the hook of."""
    import llmtrainer as lt
    from llmtrainer.data.open import documents, find
    from llmtrainer.models.families.llama import Llama
    from llmtrainer.models.weights import save_weights

    text = folder / "text.txt"
    read = (document.text for document in documents(find(data or "stdlib:train")))
    with text.open("w", encoding="utf-8") as file:
        while file.tell() < 2_000_000 and (one := next(read, None)) is not None:
            file.write(one + "\n")
    lt.train_tokenizer(
        lt.TokenizerTraining(data=str(text), out=str(folder / "tokenizer"), vocabulary=VOCABULARY - 64)
    )
    lt.prepare(
        lt.Preparation(data=str(text), out=str(folder / "store"), tokenizer=str(folder / "tokenizer"), workers=1)
    )
    model = Llama(**SHAPE).build(VOCABULARY)
    model.initialise(0)
    save_weights(model, folder / "weights")
    described = {
        "run": str(folder / "run"), "model": {"start_from": str(folder / "weights")},
        "tokenizer": str(folder / "tokenizer"),
        "data": {
            "train": str(folder / "store"), "sequence_length": LENGTH, "tokens_per_step": 2 * ROWS * LENGTH,
            "tokens_per_batch": ROWS * LENGTH,
        },
        "optim": {
            "rule": {"kind": "adamw"}, "schedule": {"kind": "constant", "peak": 2e-3, "warmup": "0 steps"}, "clip": 1.0,
        },
        "engine": {"kind": "ddp", "device": "cpu", "bucket_mib": 1.0}, "precision": "float32",
        "duration": "1000000 steps", "save": {"every": "never"},
    }  # fmt: skip
    from ruamel.yaml import YAML

    with (folder / "recipe.yaml").open("w") as out:
        YAML().dump(described, out)
    return folder / "recipe.yaml"


def rank(settings: Figures) -> None:
    """One of the two processes: steps until the loss or the limit is reached; rank 0 says what happened."""
    import torch

    import llmtrainer as lt

    torch.set_num_threads(1)
    hook = settings["hook"]
    if settings["bytes_per_second"]:
        wait = {"kind": "slow_link_wait.Wait", "bytes_per_second": settings["bytes_per_second"]}
        hook = {"kind": "chain", "of": [hook, wait]}
    loaded = lt.load(lt.Recipe, settings["recipe"], [f"run={settings['run']}", f"engine.hook={json.dumps(hook)}"])
    losses, sent, began = [], 0.0, 0.0
    with lt.open_trainer(loaded) as trainer:
        for step, info in enumerate(trainer.steps()):
            if not step:
                began = time.perf_counter()     # the first step builds what later ones have
                continue
            losses.append(info.loss)
            sent += info.metrics.get("hook/mib_sent", 0.0)
            mean = statistics.fmean(losses[-WINDOW:])
            if step >= settings["steps"] or (len(losses) >= WINDOW and mean <= settings["target"]):
                break
        seconds = time.perf_counter() - began
    if int(os.environ["RANK"]) == 0:
        whole = sum(parameter.numel() for parameter in trainer.parts.policy.parameters()) * 4 / 2**20
        print(json.dumps({
            "steps": len(losses), "seconds": seconds, "loss": mean, "mib_a_step": sent / len(losses) or whole,
        }), flush=True)    # fmt: skip


def turn(settings: Figures, megabits: float, limited: bool) -> Figures:
    """Two processes on a link of their own."""
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        port = found.getsockname()[1]
    here = Path(__file__).resolve()
    words = [sys.executable, str(here), "--rank", json.dumps(settings)]
    paths = os.pathsep.join([str(here.parent), str(here.parent.parent), os.environ.get("PYTHONPATH", "")])
    same = {
        **os.environ, "PYTHONPATH": paths, "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port),
        "OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "lo",
    }  # fmt: skip
    line = " & ".join(f"RANK={number} LOCAL_RANK={number} {_quoted(words)}" for number in range(2)) + " & wait"
    link = f"ip link set lo up && tc qdisc add dev lo root tbf rate {megabits}mbit burst 256kb latency 2s && "
    command = ["unshare", "-rn", "sh", "-c", f"{link}{{ {line}; }}"] if limited else ["sh", "-c", line]
    done = subprocess.run(command, env=same, capture_output=True, text=True, check=False)
    answers = [text for text in done.stdout.splitlines() if text.startswith('{"steps"')]
    if not answers:
        turns.refuse("a turn ended without an answer", done.stderr[-2000:])
    found_: Figures = json.loads(answers[0])
    return found_


def can_limit(megabits: float) -> bool:
    """Whether this user may make a network namespace with a thin loopback device."""
    if not all(map(shutil.which, ("unshare", "ip", "tc"))):
        return False
    test = f"ip link set lo up && tc qdisc add dev lo root tbf rate {megabits}mbit burst 256kb latency 2s"
    return subprocess.run(["unshare", "-rn", "sh", "-c", test], capture_output=True, check=False).returncode == 0


def main() -> None:
    parser = turns.parser(__doc__ or "")
    parser.add_argument("--data", help="text; else this Python's own library")
    parser.add_argument("--megabits", type=float, default=100.0, help="of the link, a second")
    parser.add_argument("--steps", type=int, help="of `none`; 60 if quick, else 200")
    parser.add_argument("--simulate", action="store_true", help="wait, instead of asking the kernel for a thin link")
    parser.add_argument("--rank", type=json.loads, help=turns.argparse.SUPPRESS)
    wish = parser.parse_args()
    if wish.rank:
        rank(wish.rank)
        return
    limited = not wish.simulate and can_limit(wish.megabits)
    steps = wish.steps or (60 if wish.quick else 200)
    runs: dict[str, list[Figures]] = {name: [] for name in HOOKS}
    with tempfile.TemporaryDirectory() as scratch:
        file = recipe(Path(scratch), wish.data)
        for round in range(1 if wish.quick else turns.rounds(wish)):
            target = float("-inf")
            for name, hook in HOOKS.items():
                settings = {
                    "recipe": str(file), "hook": hook, "run": f"{scratch}/{name}-{round}", "target": target,
                    "steps": steps if name == "none" else 2 * steps,
                    "bytes_per_second": 0.0 if limited else wish.megabits * 1e6 / 8,
                }
                runs[name].append(turn(settings, wish.megabits, limited))
                target = runs["none"][-1]["loss"]
                turns.say(f"{name}: " + ", ".join(f"{key} {turns.short(is_)}" for key, is_ in runs[name][-1].items()))
    middle = {
        name: {key: statistics.median(run[key] for run in told) for key in told[0]} for name, told in runs.items()
    }
    base = middle.pop("none")
    ratios = {name: base["seconds"] / told["seconds"] for name, told in middle.items()}
    work = f"two processes over {wish.megabits:g} Mbit/s, {SHAPE['layers']} blocks of {SHAPE['hidden_size']}"
    turns.tell({
        "work": work, "unit": "seconds to the same loss", "ours": min(told["seconds"] for told in middle.values()),
        "peers": {"none": base["seconds"]}, "ratios": ratios, "ratio": min(ratios.values()),
        "runs": {name: [run["seconds"] for run in told] for name, told in runs.items()},
        "mib_a_step": {"none": base["mib_a_step"], **{name: told["mib_a_step"] for name, told in middle.items()}},
        "steps": {"none": base["steps"], **{name: told["steps"] for name, told in middle.items()}},
        "loss": {"none": base["loss"], **{name: told["loss"] for name, told in middle.items()}},
        "simulated": not limited,
    })    # fmt: skip


def _quoted(words: list[str]) -> str:
    import shlex

    return shlex.join(words)


if __name__ == "__main__":
    main()
