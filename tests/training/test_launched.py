"""A job of two machines is the job of one: two launchers on two loopback addresses, and real training between them."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

import llmtrainer
from llmtrainer.base.events import steps
from llmtrainer.training.recipe import Recipe
from llmtrainer.training.run import train
from tests.processes import free_port

ROOT = Path(llmtrainer.__file__).parents[1]
Make = Callable[..., Recipe]


def test_two_launchers_make_one_job_with_the_losses_of_one_process(
    recipe: Make, recipe_file: Path, tmp_path: Path
) -> None:
    words = ["duration=3 steps", "precision=float64", "evaluate.every=never", "save.every=never"]
    train(recipe(*words, f"run={tmp_path / 'alone'}"))
    port = free_port()
    environment = {
        **os.environ, "PYTHONPATH": str(ROOT), "GLOO_SOCKET_IFNAME": "lo", "OMP_NUM_THREADS": "1",
    }  # fmt: skip
    launchers = [
        subprocess.Popen(
            [sys.executable, "-m", "llmtrainer", "launch", "--nproc", "1", "--nnodes", "2", "--node-rank", str(place),
             "--rendezvous", f"127.0.0.{2 - place}:{port}", "train", str(recipe_file), "engine.kind=ddp", *words,
             "--json"],
            env=environment, text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
        )
        for place in (0, 1)
    ]  # fmt: skip
    told = [launcher.communicate(timeout=240) for launcher in launchers]
    assert [launcher.returncode for launcher in launchers] == [0, 0], told
    assert json.loads(told[0][0])["step"] == 3
    losses = [[event["loss"] for event in steps(tmp_path / run / "events.jsonl")] for run in ("alone", "run")]
    assert len(losses[0]) == 3 and losses[1] == pytest.approx(losses[0], rel=1e-12, abs=0.0)
