"""launch: one command as several processes, on this machine or on many, by torchrun's own agent."""

from __future__ import annotations

import logging
import os
import shlex
import signal
import sys
import tempfile
import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from types import FrameType
from typing import Any, ClassVar

from pydantic import Field

from llmtrainer.base.clusters import Cluster, kubernetes_job, slurm_script
from llmtrainer.base.config import Config
from llmtrainer.base.errors import DEFECT, MENDABLE, UserError
from llmtrainer.base.outcome import Outcome, read_outcomes
from llmtrainer.base.process import LAUNCHED, OUTCOMES, outcome_folder, threads_for, variables
from llmtrainer.base.result import Result
from llmtrainer.base.verbs import verb_named
from llmtrainer.training.console import is_quiet, warn

PORT = 29400
"""Where machines meet if `rendezvous` names no port: torchrun's own."""
SECONDS_TO_END = 20
"""What the other ranks have to end by themselves once one has failed, before they are killed."""


class Launching(Config):
    """How many processes, on which machines, and the command that each of them runs."""

    words: ClassVar[tuple[str, ...]] = ("command",)
    ends_in_command: ClassVar[bool] = True

    command: tuple[str, ...] = ()
    """A verb of `llmtrainer --help` with all of its words and keys, such as `train recipe.yaml engine.kind=ddp`."""

    nproc: int | None = Field(default=None, ge=1)
    """Processes on this machine; one for each of its GPUs if not given, and one where there is none."""

    nnodes: int = Field(default=1, ge=1)
    """Machines. Each runs the same command with a `node_rank` of its own."""

    node_rank: int | None = Field(default=None, ge=0)
    """Place of this machine among them, from 0. Machine 0 holds the rendezvous, and rank 0, which writes the run
    directory."""

    rendezvous: str | None = None
    """`HOST:PORT` of machine 0, where all of them meet. On a single machine a free port is found."""

    wait: float = Field(default=600.0, gt=0.0)
    """Seconds until a machine that has not come to the rendezvous is given up."""

    threads: int | None = Field(default=None, ge=1)
    """Threads of each process; its share of the cores if not given, or what OMP_NUM_THREADS says."""

    show: bool = False
    """Print torchrun's command line, and run nothing."""

    slurm: bool = False
    """Print a batch script for Slurm that launches this command on `nnodes` machines, and run nothing."""

    kubernetes: bool = False
    """Print a Job for Kubernetes that launches this command on `nnodes` machines, and run nothing."""

    cluster: Cluster = Field(default_factory=Cluster)
    """What a batch script or Job asks of its cluster."""


@dataclass(frozen=True)
class Launched(Result):
    """What rank 0 has to tell, or which rank failed."""

    code: int
    told: str
    """For people."""
    figures: dict[str, Any]
    """For scripts: rank 0's own object."""

    @property
    def exit_code(self) -> int:
        return self.code

    def json(self) -> dict[str, Any]:
        return self.figures

    def text(self) -> str:
        return self.told


def launch(launching: Launching) -> Launched:
    """Run the command in every process until all are done. A rank that fails ends the job, and its own error is
    what this raises or tells."""
    words = list(launching.command)
    if not words:
        raise UserError("there is no command to launch", fix="llmtrainer launch nproc=2 train recipe.yaml")
    verb_named(words[0])
    _require_place(launching)
    if launching.slurm or launching.kubernetes:
        write = slurm_script if launching.slurm else kubernetes_job
        script = write(launching.cluster, launching.nnodes, launching.nproc or 1, words)
        return Launched(0, script, {"script": script})
    line = torchrun_line(launching, [*words, *(["--quiet"] if is_quiet() else [])])
    threads = threads_for(line.nproc) if launching.threads is None else {"OMP_NUM_THREADS": str(launching.threads)}
    if launching.show:
        shown = shlex.join([*(f"{name}={value}" for name, value in threads.items()), *line.words()])
        return Launched(0, shown, {"line": shown})
    with _folder() as folder:
        with variables({OUTCOMES: str(folder), LAUNCHED: "1", **threads}):
            failures = _run(line, folder, launching)
        outcomes = read_outcomes(folder)
    return _told(outcomes, failures, words[0], line.nproc * launching.nnodes)


@contextmanager
def _folder() -> Iterator[Path]:
    """Where the ranks say how they ended. A supervisor reads it too, and finds it beside this process's own."""
    if (above := outcome_folder()) is not None:
        folder = above / "ranks"
        folder.mkdir(parents=True, exist_ok=True)
        for old in folder.glob("rank-*.json"):
            old.unlink()
        yield folder
        return
    with tempfile.TemporaryDirectory(prefix="llmtrainer-launch-") as temporary:
        yield Path(temporary)


@dataclass(frozen=True)
class Line:
    """torchrun's command line."""

    nproc: int
    options: tuple[str, ...]
    command: tuple[str, ...]

    def arguments(self) -> list[str]:
        """What torchrun is given."""
        return [*self.options, "-m", "llmtrainer", *self.command]

    def words(self) -> list[str]:
        """As a person would type it."""
        return [sys.executable, "-m", "torch.distributed.run", *self.arguments()]


