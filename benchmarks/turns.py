"""Programs that do the same work in turn, each in a process of its own: A B A B, and what came out.

Both ends of the conversation live here, so this file needs nothing but the standard library: it is imported
by the peers' environments too.

A benchmark is one file. Started by a person it makes a `Side` for us and for every peer and calls `compare`;
started by a `Side` it calls `serve` with the generator that does that side's work:

    def ours(settings): ...        # imports its libraries, builds its model, warms up
        yield {"first_loss": 9.01}             # facts, once
        while True:
            yield {"rate": tokens / seconds}   # one turn for every answer that is asked for
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import statistics
import subprocess
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NoReturn

PEERS = Path(__file__).resolve().parent / ".venv-peers" / "bin" / "python"
"""The peers' own environment, made by `make bench-install`."""

Figures = dict[str, Any]
Work = Callable[[Figures], Iterator[Figures]]


def parser(text: str) -> argparse.ArgumentParser:
    """What every benchmark can be asked: --quick, --rounds, --threads, --device, --precision, --peer-python."""
    made = argparse.ArgumentParser(description=text, formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    made.add_argument("--quick", action="store_true", help="fewer and shorter turns")
    made.add_argument("--rounds", type=int, help="how often each side has its turn; 2 if quick, else 5")
    made.add_argument("--threads", type=int, default=len(os.sched_getaffinity(0)), help="of every side")
    made.add_argument("--device", choices=("cpu", "cuda"), default="cpu", help="of every side")
    made.add_argument(
        "--precision", choices=("bfloat16", "float32"), default="bfloat16",
        help="what every side computes in; float32 where a processor has no fast bfloat16",
    )
    made.add_argument("--peer-python", type=Path, default=PEERS, help="the peers' environment")
    made.add_argument("--side", help=argparse.SUPPRESS)
    made.add_argument("--settings", type=json.loads, help=argparse.SUPPRESS)
    return made


def rounds(wish: argparse.Namespace) -> int:
    """How often each side has its turn."""
    return wish.rounds or (2 if wish.quick else 5)


def steps(wish: argparse.Namespace, warm: int, steps: int) -> Figures:
    """Steps before the first turn and in each: more of them where a step is an accelerator's."""
    return {"warm": warm + 8, "steps": steps * 10} if wish.device == "cuda" else {"warm": warm, "steps": steps}


class Side:
    """One of those compared: a process that does its share of the work whenever it is asked."""

    def __init__(self, name: str, python: Path, script: Path, settings: Figures, threads: int) -> None:
        if not python.exists():
            refuse(f"there is no {python}", "make bench-install, or --peer-python /path/to/python")
        self.name = name
        # Only what both sides get: nothing of ours is on a peer's path, and nobody asks a hub.
        environment = {key: value for key, value in os.environ.items() if key != "PYTHONPATH" or name == "ours"}
        environment |= {"OMP_NUM_THREADS": str(threads), "HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}
        self._process = subprocess.Popen(
            [python, script, "--side", name, "--settings", json.dumps({**settings, "threads": threads})],
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=environment,
        )

    def answer(self) -> Figures:
        """The next thing its generator yields, and the peak memory of the process so far in bytes."""
        assert self._process.stdin is not None and self._process.stdout is not None
        try:
            self._process.stdin.write("\n")
            self._process.stdin.flush()
        except BrokenPipeError:
            refuse(f"{self.name} ended too early", "what it said stands above")
        line = self._process.stdout.readline()
        if not line:
            refuse(f"{self.name} ended with code {self._process.wait()}", "what it said stands above")
        found: Figures = json.loads(line)
        return found

    def close(self) -> None:
        assert self._process.stdin is not None and self._process.stdout is not None
        self._process.stdin.close()
        self._process.wait()
        self._process.stdout.close()


def serve(work: Work, settings: Figures) -> None:
    """One line of JSON on stdout for every line on stdin, until stdin ends."""
    # A library that prints must not end up between the answers.
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    steps = work(settings)
    for _ in sys.stdin:
        found = next(steps)
        print(json.dumps({**found, "peak_memory": _peak_memory(settings)}), file=answers, flush=True)


def _peak_memory(settings: Figures) -> int:
    """Bytes: of the process, or of tensors on the accelerator that it computes on."""
    if settings.get("device") == "cuda":
        import torch

        return int(torch.cuda.max_memory_allocated())
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def compare(work: str, unit: str, sides: Sequence[Side], times: int) -> Figures:
    """Let the sides, ours first, take turns; each turn's figure is its `rate`, of which more is better.

    Returns work, ours, peers, ratios, ratio (the smallest), unit, runs (every turn's figure), the peak memory of
    each process, peak_memory_ratio (ours by the smallest of the peers'), the median of whatever else our turns
    tell, and `facts`: what each side told first.
    """
    facts = {}
    for side in sides:
        facts[side.name] = side.answer()
        say(f"{side.name}: " + ", ".join(f"{key} {short(value)}" for key, value in facts[side.name].items()))
    answers: dict[str, list[Figures]] = {side.name: [] for side in sides}
    for turn in range(times):
        for side in sides:
            answers[side.name].append(side.answer())
            told = ", ".join(f"{key} {short(value)}" for key, value in answers[side.name][-1].items())
            say(f"turn {turn + 1} of {times}, {side.name}: {told}")
    for side in sides:
        side.close()
    return {"work": work, "unit": unit, **summary(answers), "facts": facts}


def in_turn(
    work: str, unit: str, peers: Mapping[str, Path], script: str, settings: Figures, wish: argparse.Namespace
) -> Figures:
    """`compare` of this Python with the peers' by their names, all running the same script with the same settings."""
    pythons = {"ours": Path(sys.executable), **peers}
    given = {
        **settings, "device": wish.device, "use_cpu": wish.device == "cpu", "precision": wish.precision,
        "narrow": wish.precision == "bfloat16",
    }
    sides = [Side(name, python, Path(script).resolve(), given, wish.threads) for name, python in pythons.items()]
    return {**compare(work, unit, sides, rounds(wish)), "device": wish.device, "precision": wish.precision}


def summary(answers: Mapping[str, Sequence[Figures]]) -> Figures:
    """Medians over each side's turns, and how they compare; the first side is ours."""
    ours, *peers = answers
    runs = {name: [answer["rate"] for answer in told] for name, told in answers.items()}
    medians = {name: statistics.median(rates) for name, rates in runs.items()}
    memory = {name: told[-1]["peak_memory"] for name, told in answers.items()}
    ratios = {name: medians[ours] / medians[name] for name in peers}
    others = answers[ours][0].keys() - {"rate", "peak_memory"}
    return {
        "ours": medians[ours],
        "peers": {name: medians[name] for name in peers},
        "ratios": ratios,
        "ratio": min(ratios.values()),
        "runs": runs,
        "peak_memory": memory,
        "peak_memory_ratio": memory[ours] / min(memory[name] for name in peers),
        **{name: statistics.median(answer[name] for answer in answers[ours]) for name in sorted(others)},
    }


def fact(result: Figures, name: str) -> Figures:
    """A fact that every side told, in the form {"ours": ..., "peers": {name: ...}}."""
    told = {side: facts[name] for side, facts in result["facts"].items() if name in facts}
    return {"ours": told.pop("ours"), "peers": told}


def tell(result: Figures) -> None:
    """The result as the last line of stdout."""
    print(json.dumps({key: value for key, value in result.items() if key != "facts"}), flush=True)


def say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


def short(value: Any) -> str:
    text = f"{value:,.6g}" if isinstance(value, int | float) else str(value)
    return text if len(text) <= 60 else text[:57] + "..."


def refuse(what: str, fix: str) -> NoReturn:
    say(f"{Path(sys.argv[0]).name}: {what}\n  fix   {fix}")
    raise SystemExit(2)
