"""Checkpoints exist whole or do not exist, whatever happens while they are written."""

from __future__ import annotations

import errno
import random
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from llmtrainer.base import rundir
from llmtrainer.base.errors import UserError
from llmtrainer.base.rundir import RunDir, step_of
from llmtrainer.training import checkpoint

FACTS = {"progress": {}, "recipe_sha256": "r", "data_fingerprint": "d"}


class Crash(BaseException):
    """The power went out: nothing after it runs, no handler of ours either."""


def files_of(step: int) -> Callable[[Path], None]:
    def fill(folder: Path) -> None:
        (folder / "model.safetensors").write_text(f"weights of step {step}")
        (folder / "optimizer.safetensors").write_text(f"moments of step {step}")

    return fill


def written(run: RunDir, *steps: int) -> None:
    for step in steps:
        checkpoint.write(run.checkpoint(step), files_of(step), {"step": step, **FACTS})


class Faults:
    """Counts every operation that touches the disk, and crashes at one of them, before or after it is done."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.operations = 0
        self.crash_at = (-1, False)
        for owner, name in (
            (checkpoint, "_sync_file"), (checkpoint, "sync_folder"), (rundir, "sync_folder"),
            (Path, "rename"), (Path, "mkdir"), (Path, "unlink"), (Path, "rmdir"), (Path, "write_text"),
        ):  # fmt: skip
            monkeypatch.setattr(owner, name, self.watched(getattr(owner, name)))

    def watched(self, operation: Callable[..., Any]) -> Callable[..., Any]:
        def watched(*args: Any, **kwargs: Any) -> Any:
            self.operations += 1
            own = self.operations  # an operation may consist of others, which count on
            number, before = self.crash_at
            if own == number and before:
                raise Crash
            result = operation(*args, **kwargs)
            if own == number:
                raise Crash
            return result

        return watched


def save_six_times(run: RunDir, done: list[int]) -> None:
    """What a run does: write, then keep the two newest and the best."""
    scores = {1: 3.0, 2: 1.0, 3: 2.0, 4: 4.0, 5: 0.5, 6: 6.0}
    run.clear_leftovers()
    run.retain(2, scores, keep_best=1)
    for step in range(done[-1] + 1 if done else 1, 7):
        checkpoint.write(run.checkpoint(step), files_of(step), {"step": step, **FACTS})
        done.append(step)
        run.retain(2, {key: value for key, value in scores.items() if key <= step}, keep_best=1)


def test_a_crash_at_any_operation_leaves_a_whole_checkpoint_no_older_than_the_last(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest
) -> None:
    faults = Faults(monkeypatch)
    save_six_times(RunDir(tmp_path / "whole"), [])
    operations = faults.operations
    draw = random.Random(20_260)
    crashes = int(request.config.getoption("--faults"))
    for number in range(crashes):
        run, done = RunDir(tmp_path / f"run{number}"), list[int]()
        faults.operations, faults.crash_at = 0, (draw.randint(1, operations), draw.random() < 0.5)
        with pytest.raises(Crash):
            save_six_times(run, done)
        faults.crash_at = (-1, False)
        newest = checkpoint.newest_verified(run, pytest.fail)
        assert (step_of(newest) if newest else 0) >= (done[-1] if done else 0)
        if newest is not None:
            assert (newest / "model.safetensors").read_text() == f"weights of step {step_of(newest)}"
        save_six_times(run, [step_of(newest)] if newest else [])
        names = sorted(entry.name for entry in run.checkpoints.iterdir())
        assert names == ["step-00000005", "step-00000006"], f"crash {number} left {names}"


@pytest.mark.parametrize("lost", ["model.safetensors", "optimizer.safetensors", "manifest.json"])
def test_a_missing_file_means_an_older_checkpoint_and_a_word_about_it(tmp_path: Path, lost: str) -> None:
    run, told = RunDir(tmp_path), list[str]()
    written(run, 10, 20)
    (run.checkpoint(20) / lost).unlink()
    assert checkpoint.newest_verified(run, told.append) == run.checkpoint(10)
    assert "step-00000020" in told[0] and lost in told[0]


def test_one_flipped_bit_is_found(tmp_path: Path) -> None:
    run, told = RunDir(tmp_path), list[str]()
    written(run, 10, 20)
    file = run.checkpoint(20) / "model.safetensors"
    content = bytearray(file.read_bytes())
    content[3] ^= 1
    file.write_bytes(content)
    assert checkpoint.newest_verified(run, told.append) == run.checkpoint(10)
    assert "not the file that was written" in told[0]


def test_one_flipped_bit_of_the_manifest_is_found_at_every_place(tmp_path: Path) -> None:
    run = RunDir(tmp_path)
    written(run, 10, 20)
    for name in ("manifest.json", "manifest.sha256"):
        file = run.checkpoint(20) / name
        whole = file.read_bytes()
        for place in range(len(whole)):
            file.write_bytes(whole[:place] + bytes([whole[place] ^ 1 << place % 8]) + whole[place + 1 :])
            assert checkpoint.verify(run.checkpoint(20)) is not None, f"{name}, byte {place}"
        file.write_bytes(whole)
    assert checkpoint.verify(run.checkpoint(20)) is None
    (run.checkpoint(20) / "manifest.sha256").unlink()
    assert checkpoint.verify(run.checkpoint(20)) is None, "a checkpoint of an earlier version has none"


def test_the_manifests_hash_is_as_the_systems_own_command_checks_it(tmp_path: Path) -> None:
    written(RunDir(tmp_path), 10)
    command = ["sha256sum", "--check", "manifest.sha256"]
    done = subprocess.run(command, cwd=RunDir(tmp_path).checkpoint(10), capture_output=True, text=True)
    assert done.stdout == "manifest.json: OK\n"


@pytest.mark.parametrize("damage", ["", "{", '{"files": 3}', "[]"])
def test_a_damaged_manifest_of_an_old_checkpoint_stops_no_run_and_deletes_no_file(tmp_path: Path, damage: str) -> None:
    run = RunDir(tmp_path)
    written(run, 10, 20)
    (run.checkpoint(10) / "manifest.json").write_text(damage)
    run.retain(1, {}, keep_best=0)
    assert run.checkpoint(20).is_dir()
    assert (run.checkpoints / "step-00000010.kept" / "model.safetensors").read_text() == "weights of step 10"


def test_a_run_whose_checkpoints_are_all_broken_never_starts_from_scratch(tmp_path: Path) -> None:
    run = RunDir(tmp_path)
    written(run, 10)
    (run.checkpoint(10) / "optimizer.safetensors").unlink()
    with pytest.raises(UserError, match="no checkpoint of this run is whole") as caught:
        checkpoint.newest_verified(run, pytest.fail)
    assert "optimizer.safetensors is missing" in str(caught.value)


def test_what_is_newer_than_the_chosen_checkpoint_is_set_aside_not_deleted(tmp_path: Path) -> None:
    run = RunDir(tmp_path)
    written(run, 10, 20)
    (run.checkpoint(20) / "manifest.json").unlink()
    checkpoint.set_aside_newer(run, run.checkpoint(10))
    assert run.step_folders() == [run.checkpoint(10)]
    assert (run.checkpoints / "step-00000020.aside" / "model.safetensors").is_file()


def test_a_full_disk_is_told_and_costs_nothing(tmp_path: Path) -> None:
    run = RunDir(tmp_path)
    written(run, 10)

    def full(folder: Path) -> None:
        (folder / "model.safetensors").write_text("half")
        raise OSError(errno.ENOSPC, "No space left on device")

    with pytest.raises(UserError, match="disk is full") as caught:
        checkpoint.write(run.checkpoint(20), full, {"step": 20, **FACTS})
    assert "save.keep_newest=1" in str(caught.value)
    assert [entry.name for entry in run.checkpoints.iterdir()] == ["step-00000010"]
    assert checkpoint.verify(run.checkpoint(10)) is None


def test_a_run_that_cannot_fit_is_refused_before_it_begins(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="GiB are free"):
        checkpoint.require_space(RunDir(tmp_path), bytes_each=2**60, kept=2)


def test_what_went_wrong_in_the_background_reaches_the_run(tmp_path: Path) -> None:
    def fails() -> None:
        raise UserError("the disk is full")

    writer = checkpoint.Writer(background=True)
    writer.submit(fails)
    with pytest.raises(UserError, match="disk is full"):
        writer.wait()
    writer.wait()
