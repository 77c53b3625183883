"""Rollouts that a process of its own writes while this one trains: the trainer's end.

Which weights write a rollout is no matter of time. Rollout n is written by the weights as they were `max_staleness`
steps before its own first step, or by the first there were. So the rows of a run, its weights and its checkpoints are a
function of its recipe, as those of a run that does one thing after the other.
"""

from __future__ import annotations

import atexit
import multiprocessing
import pickle
import signal
import time
from collections.abc import Callable, Collection, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from multiprocessing import connection
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from llmtrainer.base.errors import UserError
from llmtrainer.base.part import count_elsewhere_read
from llmtrainer.generation.sampler import require_version
from llmtrainer.training.held import WAITED, Gathered
from llmtrainer.training.recipe import Recipe

METHOD = "spawn"
"""How the process begins: as a fresh one, so that it inherits no thread, no lock and no device."""
STALENESS = "rollout/staleness"
"""The figure that says how many steps older than the trained weights those were that wrote a rollout."""


@dataclass(frozen=True)
class Job:
    """All that the process is told when it begins."""

    recipe: Recipe
    continued: Path | None
    """The checkpoint that the run goes on from."""
    exchange: Exchange
    threads: int
    cursor: int
    """The first draw of prompts that is its own."""


@dataclass(frozen=True)
class Take:
    """To the process: weights lie ready."""


@dataclass(frozen=True)
class Write:
    """To the process: write this rollout with the weights taken last."""

    number: int


@dataclass(frozen=True)
class Ready:
    """From the process: it has a policy and prompts."""

    fingerprint: str
    """Of the prompts."""


@dataclass(frozen=True)
class Taken:
    """From the process: the place where weights are handed over is free again."""


@dataclass(frozen=True)
class Unread:
    """From the process: the fields of the recipe that were set and that it has not read."""

    names: Collection[str]


@dataclass(frozen=True)
class Failed:
    """From the process: what it ended with."""

    error: BaseException
    traceback: str


class SamplerTraceback(Exception):
    """Where in the other process an exception came from, as text."""

    def __str__(self) -> str:
        return "in the process that writes answers:\n" + str(self.args[0])


class Exchange:
    """Memory of both processes, through which trained weights go from one to the other."""

    def __init__(self, module: nn.Module) -> None:
        self._bytes = torch.zeros(sum(_room(weight) for weight in _trained(module)), dtype=torch.uint8).share_memory_()

    def put(self, module: nn.Module) -> None:
        """Lay the trained weights of a module ready."""
        for weight, place in self._places(module):
            place.copy_(weight)

    def get(self, module: nn.Module) -> None:
        """Give a module of the same shape the weights that lie ready."""
        for weight, place in self._places(module):
            weight.copy_(place)

    def _places(self, module: nn.Module) -> Sequence[tuple[Tensor, Tensor]]:
        found, at = [], 0
        for weight in _trained(module):
            size = weight.numel() * weight.element_size()
            found.append((weight, self._bytes[at : at + size].view(weight.dtype).view(weight.shape)))
            at += _room(weight)
        assert at == len(self._bytes), "the two processes have other parameters"
        return found


def _trained(module: nn.Module) -> list[Tensor]:
    return [weight.detach() for weight in module.parameters() if weight.requires_grad]


