"""SwanLab."""

from __future__ import annotations

import sys
from collections.abc import Mapping
from contextlib import redirect_stdout
from typing import Any, ClassVar, Literal

from llmtrainer.base.rundir import RunDir
from llmtrainer.training.tracking import Tracker


class SwanLab(Tracker):
    """An experiment of a project at SwanLab; a continued run goes on in the same one, except with `local`. Who you
    are, `swanlab login` knows."""

    package: ClassVar[str | None] = "swanlab"

    project: str = "llmtrainer"
    """The project."""

    workspace: str | None = None
    """The team or user that it belongs to; by default yours."""

    name: str | None = None
    """What the experiment is called there; by default as its run directory."""

    mode: Literal["cloud", "local", "offline"] = "cloud"
    """local: for `swanlab watch` on this machine. offline: keep it in the run directory, for `swanlab sync`."""

    def open(self, run: RunDir, recipe: Mapping[str, Any], name: str, first: int) -> Log:
        import swanlab

        again = {"id": name, "resume": "allow"} if self.mode == "cloud" else {}
        with redirect_stdout(sys.stderr):    # it greets, and stdout is for the result
            return Log(swanlab, swanlab.init(
                project=self.project, workspace=self.workspace, experiment_name=self.name or run.path.name,
                mode=self.mode, logdir=str(run.path / "swanlab"), config=dict(recipe), **again,
            ))  # fmt: skip


class Log:
    """An open experiment at SwanLab."""

    def __init__(self, library: Any, run: Any) -> None:    # a module and a class of theirs
        self._library, self._run = library, run

    def write(self, step: int, values: Mapping[str, float]) -> None:
        self._run.log(dict(values), step=step)

    def close(self) -> None:
        with redirect_stdout(sys.stderr):
            self._library.finish()
