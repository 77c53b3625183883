"""The run directory: one owner, and only what is its own is ever deleted."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from llmtrainer.base.errors import UserError
from llmtrainer.base.rundir import RunDir


def planted(run: RunDir, *steps: int) -> None:
    for step in steps:
        folder = run.checkpoint(step)
        folder.mkdir(parents=True)
        (folder / "model.safetensors").write_text("weights")
        (folder / "manifest.json").write_text(json.dumps({"files": {"model.safetensors": {}}}))


def steps(run: RunDir) -> list[int]:
    return [int(folder.name[5:]) for folder in run.whole_checkpoints()]


def test_newest_and_best_stay_and_the_others_go(tmp_path: Path) -> None:
    run = RunDir(tmp_path)
    planted(run, 10, 20, 30, 40, 50)
    run.retain(newest=2, best={10: 1.5, 20: 1.0, 30: 2.0, 40: 3.0}, keep_best=2)
    assert steps(run) == [50, 40, 20, 10]


def test_the_newest_checkpoint_survives_any_setting(tmp_path: Path) -> None:
    run = RunDir(tmp_path)
    planted(run, 10, 20)
    run.retain(newest=0, best={}, keep_best=0)
    assert steps(run) == [20]


def test_a_foreign_file_or_folder_is_never_deleted(tmp_path: Path) -> None:
    run = RunDir(tmp_path)
    planted(run, 10, 20)
    (run.checkpoint(10) / "notes.txt").write_text("mine")
    (run.checkpoints / "step-old").mkdir()
    (run.checkpoints / "thesis.md").write_text("mine")
    run.retain(newest=1, best={}, keep_best=0)
    run.clear_leftovers()
    assert steps(run) == [20]
    assert (run.checkpoints / "step-00000010.kept" / "notes.txt").read_text() == "mine"
    assert (run.checkpoints / "step-old").is_dir() and (run.checkpoints / "thesis.md").is_file()


@pytest.mark.parametrize("absolute", [True, False])
def test_a_manifest_that_names_files_outside_its_checkpoint_deletes_none(tmp_path: Path, absolute: bool) -> None:
    run, victim = RunDir(tmp_path / "run"), tmp_path / "thesis.md"
    victim.write_text("mine")
    planted(run, 10, 20)
    name = str(victim) if absolute else "../../../thesis.md"
    (run.checkpoint(10) / "manifest.json").write_text(json.dumps({"files": {"model.safetensors": {}, name: {}}}))
    run.retain(newest=1, best={}, keep_best=0)
    assert victim.read_text() == "mine" and steps(run) == [20]
    assert (run.checkpoints / "step-00000010.kept" / "model.safetensors").is_file()


def test_leftovers_of_a_crash_are_cleared_and_nothing_else(tmp_path: Path) -> None:
    run = RunDir(tmp_path)
    planted(run, 10, 20)
    (run.checkpoints / ".step-00000030.partial").mkdir()
    (run.checkpoints / ".step-00000030.partial" / "model.safetensors").write_text("half")
    run.checkpoint(10).rename(run.checkpoints / ".step-00000010.deleted")
    run.clear_leftovers()
    assert sorted(entry.name for entry in run.checkpoints.iterdir()) == ["step-00000020"]


def test_a_second_process_is_refused_while_the_first_holds_the_lock(tmp_path: Path) -> None:
    try_it = (
        "import sys; from pathlib import Path; from llmtrainer.base.rundir import RunDir\n"
        f"with RunDir(Path({str(tmp_path)!r})).locked(): print('mine')"
    )
    with RunDir(tmp_path).locked():
        refused = subprocess.run([sys.executable, "-c", try_it], capture_output=True, text=True, check=False)
    assert "another process is training" in refused.stderr
    freed = subprocess.run([sys.executable, "-c", try_it], capture_output=True, text=True, check=False)
    assert freed.stdout == "mine\n"


def test_a_run_without_checkpoints_says_how_to_get_one(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no checkpoint") as caught:
        RunDir(tmp_path).newest_checkpoint()
    assert "llmtrainer train" in str(caught.value)