def _room(weight: Tensor) -> int:
    """Bytes of a parameter, up to where any type may begin."""
    return -(-weight.numel() * weight.element_size() // 16) * 16


class Ahead:
    """The rollouts that a process writes ahead of the trainer.

    It begins when the first step asks for its rows. Each rollout is written by the weights of one certain step, whoever
    is faster, and comes back with the hash of the weights that wrote it.
    """

    def __init__(
        self, recipe: Recipe, module: nn.Module, version: Callable[[], str], fingerprint: str,
        max_staleness: int, continued: Path | None, steps_per_rollout: int,
    ) -> None:  # fmt: skip
        """version: hash of the module's weights. fingerprint: of the prompts. continued: the checkpoint that the run
        goes on from."""
        self._recipe, self._module, self._version, self._fingerprint = recipe, module, version, fingerprint
        self._staleness, self._steps, self._continued = max_staleness, steps_per_rollout, continued
        self._waiting: dict[int, Gathered] = {}
        """By number, what was written and nobody has learned."""
        self._begun: dict[int, tuple[int, str]] = {}
        """By number, what is being written: after how many steps its weights were taken, and their hash."""
        self._next = 0
        """The number of the first rollout that nobody has begun to write."""
        self._free = True
        self._process: BaseProcess | None = None

    def load(self, waiting: Sequence[Gathered]) -> None:
        """Go on with rollouts that were written before. Those that are older than now allowed are left, and their
        prompts asked again."""
        for one in waiting:
            if one.held.number * self._steps - one.step > self._staleness:
                return
            self._waiting[one.held.number] = one

    def publish(self, step: int, wanted: int, cursor: int) -> None:
        """Have the weights as they are now write whatever they are to write. Call before every step.

        wanted: the first rollout that was not learned yet. cursor: the first draw that is in no rollout before it.
        """
        if self._process is None:
            self._next = max([wanted, *(number + 1 for number in self._waiting)])
            self._start(max([cursor, *(one.drawn.stop for one in self._waiting.values())]))
        if self._next * self._steps - self._staleness > step:
            return
        while not self._free:       # what was handed over before must have been taken
            self._receive()
        self._job.exchange.put(self._module)
        self._free, version = False, self._version()
        self._send(Take())
        while self._next * self._steps - self._staleness <= step:
            self._begun[self._next] = step, version
            self._send(Write(self._next))
            self._next += 1

    def take(self, number: int) -> Gathered:
        """A rollout, once it is there."""
        started = time.perf_counter()
        while number not in self._waiting:
            self._receive()
        found = self._waiting.pop(number)
        figures = {**found.held.figures, WAITED: time.perf_counter() - started}
        if self._staleness:
            figures[STALENESS] = float(number * self._steps - found.step)
        return replace(found, held=replace(found.held, figures=figures))

    def settled(self) -> list[Gathered]:
        """All that was begun and is not learned yet, in order, once nothing is being written any more."""
        while self._begun:
            self._receive()
        return [self._waiting[number] for number in sorted(self._waiting)]

    def close(self) -> None:
        """End the process: at once where it is still at work."""
        if self._process is None:
            return
        if not self._begun:
            with suppress(OSError):     # it may have gone
                self._pipe.send(None)
                self._process.join(_SECONDS_TO_END)
        self._kill()
        atexit.unregister(self._kill)
        self._pipe.close()
        self._process.close()
        self._process = None

    def _start(self, cursor: int) -> None:
        context = multiprocessing.get_context(METHOD)
        self._pipe, theirs = context.Pipe()
        exchange = Exchange(self._module)
        self._job = Job(self._recipe, self._continued, exchange, torch.get_num_threads(), cursor)
        # It begins with signals held back, until it has said what they mean to it: Ctrl-C reaches the whole group.
        before = signal.pthread_sigmask(signal.SIG_BLOCK, QUIET)
        try:
            self._process = _started(context, theirs, self._job)
        finally:
            signal.pthread_sigmask(signal.SIG_SETMASK, before)
            theirs.close()
        # At the end of this program multiprocessing waits for its children, which waits for ever if nobody closed us.
        atexit.register(self._kill)
        self._ready = False
        while not self._ready:
            self._receive()

    def _kill(self) -> None:
        if self._process is not None:
            self._process.kill()
            self._process.join()

    def _send(self, message: Any) -> None:
        try:
            self._pipe.send(message)
        except OSError:
            while True:     # why it has gone is on its way
                self._receive()

    def _receive(self) -> None:
        """Wait for a message and do what it says. Raises what the process raised."""
        assert self._process is not None
        ready = connection.wait([self._pipe, self._process.sentinel])
        try:
            if self._pipe not in ready:
                raise EOFError
            message = self._pipe.recv()
        except (EOFError, OSError):     # the latter in the middle of a message
            raise self._ended() from None
        match message:
            case Ready():
                self._ready = True
                _require_prompts(message.fingerprint, self._fingerprint)
            case Taken():
                self._free = True
            case Unread():
                count_elsewhere_read(self._recipe.rollout, message.names, "rollout.")
            case Gathered():
                self._arrived(message)
            case Failed():
                self._fail(message)

    def _arrived(self, found: Gathered) -> None:
        number = found.held.number
        step, version = self._begun.pop(number)
        # Nothing is learned from answers that other weights wrote than those that were to.
        require_version(found.held.written, version)
        self._waiting[number] = replace(found, step=step)

    def _fail(self, message: Failed) -> None:
        if isinstance(message.error, UserError):
            raise message.error
        raise message.error from SamplerTraceback(message.traceback)

    def _ended(self) -> Exception:
        assert self._process is not None
        self._process.join()
        code = self._process.exitcode
        if not self._ready and code == 1:
            return UserError(
                "the process that writes answers did not begin", where="rollout.max_staleness",
                why="what it said stands above; a program of your own must train below `if __name__ == '__main__':`",
                fix="rollout.max_staleness=null trains without it",
            )
        why = f"signal {-code}: a person, or want of memory" if code is not None and code < 0 else f"exit code {code}"
        return ChildProcessError(
            f"the process that writes answers was ended by {why}; the same command goes on from the last checkpoint"
        )


QUIET = (signal.SIGINT, signal.SIGTERM)
"""Signals that the trainer answers for both."""
_SECONDS_TO_END = 10


def _started(context: Any, pipe: connection.Connection, job: Job) -> BaseProcess:
    # Imported here: it assembles a policy with the very parts that assemble this.
    from llmtrainer.training.sampler_process import work

    # Not a daemon: one may have no children, and rewards may need some.
    process: BaseProcess = context.Process(target=work, args=(pipe, job), name="sampler")
    try:
        process.start()
    except (pickle.PicklingError, AttributeError, TypeError) as error:
        raise UserError(
            "a part of the recipe cannot be handed to the process that writes answers", where="rollout",
            why=str(error), fix="name functions so that they can be imported, {kind: function, function: "
            '"module:name"}; or rollout.max_staleness=null, which needs no other process',
        ) from None
    return process


def _require_prompts(theirs: str, ours: str) -> None:
    if theirs != ours:
        raise UserError(
            "the process that writes answers reads other prompts than this one", where="data.train",
            why="a file has changed since this run read it", fix="start again",
        )
