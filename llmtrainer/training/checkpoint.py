"""Checkpoints that exist whole or do not exist: written aside, verified by hash, renamed at the end."""

from __future__ import annotations

import errno
import hashlib
import json
import os
import shutil
import threading
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from llmtrainer.base.errors import UserError
from llmtrainer.base.rundir import MANIFEST, SEAL, RunDir, step_of, sync_folder
from llmtrainer.core.pieces import Writers


def write(
    folder: Path, fill: Callable[[Path], None], facts: Mapping[str, object], writers: Writers | None = None
) -> None:
    """Write a checkpoint that either exists whole or does not exist. `fill` writes its files into a folder.

    A folder is a checkpoint if and only if it has its final name. A crash at any line below leaves at most a
    hidden `.partial` folder, which the next start of the run deletes. A full disk is a UserError, and the older
    checkpoints stay as they are. With `writers`, every process calls this and fills in its own files; rank 0 gives the
    folder its name once all of them are on disk.
    """
    partial = folder.with_name(f".{folder.name}.partial")
    first = writers is None or writers.rank == 0
    try:
        _together(writers, lambda: _empty(partial) if first else None)
        _together(writers, lambda: fill(partial))
        _together(writers, lambda: _named(partial, folder, facts) if first else None)
    except OSError as error:
        shutil.rmtree(partial, ignore_errors=True)
        told_if_full(error, folder.parent, f"checkpoint {folder.name} could not be written")
        raise


def told_if_full(error: OSError, folder: Path, what: str) -> None:
    """Raises UserError if `error` says that the disk of `folder` is full."""
    if error.errno not in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
        return
    there = next(one for one in (folder, *folder.absolute().parents) if one.is_dir())
    raise UserError(
        f"the disk is full: {what}",
        where=str(folder),
        why=f"{shutil.disk_usage(there).free / 2**20:,.0f} MiB are free; the older checkpoints are untouched, the run "
        "can go on from them",
        fix="free some space and run the same command again, or keep fewer: save.keep_newest=1 save.keep_best=0",
    ) from error


def _together(writers: Writers | None, work: Callable[[], None]) -> None:
    """Do one's part and wait for the others. Raises what went wrong here, or a UserError if it did elsewhere."""
    try:
        work()
    except BaseException:
        if writers is not None:
            writers.agree(False)
        raise
    if writers is not None and not writers.agree(True):
        raise unwritten_elsewhere()


def unwritten_elsewhere() -> UserError:
    """What the processes say that have done their part."""
    return UserError(
        "a checkpoint could not be written", where="another process of this job",
        why="it could not do its part, and says why; the older checkpoints are untouched",
        fix="do what that process says, and run the same command again",
    )


def _empty(partial: Path) -> None:
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)


def _named(partial: Path, folder: Path, facts: Mapping[str, object]) -> None:
    """List what is there, have it on disk, and give it its name."""
    listed = {}
    for path in sorted(partial.rglob("*")):
        if path.is_dir():
            sync_folder(path)
            continue
        _sync_file(path)
        listed[path.relative_to(partial).as_posix()] = {"bytes": path.stat().st_size, "sha256": sha256(path)}
    manifest, seal = partial / MANIFEST, partial / SEAL
    manifest.write_text(json.dumps({**facts, "files": listed}, indent=2) + "\n")
    seal.write_text(_sealed(manifest))
    _sync_file(manifest)
    _sync_file(seal)
    sync_folder(partial)
    partial.rename(folder)  # atomic within one file system
    sync_folder(folder.parent)  # without this the rename itself can be lost with the power


def verify(folder: Path) -> str | None:
    """What is wrong with a checkpoint, in words; None if every file is there with its size and hash."""
    try:
        # Checkpoints of earlier versions have no seal.
        if (folder / SEAL).is_file() and (folder / SEAL).read_bytes() != _sealed(folder / MANIFEST).encode():
            return f"{MANIFEST} is not the file that was written"
        manifest = json.loads((folder / "manifest.json").read_text())
        files = manifest["files"]
        missing_facts = {"step", "progress", "recipe_sha256", "data_fingerprint"} - manifest.keys()
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return "manifest.json cannot be read"
    if missing_facts:
        return f"manifest.json lacks {', '.join(sorted(missing_facts))}"
    for name, told in files.items():
        path = folder / name
        if not path.is_file():
            return f"{name} is missing"
        if path.stat().st_size != told["bytes"] or sha256(path) != told["sha256"]:
            return f"{name} is not the file that was written"
    return None


