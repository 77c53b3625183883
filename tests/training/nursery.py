"""A program that forks trainers, each with a sampler of its own: real processes to kill, without the seconds that a
process needs to load torch.

Asked by a line of JSON on stdin; what a trainer does comes back as lines of JSON on stdout.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

Line = dict[str, Any]


@dataclass
class Life:
    """What became of one trainer."""

    lines: list[Line] = field(default_factory=list)
    pid: int = 0
    sampler: int = 0
    """0: it had none yet."""

    @property
    def steps(self) -> list[Line]:
        return [line for line in self.lines if "step" in line]

    @property
    def last(self) -> Line:
        """How it ended: {"done"}, {"error", "text", "cause"}, {"code"}, or only {"status"} where it was killed."""
        return self.lines[-1]


class Nursery:
    def __init__(self, process: subprocess.Popen[str]) -> None:
        self._process = process

    def live(
        self, file: Path, *overrides: str, change: str = "", paced: bool = False, command: bool = False
    ) -> Iterator[tuple[Life, Line]]:
        """A trainer's life, line by line while it goes on. change: the name of a function below, called before. paced:
        it begins no step before its last line was read. command: as the command line runs it, with --json."""
        assert self._process.stdin is not None and self._process.stdout is not None
        request = {"file": str(file), "overrides": overrides, "change": change, "paced": paced,
                   "command": command}    # fmt: skip
        self._process.stdin.write(json.dumps(request) + "\n")
        self._process.stdin.flush()
        life = Life()
        for text in self._process.stdout:
            line = json.loads(text)
            life.pid, life.sampler = line.get("pid", life.pid), line.get("sampler", life.sampler)
            if "status" in line:
                if not life.lines or not {"done", "error", "code"} & life.lines[-1].keys():
                    life.lines.append(line)
                yield life, line
                return
            life.lines.append(line)
            if paced and "step" in line:
                self._process.stdin.write("\n")
                self._process.stdin.flush()
            yield life, line
        raise AssertionError("the nursery has ended")

    def whole(self, file: Path, *overrides: str, change: str = "", command: bool = False) -> Life:
        """A trainer's life when it is over."""
        *_, (life, _) = self.live(file, *overrides, change=change, command=command)
        return life


@contextmanager
def nursery(**environment: str) -> Iterator[Nursery]:
    command = [sys.executable, "-c", "from tests.training.nursery import serve; serve()"]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
                          env={**os.environ, **environment}) as process:    # fmt: skip
        yield Nursery(process)
        assert process.stdin is not None
        process.stdin.close()


def serve() -> None:
    import torch

    from llmtrainer.training import asynchronous, run, sampler_process  # noqa: F401  loaded once for all

    torch.set_num_threads(1)
    asynchronous.METHOD = "fork"
    # Unbuffered: what is said to a trainer is read by it from the same pipe, or by nobody.
    while text := _line():
        if text == b"\n":
            continue    # said to a trainer that was killed
        pid = os.fork()
        if pid == 0:
            try:
                _live(json.loads(text))
            except BaseException as error:
                tell(error=type(error).__name__, text=str(error), cause=str(error.__cause__ or ""))
            os._exit(0)
        _, status = os.waitpid(pid, 0)
        tell(status=status)


def _line() -> bytes:
    found = b""
    while not found.endswith(b"\n") and (byte := os.read(0, 1)):
        found += byte
    return found


def tell(**line: Any) -> None:
    os.write(1, json.dumps(line).encode() + b"\n")


def _live(request: Line) -> None:
    from llmtrainer.apps.cli import main
    from llmtrainer.base.config import load
    from llmtrainer.core.weights_version import weights_version
    from llmtrainer.training.recipe import Recipe
    from llmtrainer.training.run import open_trainer

    tell(pid=os.getpid())
    if request["command"]:
        code = main(["train", request["file"], *request["overrides"], "--json"])
        tell(code=code)
        return
    if request["change"]:
        globals()[request["change"]]()
    with open_trainer(load(Recipe, request["file"], overrides=request["overrides"])) as trainer:
        source, rows = trainer.parts.source, []
        given = source.batches

        def batches(step: int) -> list[Any]:
            version, found = weights_version(trainer.parts.policy), given(step)
            if source._ahead is not None:
                tell(sampler=source._ahead._process.pid, version=version)
            rows[:] = [row for batch in found for row in prompts_of(batch)]
            after_batches(step)
            return found

        source.batches = batches
        for info in trainer.steps():
            tell(step=info.progress.step, prompts=list(rows), loss=info.loss)
            if request["paced"]:
                os.read(0, 1)
    tell(done=True)


def prompts_of(batch: Any) -> list[list[int]]:
    """The prompt of every answer that a batch has, by where its first weighted target is; rows must not share one."""
    found = []
    for sequence in range(batch.sequences):
        mine = batch.sequence_BT == sequence
        first = int(batch.weights_BT[mine].nonzero()[0])
        found.append(batch.tokens_BT[mine][: first + 1].tolist())
    return found


def nothing(step: int) -> None:
    """After the rows of a step are there."""


after_batches = nothing


def skip_a_sync() -> None:
    """Weights are said to be taken, and are not."""
    from llmtrainer.training import asynchronous, sampler_process

    sampler_process.Writer.take = lambda self: self._outbox.put(asynchronous.Taken())    # type: ignore[method-assign]


def open_the_gate() -> None:
    """When the first step has its rows, a reward that waits for it may go on."""
    global after_batches

    def gate(step: int) -> None:
        if step == 0:
            os.write(os.open(os.environ["GATE"], os.O_RDWR), b"go on")

    after_batches = gate
