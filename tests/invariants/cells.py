"""Runs of the command line in processes of their own, forked from one that has everything imported."""

from __future__ import annotations

import os
import sys
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from multiprocessing.context import ForkServerProcess
from pathlib import Path

from llmtrainer.base.events import steps
from tests.processes import forks, free_port

SECONDS = 600.0
"""After which a run is given up."""
COMPARED = ("loss", "grad_norm", "learning_rate", "tokens")
"""What is compared of every step, besides each Term by its name."""


@dataclass(frozen=True)
class Command:
    """`llmtrainer train RECIPE words...`, started in so many processes."""

    words: tuple[str, ...] = ()
    processes: int = 1
    patches: tuple[str, ...] = ()
    """What is different in the program itself, by name: see tests/invariants/patches.py."""


Curve = list[Mapping[str, float]]
"""What the events say of every step."""


def curve_of(recipe: Path, commands: Sequence[Command], run: Path) -> Curve:
    """The steps of a run that some commands made one after the other. AssertionError, with what the first failing
    process said, where one does not end well."""
    for command in commands:
        _start(recipe, command, run)
    return [
        {name: value for name, value in event.items() if name in COMPARED or _is_term(name)}
        for event in steps(run / "events.jsonl")
    ]


def apart(one: Curve, other: Curve, but: Sequence[str] = ()) -> float:
    """The farthest two numbers of the same step and name, relative to the larger of 1 and the first. `but`: names that
    may differ."""
    assert [sorted(step) for step in one] == [sorted(step) for step in other], "other steps, or other names"
    return max(
        abs(step[name] - again[name]) / max(1.0, abs(step[name]))
        for step, again in zip(one, other, strict=True) for name in step if name not in but
    )


def _is_term(name: str) -> bool:
    return "/" in name and not name.startswith(("seconds/", "rollout/"))


def _start(recipe: Path, command: Command, run: Path) -> None:
    run.mkdir(parents=True, exist_ok=True)
    port, context, environment = free_port(), forks(), dict(os.environ)
    started = [
        context.Process(target=_live, args=(rank, command, port, str(recipe), str(run), environment))
        for rank in range(command.processes)
    ]
    for process in started:
        process.start()
    try:
        codes = [_ended(process) for process in started]
    finally:
        for process in started:
            process.kill()
    for rank, code in enumerate(codes):
        assert code == 0, f"rank {rank} of {command} ended with {code}:\n{(run / f'rank-{rank}.log').read_text()}"


def _ended(process: ForkServerProcess) -> int | None:
    process.join(SECONDS)
    return process.exitcode


def _live(rank: int, command: Command, port: int, recipe: str, run: str, environment: Mapping[str, str]) -> None:
    os.environ.update(environment)      # the server may have begun before it was so
    warnings.simplefilter("ignore")
    log = os.open(Path(run) / f"rank-{rank}.log", os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(log, 1)
    os.dup2(log, 2)
    if command.processes > 1:
        os.environ.update(
            RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(command.processes), MASTER_ADDR="127.0.0.1",
            MASTER_PORT=str(port),
        )
    from llmtrainer.apps import cli
    from tests.invariants.patches import PATCHES

    for name in command.patches:
        PATCHES[name]()
    code = cli.main(["train", recipe, f"run={run}", *command.words, "--quiet"])
    sys.stdout.flush()
    os._exit(code)      # threads of a compiler must not hold up the end


@contextmanager
def nursery(folder: Path) -> Iterator[None]:
    """Processes that are started within have everything imported, and keep what they compile in one place."""
    mine = {
        "OMP_NUM_THREADS": "1", "TORCHINDUCTOR_COMPILE_THREADS": "1",
        "TORCHINDUCTOR_CACHE_DIR": os.environ.get("TORCHINDUCTOR_CACHE_DIR", str(folder / "compiled")),
    }
    before = {name: os.environ.get(name) for name in mine}
    os.environ.update(mine)
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                os.environ.pop(name)
            else:
                os.environ[name] = value
