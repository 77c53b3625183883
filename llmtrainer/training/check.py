"""A dry run: everything a recipe will need, tried once in a folder of its own before hours depend on it."""

from __future__ import annotations

import math
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from llmtrainer.base.errors import DONE, MENDABLE, UserError
from llmtrainer.base.events import EventLog
from llmtrainer.base.process import StopRequests
from llmtrainer.base.result import Result
from llmtrainer.base.rundir import RunDir
from llmtrainer.base.units import Duration, Every
from llmtrainer.training import checkpoint
from llmtrainer.training.assemble import assemble, engine_of, rows_of, tokenizer_of
from llmtrainer.training.memory_report import Memory, measured
from llmtrainer.training.recipe import Evaluate, Recipe
from llmtrainer.training.trainer import Trainer

MOST_DOCUMENTS = 4
"""Documents of each suite that are evaluated: enough to see that it runs."""


@dataclass(frozen=True)
class Check:
    """One thing that was tried."""

    name: str
    ok: bool
    detail: str


@dataclass(frozen=True)
class Checked(Result):
    """Everything that was tried, in order; what comes after a failure is not tried."""

    checks: tuple[Check, ...]

    @property
    def exit_code(self) -> int:
        return DONE if all(check.ok for check in self.checks) else MENDABLE

    def text(self) -> str:
        width = max(len(check.name) for check in self.checks)
        lines = []
        for check in self.checks:
            first, *more = check.detail.splitlines() or [""]
            lines.append(f"{'ok  ' if check.ok else 'FAIL'}  {check.name:<{width}}  {first}")
            lines.extend(" " * (width + 8) + line for line in more)
        return "\n".join(lines)


def check(recipe: Recipe) -> Checked:
    """Data, plan, three steps, memory, a checkpoint, an evaluation, and a resume that must be bit-equal.

    Nothing is written to the run directory; prepared data goes to the cache, where train will find it.
    """
    with tempfile.TemporaryDirectory(prefix="llmtrainer-check-") as folder:
        dry = _DryRun(recipe, Path(folder))
        done: list[Check] = []
        for name, attempt in dry.attempts():
            try:
                done.append(Check(name, True, attempt()))
            except UserError as error:
                done.append(Check(name, False, str(error)))
                break
        return Checked(tuple(done))