def torchrun_line(launching: Launching, command: list[str]) -> Line:
    """The line that starts this machine's share of the job."""
    nproc = launching.nproc or _devices()
    options = [f"--nproc-per-node={nproc}", f"--nnodes={launching.nnodes}", "--max-restarts=0"]
    if launching.nnodes == 1:
        # A free port, found by binding it. By its number: the machine's own name may not resolve in a container.
        options += ["--rdzv-backend=c10d", "--rdzv-endpoint=127.0.0.1:0", "--local-addr=127.0.0.1"]
    else:
        host, port = _meeting(launching)
        options += [
            f"--node-rank={launching.node_rank}", "--rdzv-backend=static", f"--rdzv-endpoint={host}:{port}",
            f"--rdzv-conf=timeout={max(int(launching.wait), 1)}",
        ]
    options += ["--rdzv-id=llmtrainer", "--monitor-interval=0.1"]
    if _torchrun_knows("--shutdown-timeout"):
        options.append(f"--shutdown-timeout={SECONDS_TO_END}")
    # One process writes to the terminal; what others print would be mixed into its bars.
    return Line(nproc, tuple(options), tuple(command))


def _torchrun_knows(option: str) -> bool:
    """Whether this torch has it; looked up in its file, because loading torch takes seconds."""
    torch = find_spec("torch")
    assert torch is not None and torch.origin is not None, "a dependency"
    return f'"{option}"' in Path(torch.origin).with_name("distributed").joinpath("run.py").read_text(encoding="utf-8")


def _require_place(launching: Launching) -> None:
    if launching.nnodes == 1:
        if launching.node_rank:
            raise UserError(f"node_rank is {launching.node_rank} of one machine", fix="nnodes=2, or leave it out")
        return
    if launching.slurm or launching.kubernetes:
        return
    if launching.rendezvous is None or launching.node_rank is None:
        missing = "rendezvous" if launching.rendezvous is None else "node_rank"
        raise UserError(
            f"{launching.nnodes} machines and no `{missing}`",
            why="each has to know where they meet and which of them it is",
            fix=f"on the first: --nnodes {launching.nnodes} --node-rank 0 --rendezvous ITS_NAME:{PORT}; "
            "on the next --node-rank 1",
        )
    if launching.node_rank >= launching.nnodes:
        raise UserError(
            f"node_rank {launching.node_rank} of {launching.nnodes} machines", why="they are counted from 0",
            fix=f"node_rank={launching.nnodes - 1} for the last",
        )
    _meeting(launching)


def _meeting(launching: Launching) -> tuple[str, int]:
    text = launching.rendezvous or ""
    host, colon, port = text.rpartition(":")
    if not colon:
        return text, PORT
    if not host or not port.isdecimal() or not 0 < int(port) < 65536:
        raise UserError(f"rendezvous is `{text}`, no HOST:PORT", fix=f"rendezvous=10.0.0.1:{PORT}")
    return host, int(port)


def _devices() -> int:
    import torch

    return max(torch.cuda.device_count(), 1) if torch.cuda.is_available() else 1


def _run(line: Line, folder: Path, launching: Launching) -> Mapping[int, Any]:
    """What torchrun says of the ranks that failed: rank -> its ProcessFailure; empty if none did."""
    from torch.distributed import DistError
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
    from torch.distributed.launcher.api import elastic_launch
    from torch.distributed.run import config_from_args, parse_args

    # Its own report of a failure would stand between the reader and the rank's own error.
    logging.getLogger("torch.distributed.elastic").setLevel(logging.CRITICAL)
    arguments = parse_args(["--signals-to-handle=SIGQUIT", *line.arguments()])
    config, program, words = config_from_args(arguments)
    try:
        with _passing_on(folder):
            elastic_launch(config, program)(*words)
    except ChildFailedError as error:
        return error.failures
    except (DistError, TimeoutError) as error:
        if launching.nnodes > 1 and not read_outcomes(folder):
            raise _nobody_came(launching, error) from None
        raise
    return {}


@contextmanager
def _passing_on(folder: Path) -> Iterator[None]:
    """A request to stop goes to every rank, which saves and ends in its own time; the second one kills them.

    torchrun would give them a fixed time and then kill them, in the middle of a checkpoint if need be.
    """
    asked: list[int] = []

    def pass_on(number: int, frame: FrameType | None) -> None:
        asked.append(number)
        for outcome in read_outcomes(folder).values():
            if outcome.exit_code is None:
                with_group = signal.SIGTERM if len(asked) == 1 else signal.SIGKILL
                try:
                    os.kill(outcome.pid, with_group)
                except ProcessLookupError:
                    continue

    # Elsewhere than on the main thread Python delivers no signals, and lets nobody ask for them.
    numbers = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)
    heard = numbers if threading.current_thread() is threading.main_thread() else ()
    before = {number: signal.signal(number, pass_on) for number in heard}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


