"""Where a run continues, and what may have changed since: anything else is refused by name."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from llmtrainer.base.config import load
from llmtrainer.base.errors import UserError
from llmtrainer.base.rundir import RunDir
from llmtrainer.base.units import Duration, Progress
from llmtrainer.core.pieces import Stored
from llmtrainer.core.protocols import Engine
from llmtrainer.models.stored import Policy, read_into
from llmtrainer.training import checkpoint
from llmtrainer.training.average import FOLDER
from llmtrainer.training.recipe import Recipe
from llmtrainer.training.saving import OPTIMIZER

MAY_CHANGE = (
    "run", "duration", "evaluate", "save", "log", "resume", "cache", "allow", "engine",
    "data.tokens_per_batch", "data.share_prompt", "data.train.workers", "data.workers", "data.evaluate",
    "data.test_dataset_dir", "optim.schedule.length",
)  # fmt: skip
"""What a continued run may change without asking. A schedule's length counts only if it is given anew."""


_NAMES = {
    "data_fingerprint": "data", "tokenizer_fingerprint": "tokenizer", "template_fingerprint": "chat template",
}  # fmt: skip
_WHY = {
    "precision": "the weights and what the optimizer remembers would be numbers of another type",
    "tokenizer_fingerprint": "the ids that it learned would be other texts",
}


@dataclass(frozen=True)
class Resumption:
    """A verified checkpoint that this run continues from."""

    folder: Path
    manifest: Mapping[str, Any]

    @property
    def progress(self) -> Progress:
        return Progress(**self.manifest["progress"])

    @property
    def schedule_length(self) -> Duration:
        return Duration.parse(self.manifest["schedule_length"])

    @property
    def scores(self) -> dict[int, float]:
        """Step -> score of the checkpoints kept as best, lower is better."""
        return {int(step): score for step, score in self.manifest["scores"].items()}

    @property
    def figures(self) -> dict[str, float]:
        """The evaluation of that very step, if there was one."""
        return dict(self.manifest["figures"])

    @property
    def average(self) -> Path:
        """The folder of the moving average of the weights, if the run keeps one."""
        return self.folder / FOLDER

    def state(self, stem: str) -> Mapping[str, Tensor]:
        """Tensors beside the model, whichever processes wrote them; each is read when it is asked for."""
        return Stored(self.folder, stem)

    def load_weights(self, policy: Policy) -> None:
        """Every tensor by name: one missing or left over is refused."""
        read_into(policy, self.folder)

    def load_state(self, engine: Engine) -> None:
        """The optimizer's and the engine's, every tensor by name."""
        engine.load_state(self.state(OPTIMIZER))


def find_resumption(
    run: RunDir, recipe: Recipe, warn: Callable[[str], None], first: bool = True
) -> Resumption | None:
    """The checkpoint a run continues from by `recipe.resume`; None for a run that begins. Never asks. `first`:
    False for a process that finds what rank 0 has verified and left as the newest."""
    if recipe.resume == "never":
        if run.step_folders():
            raise UserError(
                "this run directory already holds checkpoints and resume is `never`",
                where=str(run.checkpoints),
                why="nothing is overwritten",
                fix="resume=auto to continue, or run=runs/other to begin elsewhere",
            )
        return None
    if recipe.resume != "auto":
        folder: Path | None = _named(Path(recipe.resume))
    elif first:
        folder = checkpoint.newest_verified(run, warn)
    else:
        folder = next(iter(run.whole_checkpoints()), None)
    return None if folder is None else Resumption(folder, checkpoint.read_manifest(folder))


def continued(
    run: RunDir, recipe: Recipe, fingerprints: Mapping[str, str], warn: Callable[[str], None], rank: int
) -> Resumption | None:
    """Where this run continues, held to what it began with; what is newer than that checkpoint is set aside."""
    found = find_resumption(run, recipe, warn, first=rank == 0)
    if found is not None:
        require_same(found, recipe, fingerprints)
        if rank == 0:
            checkpoint.set_aside_newer(run, found.folder)
    return found


def require_same(old: Resumption, recipe: Recipe, fingerprints: Mapping[str, str]) -> None:
    """Refuse to continue with another recipe, vocabulary, precision or other data than the run began with."""
    began = load(Recipe, old.folder / "recipe.yaml")
    moved = [name for name, now in fingerprints.items() if old.manifest.get(name) != now]
    if changed := differences(began, recipe):
        told = "; ".join(f"{key} was {before!r} and is {after!r}" for key, (before, after) in changed.items())
        parts = sorted({key.rpartition(".")[0] or key for key in changed})
        fix = f"undo the change, or allow it by name: allow=[{', '.join(parts)}], or begin anew: run=runs/other"
        if "optim.rule.kind" in changed or moved:
            # What one rule remembers is nothing that another can go on with, whoever allows it; nor are other data.
            fix = f"undo the change, or begin anew from these weights: run=runs/other model.start_from={old.folder}"
        raise UserError(
            f"the recipe differs from the one this run began with in {', '.join(f'`{key}`' for key in changed)}",
            where=str(old.folder / "recipe.yaml"),
            why=told,
            fix=fix,
        )
    for name in moved:
        what = _NAMES.get(name, name)
        why = _WHY.get(name, "the rows of the next step would not be those of the run that began")
        raise UserError(
            f"the {what} changed since this run's checkpoint was written",
            where=str(old.folder),
            why=f"{name} was {str(old.manifest.get(name))[:16]} and is {fingerprints[name][:16]}: {why}",
            fix=f"restore the {what}, or begin anew from these weights: run=runs/other model.start_from={old.folder}",
        )


def differences(began: Recipe, now: Recipe) -> dict[str, tuple[Any, Any]]:
    """Dotted key -> (before, after) of everything that a continued run may not change."""
    free = (*MAY_CHANGE, *now.allow)
    before, after = _flat(began.model_dump(mode="json")), _flat(now.model_dump(mode="json"))
    return {
        key: (before.get(key), after.get(key))
        for key in sorted({*before, *after})
        if before.get(key) != after.get(key) and not any(key == name or key.startswith(f"{name}.") for name in free)
    }


def _flat(value: Any, name: str = "") -> dict[str, Any]:
    if isinstance(value, dict) and value:
        nested = (_flat(inner, f"{name}.{part}" if name else part) for part, inner in value.items())
        return {key: item for inner in nested for key, item in inner.items()}
    return {name: value}


def _named(folder: Path) -> Path:
    problem = checkpoint.verify(folder)
    if problem is not None:
        raise UserError(
            "the checkpoint named by `resume` is not whole",
            where=str(folder),
            why=problem,
            fix="resume=auto takes the newest one that is",
        )
    return folder