class _DryRun:
    def __init__(self, recipe: Recipe, folder: Path) -> None:
        self._recipe = recipe
        self._folder = folder

    def attempts(self) -> Iterator[tuple[str, Callable[[], str]]]:
        yield "data", self._data
        yield "plan", self._plan
        yield "steps", self._steps
        yield "memory", self._told_memory
        yield "save", self._save
        yield "evaluate", self._evaluate
        yield "resume", self._resume

    def _data(self) -> str:
        engine, _ = engine_of(self._recipe)
        tokenizer_folder, tokenizer = tokenizer_of(self._recipe)
        opened = rows_of(self._recipe, tokenizer_folder, tokenizer, engine)
        self._source = opened.train
        if opened.prompts is not None:
            return f"{len(opened.prompts):,} prompts; the policy writes what it learns from"
        assert self._source is not None
        store = self._source.store
        return f"{store.documents:,} documents, {store.tokens:,} tokens of a vocabulary of {tokenizer.vocabulary:,}"

    def _plan(self) -> str:
        if self._source is None:
            return f"{self._recipe.duration} of answers that the first step will ask for"
        data, batches = self._recipe.data, self._source.batches(0)
        duration = self._recipe.duration
        steps = duration.value * self._source.steps_per_epoch if duration.unit == "epochs" else duration.value
        length = f"{duration}" + (f", {math.ceil(steps):,} steps" if duration.unit == "epochs" else "")
        rows = self._source.rows_per_step
        return (
            f"{rows:,} rows of {data.sequence_length:,} tokens a step in {len(batches):,} micro-batches; "
            f"{self._source.steps_per_epoch:,.1f} steps an epoch; {length}"
        )

    def _steps(self) -> str:
        with _trainer(self._changed("straight", "3 steps")) as trainer:
            losses = [info.loss for info in trainer.steps()]
            self._memory = _memory_of(trainer)
        told = ", ".join(f"{loss:.4f}" for loss in losses)
        return f"loss {told}; every field of the recipe was read; every trainable tensor moved"

    def _told_memory(self) -> str:
        each = {kind: self._memory.of_each(kind, 8).total / 2**20 for kind in ("ddp", "zero1", "fsdp2")}
        told = ", ".join(f"{kind} {size:,.1f}" for kind, size in each.items())
        return f"{self._memory.text()}\nMiB of each of 8 processes: {told}"

    def _save(self) -> str:
        folder = RunDir(self._folder / "straight").newest_checkpoint()
        problem = checkpoint.verify(folder)
        if problem is not None:
            raise UserError(f"the checkpoint just written does not verify: {problem}", where=str(folder))
        size = sum(file["bytes"] for file in checkpoint.read_manifest(folder)["files"].values())
        return f"{size / 2**20:,.1f} MiB a checkpoint, every hash verified"

    def _evaluate(self) -> str:
        with _trainer(self._changed("straight", "3 steps")) as trainer:
            figures = trainer.evaluate()
        return ", ".join(f"{name} {value:.4f}" for name, value in figures.items()) or "nothing to evaluate"

    def _resume(self) -> str:
        for duration in ("2 steps", "3 steps"):
            with _trainer(self._changed("resumed", duration)) as trainer:
                for _ in trainer.steps():
                    pass
        names = ("straight", "resumed")
        files = [checkpoint.read_manifest(RunDir(self._folder / name).checkpoint(3))["files"] for name in names]
        tensors = [name for name in files[0] if name.endswith(".safetensors")]
        unequal = [name for name in tensors if files[0][name]["sha256"] != files[1][name]["sha256"]]
        if unequal:
            raise UserError(
                f"a resumed run differs from an uninterrupted one in {', '.join(unequal)}",
                why="a kernel on this machine does not give the same bits twice",
                fix="engine.threads=1, or engine.compile=false",
            )
        return "2 steps, stop, 1 step: bit-equal to 3 steps in weights and optimizer"

    def _changed(self, name: str, duration: str) -> Recipe:
        """The recipe for a few steps in a folder of its own, at the learning rates of the real run."""
        schedule = self._recipe.optim.schedule
        length = schedule.length or self._recipe.duration
        changes: dict[str, Any] = {
            "run": str(self._folder / name),
            "resume": "auto",
            "duration": Duration.parse(duration),
            "evaluate": self._shortened(),
            "save": self._recipe.save.model_copy(update={"every": Every.parse("never")}),
            "optim": self._recipe.optim.model_copy(update={"schedule": schedule.model_copy(update={"length": length})}),
        }
        return self._recipe.model_copy(update=changes)

    def _shortened(self) -> Evaluate:
        """The evaluations on a few rows. A setting that nothing will read stays as it is, so that it is found."""
        settings, data = self._recipe.evaluate, self._recipe.data
        most = 4 * (1 if self._source is None else self._source.rows_per_step)
        if not data.held_out or settings.held_out_rows <= most:
            return settings
        return settings.model_copy(update={"held_out_rows": most})


def _memory_of(trainer: Trainer) -> Memory:
    """Of what was just trained, and of the largest micro-batch of its last step."""
    parts = trainer.parts
    batch = max(parts.source.batches(trainer.progress.step - 1), key=lambda batch: batch.tokens_BT.numel())
    return measured(parts.engine, parts.policy, parts.objective, batch, parts.annotators)


@contextmanager
def _trainer(recipe: Recipe) -> Iterator[Trainer]:
    run = RunDir(Path(recipe.run))
    with run.locked(), EventLog(run.events) as log:
        trainer = assemble(
            recipe, log, lambda event: None, StopRequests(run.control), most_documents=MOST_DOCUMENTS
        ).trainer
        try:
            yield trainer
        finally:
            trainer.close()
