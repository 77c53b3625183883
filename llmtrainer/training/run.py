"""train, the function behind the command, and the loop in the user's own hands."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path

from llmtrainer.base.config import dump
from llmtrainer.base.errors import DONE, STOPPED
from llmtrainer.base.events import EventLog
from llmtrainer.base.events import steps as logged_steps
from llmtrainer.base.heartbeat import Heartbeat
from llmtrainer.base.process import StopRequests, rank, world_size
from llmtrainer.base.result import Result
from llmtrainer.base.rundir import RunDir
from llmtrainer.parallel.recorder import last_collectives
from llmtrainer.training.assemble import Assembled, assemble
from llmtrainer.training.checkpoint import told_if_full
from llmtrainer.training.console import TrainingView, Unseen
from llmtrainer.training.recipe import Recipe
from llmtrainer.training.tracking import Trackers
from llmtrainer.training.trainer import Trainer


@dataclass(frozen=True)
class Trained(Result):
    """Where a run stands when its command ends."""

    run: str
    step: int
    tokens: int
    loss: float | None
    """Of the last step; None if the run directory has none."""
    stopped: str | None
    """Why the run ended before its duration: `SIGTERM`, `SIGINT`, `control/stop`; None if it is finished."""
    figures: dict[str, float]
    """The last evaluation."""

    @property
    def exit_code(self) -> int:
        return STOPPED if self.stopped else DONE


def train(recipe: Recipe) -> Trained:
    """Run a recipe to its duration, from the newest whole checkpoint if the run directory has one."""
    with _opened(recipe) as (run, assembled, stop):
        trainer = assembled.trainer
        for _ in trainer.steps():
            pass
        stopped = None if trainer.finished else stop.requested
        return _outcome(run, trainer, stopped)


@contextmanager
def open_trainer(recipe: Recipe) -> Iterator[Trainer]:
    """The loop in your hands: `for info in trainer.steps()`. What was handed to the writer is on disk at the end."""
    with _opened(recipe) as (_, assembled, _):
        yield assembled.trainer


@contextmanager
def _opened(recipe: Recipe) -> Iterator[tuple[RunDir, Assembled, StopRequests]]:
    """Hold the run's lock, its signals and its view around an assembled trainer. With several processes, rank 0 holds
    them, and it alone writes and shows what happens."""
    run = RunDir(Path(recipe.run))
    first = rank() == 0
    with (
        _full_disk_told(run), run.locked() if first else nullcontext(), EventLog(run.events if first else None) as log,
        StopRequests(run.control) as stop, TrainingView(recipe.duration) if first else Unseen() as view,
        Heartbeat(run.control / "heartbeats", rank(), world_size(), last_collectives) as heart,
    ):  # fmt: skip
        if first:
            run.clear_leftovers()
        assembled = assemble(recipe, log, view.show, stop)
        if first:
            _write_recipe(run, recipe)
        trainer, resumption = assembled.trainer, assembled.resumption
        trainer.parts.beat = heart.beat
        trackers = Trackers(
            recipe.log.trackers if first else (), run, recipe.plain(), trainer.progress.step,
            lambda text: trainer.tell("warning", text=text),
        )  # fmt: skip
        if resumption is None:
            trainer.tell("start", step=0, **assembled.facts)
        else:
            at = {"step": trainer.progress.step, "minutes": trainer.progress.minutes}
            trainer.tell("resume", **at, checkpoint=resumption.folder.name, **assembled.facts)
        try:
            yield run, assembled, stop
        finally:
            try:
                trainer.close()
            finally:
                trackers.close()


@contextmanager
def _full_disk_told(run: RunDir) -> Iterator[None]:
    """Say a full disk in words, whatever was being written: even a checkpoint that is no longer kept needs space to be
    renamed."""
    try:
        yield
    except OSError as error:
        told_if_full(error, run.path, f"{error.filename or 'a file of this run'} could not be written")
        raise


def _write_recipe(run: RunDir, recipe: Recipe) -> None:
    """recipe.yaml appears whole: a crash leaves the old one or the new one."""
    aside = run.path / ".recipe.yaml.partial"
    aside.write_text(dump(recipe), encoding="utf-8")
    os.replace(aside, run.recipe)


def _outcome(run: RunDir, trainer: Trainer, stopped: str | None) -> Trained:
    loss = trainer.last.loss if trainer.last else None
    if loss is None and run.events.is_file():
        last = [event for event in logged_steps(run.events) if event["step"] <= trainer.progress.step]
        loss = last[-1]["loss"] if last else None
    progress = trainer.progress
    return Trained(str(run.path), progress.step, progress.tokens, loss, stopped, dict(trainer.figures))