class MachinesMissing(UserError):
    """Not every machine came to the rendezvous. A supervisor tries again: one of them may be starting anew."""


def _nobody_came(launching: Launching, error: Exception) -> MachinesMissing:
    host, port = _meeting(launching)
    if launching.node_rank == 0:
        return MachinesMissing(
            f"not all of the {launching.nnodes} machines came to {host}:{port} within {launching.wait:g} seconds",
            where=str(error).splitlines()[0],
            why="every machine has to run the same command with its own node_rank, and to reach this one",
            fix=f"on each other machine: llmtrainer launch nnodes={launching.nnodes} node_rank=1 "
            f"rendezvous={host}:{port} ...; `nc -z {host} {port}` there says whether it is reached; "
            f"wait={2 * launching.wait:g} gives them longer",
        )
    return MachinesMissing(
        f"machine 0 was not found at {host}:{port} within {launching.wait:g} seconds",
        where=str(error).splitlines()[0],
        why="it has not been launched yet, or a firewall or a wrong address stands between",
        fix=f"on machine 0: llmtrainer launch nnodes={launching.nnodes} node_rank=0 rendezvous={host}:{port} ...; "
        f"`nc -z {host} {port}` here says whether it is reached; wait={2 * launching.wait:g} waits longer",
    )


def _told(outcomes: Mapping[int, Outcome], failures: Mapping[int, Any], verb: str, ranks: int) -> Launched:
    """The job's end as the rank tells it whose end it was. UserError where that rank raised one."""
    failed = _first_failed(outcomes, failures)
    if failed is None:
        first = outcomes[min(outcomes)]
        return Launched(first.exit_code or 0, first.text if first.rank == 0 else "", first.result or {})
    outcome, failure = outcomes.get(failed), failures.get(failed)
    place = f"rank {failed} of {ranks}"
    if outcome is not None and outcome.exit_code == MENDABLE:
        said = outcome.error or {}
        alike = all(item.text == outcome.text for item in outcomes.values())
        where = ", ".join(filter(None, (None if alike else place, said.get("where")))) or None
        raise UserError(said.get("what") or outcome.text, where=where, why=said.get("why"), fix=said.get("fix"))
    if outcome is not None and outcome.failed:
        what = f"{place}: {outcome.text}\n{(outcome.error or {}).get('traceback') or ''}".rstrip()
    elif failure is not None and failure.exitcode < 0:
        what = f"{place} was killed by {failure.signal_name()}{_why_killed(-failure.exitcode)}"
    else:
        what = f"{place} ended with exit code {'unknown' if failure is None else failure.exitcode} and said nothing"
    others = [f"rank {rank}: {item.text.splitlines()[0]}" for rank, item in outcomes.items()
              if item.failed and rank != failed]  # fmt: skip
    warn("\n".join([f"llmtrainer {verb}, {what}", *(f"after it, {other}" for other in others)]))
    code = outcome.exit_code if outcome is not None and outcome.failed else None
    signalled = -failure.exitcode if failure is not None and failure.exitcode < 0 else None
    told = {"what": what.splitlines()[0], "rank": failed, "signal": signalled}
    return Launched(code or DEFECT, "", {"error": told})


def _first_failed(outcomes: Mapping[int, Outcome], failures: Mapping[int, Any]) -> int | None:
    """The rank whose end ended the job. A rank that lost its neighbour fails too, a moment later: what a person can
    mend comes first, then a rank that was killed, then the first that raised anything."""
    mendable = [item for item in outcomes.values() if item.exit_code == MENDABLE]
    if mendable:
        return min(mendable, key=lambda item: item.time).rank
    # SIGTERM is what the job's end sends to the others, and SIGKILL what follows where they do not listen.
    ended = {
        rank: failure for rank, failure in failures.items()
        if failure.exitcode < 0 and failure.exitcode != -signal.SIGTERM
        and not (rank in outcomes and outcomes[rank].exit_code is not None)
    }  # fmt: skip
    raised = [item for item in outcomes.values() if item.failed]
    if ended and not raised:
        return min(ended, key=lambda rank: (ended[rank].exitcode == -signal.SIGKILL and len(ended) > 1, rank))
    if ended and all(item.lost_a_neighbour for item in raised):
        return min(ended)
    if raised:
        alone = [item for item in raised if not item.lost_a_neighbour] or raised
        return min(alone, key=lambda item: item.time).rank
    return min(failures, default=None)


def _why_killed(number: int) -> str:
    match number:
        case signal.SIGKILL:
            return ": somebody killed it, or the kernel did because memory ran out"
        case signal.SIGABRT:
            return ": a library gave up, often because ranks were in different collectives; its message is above"
        case signal.SIGSEGV | signal.SIGBUS:
            return ": a library read memory that is not its own"
    return ""
