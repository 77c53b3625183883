"""Rollouts that a process of its own writes while another one trains: the writer's end."""

from __future__ import annotations

import copy
import multiprocessing
import os
import queue
import signal
import sys
import threading
import traceback
from concurrent.futures import ThreadPoolExecutor
from multiprocessing import connection
from typing import Any

import torch

from llmtrainer.base.config import unread
from llmtrainer.core.precision import DTYPES
from llmtrainer.models.stored import Policy, read_into
from llmtrainer.optim.groups import group
from llmtrainer.training.assemble import engine_of, rows_of, tokenizer_of
from llmtrainer.training.asynchronous import QUIET, Failed, Job, Ready, Take, Taken, Unread, Write
from llmtrainer.training.console import voice
from llmtrainer.training.feed import gathering_of
from llmtrainer.training.gathering import Gathering, Unscored
from llmtrainer.training.policies import policy_of


def work(pipe: connection.Connection, job: Job) -> None:
    """The whole life of the process: until the trainer says so, or ends, or something fails here."""
    _settle()
    outbox = Outbox(pipe)
    try:
        with voice(quiet=True):     # the trainer has said it
            policy, gathering = opened(job)
        outbox.put(Ready(gathering.prompts.fingerprint))
        Writer(job, policy, gathering, outbox).run(pipe)
    except BaseException as error:
        outbox.put(failed(error))
    outbox.flush()
    # Threads may still wait for rewards that nobody wants any more.
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(0)


def _settle() -> None:
    for number in QUIET:
        signal.signal(number, lambda *_: None)      # the trainer decides
    signal.pthread_sigmask(signal.SIG_UNBLOCK, QUIET)
    os.dup2(2, 1)       # what rewards print must not end up in the result of a command
    threading.Thread(target=_end_with_trainer, daemon=True).start()


def _end_with_trainer() -> None:
    # Also while a reward waits for an hour, and whatever ended the trainer.
    trainer = multiprocessing.parent_process()
    assert trainer is not None
    connection.wait([trainer.sentinel])
    os._exit(1)


def opened(job: Job) -> tuple[Policy, Gathering]:
    """A policy of the recipe's shape with its sampler and rewards."""
    torch.set_num_threads(job.threads)
    recipe = job.recipe
    engine, precision = engine_of(recipe)
    folder, tokenizer = tokenizer_of(recipe)
    rows = rows_of(recipe, folder, tokenizer, engine)
    policy = policy_of(recipe, tokenizer, DTYPES[precision], job.continued)
    policy.to(engine.device)
    engine.prepare(policy, recipe.optim.rule, group(policy.named_parameters(), recipe.optim.groups))
    if job.continued is not None:
        read_into(policy, job.continued)
    return policy, gathering_of(recipe, recipe.rollout, rows, policy, tokenizer, engine)


class Writer:
    """Does what the trainer says: answers are written one rollout after the other, in this thread; rewards are worked
    out beside it, for `reward_workers` rollouts at a time."""

    def __init__(self, job: Job, policy: Policy, gathering: Gathering, outbox: Outbox) -> None:
        self._job, self._policy, self._gathering, self._outbox = job, policy, gathering, outbox
        self._cursor = job.cursor
        self._pool = ThreadPoolExecutor(job.recipe.rollout.reward_workers, thread_name_prefix="rewards")

    def run(self, pipe: connection.Connection) -> None:
        while (message := pipe.recv()) is not None:
            match message:
                case Take():
                    self.take()
                case Write():
                    self.write(message.number)

    def take(self) -> None:
        """Write with the weights that lie ready from now on."""
        self._job.exchange.get(self._policy.module)
        self._gathering.sampler.sync()
        self._outbox.put(Taken())

    def write(self, number: int) -> None:
        gathering, first = self._gathering, self._cursor
        if gathering.redraws:       # what the next rollout asks depends on what this one earns
            found = gathering.gathered(number, first)
            self._cursor = found.drawn.stop
            self._tell(found)
            return
        unscored = gathering.unscored(first, gathering.prompts.prompts_per_step)
        self._cursor = unscored.draws.stop
        self._pool.submit(self._score, number, unscored)

    def _score(self, number: int, unscored: Unscored) -> None:
        try:
            self._tell(self._gathering.scored(number, unscored))
        except BaseException as error:
            self._outbox.put(failed(error))

    def _tell(self, found: Any) -> None:
        self._outbox.put(Unread(unread(self._job.recipe)))
        self._outbox.put(found)


class Outbox:
    """Messages to the trainer, which may be busy: nobody here waits until it reads them."""

    def __init__(self, pipe: connection.Connection) -> None:
        self._pipe, self._waiting = pipe, queue.SimpleQueue[Any]()
        self._thread = threading.Thread(target=self._send, daemon=True)
        self._thread.start()

    def put(self, message: Any) -> None:
        self._waiting.put(message)

    def flush(self) -> None:
        """Wait until everything is sent."""
        self._waiting.put(None)
        self._thread.join()

    def _send(self) -> None:
        while (message := self._waiting.get()) is not None:
            try:
                self._pipe.send(message)
            except OSError:
                return      # the trainer has closed its end
            except Exception as error:      # something that cannot be sent
                self._pipe.send(failed(error))


def failed(error: BaseException) -> Failed:
    """An exception on its way to the trainer, with its traceback as text. One that cannot be made anew there becomes
    a RuntimeError that names it."""
    text = "".join(traceback.format_exception(error))
    try:
        copy.deepcopy(error)    # by the same means as a pipe
    except Exception:
        error = RuntimeError(f"{type(error).__name__}: {error}")
    return Failed(error, text)
