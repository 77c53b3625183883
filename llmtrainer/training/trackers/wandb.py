"""Weights & Biases."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar, Literal

from llmtrainer.base.rundir import RunDir
from llmtrainer.training.tracking import Tracker


class Wandb(Tracker):
    """A run of a project at W&B; a continued run goes on in the same one. Who you are, `wandb login` knows."""

    package: ClassVar[str | None] = "wandb"

    project: str = "llmtrainer"
    """The project."""

    entity: str | None = None
    """The team or user that it belongs to; by default yours."""

    name: str | None = None
    """What the run is called there; by default as its run directory."""

    mode: Literal["online", "offline"] = "online"
    """offline: keep it in the run directory, for `wandb sync`."""

    def open(self, run: RunDir, recipe: Mapping[str, Any], name: str, first: int) -> Log:
        import wandb

        return Log(wandb.init(
            project=self.project, entity=self.entity, name=self.name or run.path.name, mode=self.mode, id=name,
            resume="allow", dir=str(run.path), config=dict(recipe),
        ))  # fmt: skip


class Log:
    """An open run at W&B."""

    def __init__(self, run: Any) -> None:    # a class of theirs
        self._run = run

    def write(self, step: int, values: Mapping[str, float]) -> None:
        self._run.log(dict(values), step=step)

    def close(self) -> None:
        self._run.finish()