def newest_verified(run: RunDir, warn: Callable[[str], None]) -> Path | None:
    """The newest checkpoint whose every file has its hash; None if the run has no checkpoint at all.

    Falls back to an older one and says so. If there are checkpoints and none verifies, that is a UserError: a
    run never starts from scratch over the ruins of its own work.
    """
    broken: list[str] = []
    for folder in run.step_folders():
        problem = verify(folder)
        if problem is None:
            if broken:
                warn(f"continuing from {folder.name}, because {'; '.join(broken)}")
            return folder
        broken.append(f"{folder.name}: {problem}")
    if broken:
        raise UserError(
            "no checkpoint of this run is whole",
            where=str(run.checkpoints),
            why="; ".join(broken),
            fix="restore the files, or start anew in another directory: run=runs/other",
        )
    return None


def set_aside_newer(run: RunDir, chosen: Path) -> None:
    """Rename what is newer than the checkpoint a run continues from, so that those names are free again."""
    for folder in run.step_folders():
        if step_of(folder) > step_of(chosen):
            number = 0
            while (aside := folder.with_name(f"{folder.name}.aside{number or ''}")).exists():
                number += 1
            folder.rename(aside)


def read_manifest(folder: Path) -> dict[str, Any]:
    manifest: dict[str, Any] = json.loads((folder / "manifest.json").read_text())
    return manifest


def _sealed(manifest: Path) -> str:
    """What `sha256sum manifest.json` prints."""
    return f"{sha256(manifest)}  {MANIFEST}\n"


def sha256(path: Path) -> str:
    with path.open("rb") as handle:
        return hashlib.file_digest(handle, "sha256").hexdigest()


def require_space(run: RunDir, bytes_each: int, kept: int) -> None:
    """Refuse a run whose checkpoints cannot fit: better before the first step than at the first save."""
    run.checkpoints.mkdir(parents=True, exist_ok=True)
    present = sum(file.stat().st_size for folder in run.whole_checkpoints() for file in folder.rglob("*"))
    needed, free = max(bytes_each * (kept + 1) - present, bytes_each), shutil.disk_usage(run.checkpoints).free
    if needed > free:
        raise UserError(
            f"the checkpoints of this run need {needed / 2**30:,.1f} GiB and {free / 2**30:,.1f} GiB are free",
            where=str(run.checkpoints),
            why=f"{kept} are kept and one more is being written, {bytes_each / 2**20:,.0f} MiB each",
            fix="keep fewer: save.keep_newest=1 save.keep_best=0, or choose another disk: run=/other/disk/run",
        )


class Writer:
    """Writes checkpoints one at a time on a thread of its own, from tensors that nobody changes any more."""

    def __init__(self, background: bool) -> None:
        self._background = background
        self._thread: threading.Thread | None = None
        self._problem: BaseException | None = None

    def submit(self, work: Callable[[], None]) -> None:
        """Begin to write; waits for the one before, and raises what went wrong with it."""
        self.wait()
        if self._background:
            # Not a daemon: the interpreter must not end in the middle of a checkpoint.
            self._thread = threading.Thread(target=self._run, args=(work,), name="checkpoint")
            self._thread.start()
        else:
            work()

    @property
    def failed(self) -> bool:
        """Whether something went wrong in the background, without waiting."""
        return self._problem is not None

    def wait(self) -> None:
        """Until the last checkpoint is on disk. Raises what went wrong with it."""
        if self._thread is not None:
            self._thread.join()
            self._thread = None
        if self._problem is not None:
            problem, self._problem = self._problem, None
            raise problem

    def _run(self, work: Callable[[], None]) -> None:
        try:
            work()
        except BaseException as problem:  # carried to the training thread, which raises it
            self._problem = problem


def _sync_file(path: Path) -> None:
    with path.open("rb") as handle:
        os.fsync(handle.fileno())
