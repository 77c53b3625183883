"""The only folder a run owns: its paths, its lock, its checkpoints and how many of them are kept."""

from __future__ import annotations

import fcntl
import json
import os
import re
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from llmtrainer.base.errors import UserError

_CHECKPOINT = re.compile(r"step-(\d{8,})")
MANIFEST, SEAL = "manifest.json", "manifest.sha256"
"""What vouches for the files of a checkpoint, and the hash that vouches for it, as the command sha256sum writes it."""
_LEFTOVER = re.compile(r"\.step-\d{8,}\.(partial|deleted)")


@dataclass(frozen=True)
class RunDir:
    """recipe.yaml, events.jsonl, checkpoints/, samples/, plots/, control/ below one path."""

    path: Path

    @property
    def recipe(self) -> Path:
        return self.path / "recipe.yaml"

    @property
    def events(self) -> Path:
        return self.path / "events.jsonl"

    @property
    def checkpoints(self) -> Path:
        return self.path / "checkpoints"

    @property
    def samples(self) -> Path:
        return self.path / "samples"

    @property
    def plots(self) -> Path:
        return self.path / "plots"

    @property
    def control(self) -> Path:
        return self.path / "control"

    @contextmanager
    def locked(self) -> Iterator[None]:
        """Own the folder until the block ends. The kernel drops the lock with the process, so kill -9 frees it."""
        self.path.mkdir(parents=True, exist_ok=True)
        with (self.path / ".lock").open("w") as handle:
            try:
                fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                raise UserError(
                    "another process is training in this run directory",
                    where=str(self.path),
                    why="two writers would mix their checkpoints and events",
                    fix="wait for it, stop it, or choose another directory: run=runs/other",
                ) from None
            yield

    def checkpoint(self, step: int) -> Path:
        return self.checkpoints / f"step-{step:08d}"

    def step_folders(self) -> list[Path]:
        """Everything that bears a checkpoint's final name, newest first."""
        if not self.checkpoints.is_dir():
            return []
        found = [entry for entry in self.checkpoints.iterdir() if _CHECKPOINT.fullmatch(entry.name)]
        return sorted(found, key=step_of, reverse=True)

    def whole_checkpoints(self) -> list[Path]:
        """Checkpoint folders, newest first. A folder with its final name was written to its end."""
        return [folder for folder in self.step_folders() if (folder / "manifest.json").is_file()]

    def newest_checkpoint(self) -> Path:
        """The newest checkpoint; a UserError if there is none."""
        whole = self.whole_checkpoints()
        if not whole:
            raise UserError(
                "there is no checkpoint in this run directory",
                where=str(self.checkpoints),
                fix="train it first: llmtrainer train RECIPE.yaml",
            )
        return whole[0]

    def clear_leftovers(self) -> None:
        """Delete what a crash left half written or half deleted. Call under the lock only."""
        if self.checkpoints.is_dir():
            for entry in sorted(self.checkpoints.iterdir()):
                match = _LEFTOVER.fullmatch(entry.name)
                if match and match[1] == "partial":
                    shutil.rmtree(entry)
                elif match:
                    _delete_own_files(entry)

    def retain(self, newest: int, best: Mapping[int, float], keep_best: int) -> list[Path]:
        """Keep the `newest` newest checkpoints and those of the `keep_best` lowest scores; delete the others.

        `best` maps a step to its score, lower is better. Returns what was deleted.
        """
        whole = self.whole_checkpoints()
        scored = sorted((score, step) for step, score in best.items() if self.checkpoint(step) in whole)
        wanted = {step_of(folder) for folder in whole[: max(newest, 1)]} | {step for _, step in scored[:keep_best]}
        deleted = [folder for folder in whole if step_of(folder) not in wanted]
        for folder in deleted:
            # The rename takes the final name away first: a crash below never leaves half a checkpoint
            # under a name that promises a whole one.
            doomed = folder.with_name(f".{folder.name}.deleted")
            folder.rename(doomed)
            _delete_own_files(doomed)
        return deleted


def step_of(checkpoint: Path) -> int:
    """The step in a checkpoint folder's name."""
    match = _CHECKPOINT.fullmatch(checkpoint.name)
    assert match, checkpoint
    return int(match[1])


def sync_folder(folder: Path) -> None:
    """Make renames and new names in a folder survive a loss of power."""
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def _delete_own_files(doomed: Path) -> None:
    """Delete what the manifest lists, then the folder. A file that somebody else put there survives; all of them where
    the manifest is damaged and nobody knows whose they are."""
    manifest = doomed / MANIFEST
    names = _listed(manifest)
    if names is not None:
        for name in (*names, SEAL):
            file = doomed / name
            file.unlink(missing_ok=True)
            if file.parent != doomed and file.parent.is_dir() and not any(file.parent.iterdir()):
                file.parent.rmdir()
        manifest.unlink()
    if any(doomed.iterdir()):
        doomed.rename(doomed.with_name(doomed.name.removeprefix(".").removesuffix(".deleted") + ".kept"))
    else:
        doomed.rmdir()


def _listed(manifest: Path) -> list[str] | None:
    """Names of the files that a manifest lists; None where there is none, or it cannot be read, or one of its names
    leads out of its folder: then nobody knows who wrote it."""
    try:
        names = list(json.loads(manifest.read_bytes())["files"])
        below = all(not Path(name).is_absolute() and ".." not in Path(name).parts for name in names)
    except (OSError, ValueError, KeyError, TypeError):
        return None
    return names if below else None
