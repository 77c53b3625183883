"""Runs of several processes on every engine: resumed they are the same run, and any engine goes on from any other's
checkpoint."""

from __future__ import annotations

import errno
import os
from collections.abc import Callable
from concurrent.futures.process import BrokenProcessPool
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file

from llmtrainer.apps.merge import Merge, merge
from llmtrainer.base.config import load
from llmtrainer.base.errors import UserError
from llmtrainer.base.events import read_events, steps
from llmtrainer.base.rundir import RunDir
from llmtrainer.core.pieces import Stored
from llmtrainer.models.families.llama import Llama
from llmtrainer.models.weights import save_weights
from llmtrainer.parallel.writing import WholeTensors
from llmtrainer.tokenizer.tokenizer import load_tokenizer
from llmtrainer.training import checkpoint
from llmtrainer.training.models import load_model
from llmtrainer.training.recipe import Recipe
from llmtrainer.training.run import train
from tests.processes import Processes, processes  # noqa: F401  a fixture
from tests.tolerances import FLOAT64_ENGINES_RELATIVE

KINDS = ("ddp", "zero1", "fsdp2")
COMMON = (
    "precision=float64", "optim.schedule.length=6 steps", "evaluate.every=never", "save.every=2 steps",
    "save.keep_newest=9",
)


def trained(file: Path, overrides: tuple[str, ...]) -> None:
    """In each process."""
    train(load(Recipe, file, overrides=overrides))


def files_of(run: Path, step: int) -> dict[str, str]:
    """SHA-256 of every file of tensors of a checkpoint."""
    files = checkpoint.read_manifest(RunDir(run).checkpoint(step))["files"]
    return {name: told["sha256"] for name, told in files.items() if name.endswith(".safetensors")}


def losses(run: Path) -> list[float]:
    return [event["loss"] for event in steps(run / "events.jsonl")]


@pytest.fixture
def runs(recipe_file: Path, tmp_path: Path, processes: Processes) -> Callable[..., Path]:  # noqa: F811  the fixture
    """Train with so many processes, in a run directory of that name."""

    def run(name: str, count: int, *overrides: str) -> Path:
        given = (*COMMON, f"run={tmp_path / name}", *overrides)
        if count == 1:
            trained(recipe_file, given)
        else:
            processes.run(count, trained, recipe_file, given)
        return tmp_path / name

    return run


@pytest.mark.parametrize("kind", KINDS)
def test_a_resumed_run_of_two_processes_has_the_bits_of_one_that_went_through(
    kind: str, runs: Callable[..., Path]
) -> None:
    engine = f"engine.kind={kind}"
    whole = runs("whole", 2, engine, "duration=4 steps")
    for duration in ("duration=2 steps", "duration=4 steps"):
        again = runs("again", 2, engine, duration)
    assert files_of(again, 4) == files_of(whole, 4)
    assert losses(again) == losses(whole)


def test_any_engine_goes_on_from_any_others_checkpoint(runs: Callable[..., Path], recipe_file: Path) -> None:
    alone = losses(runs("alone", 1, "engine.kind=single", "duration=6 steps"))
    chain = [("fsdp2", 2), ("zero1", 3), ("single", 1), ("fsdp2", 3), ("zero1", 2), ("ddp", 2)]
    for number, (kind, count) in enumerate(chain):
        run = runs("chain", count, f"engine.kind={kind}", f"duration={number + 1} steps", "save.every=1 steps")
    np.testing.assert_allclose(losses(run), alone, rtol=FLOAT64_ENGINES_RELATIVE)


def test_pieces_are_a_model_for_every_command_and_become_a_folder(
    runs: Callable[..., Path], recipe_file: Path, tmp_path: Path
) -> None:
    """With a moving average, samples and held-out rows, which all look at the model beside the training."""
    more = ("duration=2 steps", "optim.ema.decay=0.5", "evaluate.every=1 steps", "evaluate.prompts=[abc]")
    pieces = runs("pieces", 2, "engine.kind=fsdp2", *more)
    alone = runs("alone", 1, "engine.kind=single", *more)
    held_out = [
        [event["held_out/loss"] for event in read_events(run / "events.jsonl") if event["kind"] == "evaluate"]
        for run in (pieces, alone)
    ]
    assert len(held_out[1]) == 2 and held_out[0] == pytest.approx(held_out[1])
    samples = [(run / "samples" / "step-00000002.json").read_text() for run in (pieces, alone)]
    assert samples[0] == samples[1]
    for below in ("", "ema"):
        folders = [RunDir(run).checkpoint(2) / below for run in (pieces, alone)]
        assert not (folders[0] / "model.safetensors").exists()
        read = [dict(load_model(folder, "float64").named_parameters()) for folder in folders]
        for name, value in read[1].items():
            torch.testing.assert_close(read[0][name], value, rtol=0, atol=FLOAT64_ENGINES_RELATIVE)
    merged = merge(Merge(model=str(pieces), out=str(tmp_path / "merged")))
    assert merged.precision == "float64"
    stored = Stored(RunDir(pieces).checkpoint(2), "model")
    with safe_open(tmp_path / "merged" / "model.safetensors", framework="pt") as opened:
        assert set(opened.keys()) == set(stored)
        assert all(torch.equal(opened.get_tensor(name), stored[name]) for name in stored)


@pytest.mark.parametrize(("kind", "more", "said"), [
    ("ddp", "engine.step_in_backward=true", "cannot be clipped"),
    ("zero1", "engine.step_in_backward=true optim.clip=null", "cannot update during backward"),
    ("fsdp2", "engine.step_in_backward=true optim.clip=null precision=float16", "float16 cannot update"),
    ("fsdp2", "engine.overlap_reduce=false", "while backward goes on"),
    ("fsdp2", "engine.compile=true", "does not compile"),
    ("fsdp2", "engine.cuda_graphs=true", "cannot be recorded"),
    ("fsdp2", "optim.rule.kind=muon", "looks at whole tensors"),
    ("fsdp2", "optim.rule.kind=adafactor", "looks at whole tensors"),
    ("fsdp2", "optim.rule.kind=adamw_8bit", "looks at whole tensors"),
])  # fmt: skip
def test_what_an_engine_cannot_do_is_refused_before_the_first_step(
    kind: str, more: str, said: str, recipe: Callable[..., Any]
) -> None:
    with pytest.raises(UserError, match=said):
        train(recipe(f"engine.kind={kind}", *more.split(" ")))


def failing(file: Path, overrides: tuple[str, ...], step: int, how: str) -> str:
    """In each process: train, while the last rank cannot write its part of one checkpoint; what it ends with."""
    write = WholeTensors.write

    def broken(self: WholeTensors, named: Any, folder: Path, stem: str) -> None:
        if self.rank == self.size - 1 and f"{step:08d}" in str(folder):
            if how == "dies":
                os._exit(9)
            raise OSError(errno.ENOSPC, "No space left on device")
        write(self, named, folder, stem)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(WholeTensors, "write", broken)
        try:
            trained(file, overrides)
        except UserError as error:
            return str(error)
    return "nothing"


@pytest.mark.parametrize("background", ["true", "false"])
def test_a_checkpoint_that_one_of_two_processes_cannot_write_does_not_exist_and_both_say_so(
    background: str, runs: Callable[..., Path], recipe_file: Path, tmp_path: Path,
    processes: Processes,  # noqa: F811  the fixture
) -> None:
    overrides = (
        *COMMON, f"run={tmp_path / 'run'}", "engine.kind=zero1", "duration=6 steps", f"save.background={background}"
    )
    said = processes.run(2, failing, recipe_file, overrides, 4, "disk")
    assert "could not" in said[0] and "the disk is full" in said[1]
    run = RunDir(tmp_path / "run")
    assert [folder.name for folder in run.step_folders()] == ["step-00000002"]
    assert checkpoint.verify(run.checkpoint(2)) is None
    assert losses(runs("run", 2, "engine.kind=zero1", "duration=6 steps"))[-1] == losses(
        runs("whole", 2, "engine.kind=zero1", "duration=6 steps"))[-1]


def test_a_process_that_dies_while_it_saves_leaves_nothing_that_looks_like_a_checkpoint(
    runs: Callable[..., Path], recipe_file: Path, tmp_path: Path, processes: Processes  # noqa: F811  the fixture
) -> None:
    overrides = (*COMMON, f"run={tmp_path / 'run'}", "engine.kind=zero1", "duration=6 steps")
    with pytest.raises(BrokenProcessPool):
        processes.run(2, failing, recipe_file, overrides, 4, "dies")
    run = RunDir(tmp_path / "run")
    assert [folder.name for folder in run.step_folders()] == ["step-00000002"]
    assert (run.checkpoints / ".step-00000004.partial").is_dir()
    runs("run", 2, "engine.kind=fsdp2", "duration=6 steps")
    assert run.newest_checkpoint().name == "step-00000006"
    assert not (run.checkpoints / ".step-00000004.partial").exists()


@pytest.mark.parametrize("beside", ["lora", "dora"])
def test_an_adapter_whose_reference_is_its_model_is_divided_and_saved_whole(
    beside: str, runs: Callable[..., Path], world: Path, tmp_path: Path
) -> None:
    """nearness.Near holds the policy to its reference, which here is the policy with other values in its adapters."""
    policy = Llama(hidden_size=32, layers=2, heads=2, intermediate_size=64, context_length=32).build(320)
    policy.initialise(9)
    save_weights(policy, tmp_path / "base")
    load_tokenizer(world / "tokenizer").save(tmp_path / "base")
    adapter = f"{{kind: {beside}, rank: 4, dropout: 0.1}}"
    more = (
        f"model={{start_from: {tmp_path / 'base'}, adapter: {adapter}}}", "optim.ema.decay=0.5",
        "objective.kind=tests.training.nearness.Near", "optim.schedule.peak=1e-2",
    )
    alone = runs("alone", 1, "engine.kind=single", "duration=4 steps", *more)
    divided = runs("divided", 2, "engine.kind=fsdp2", "duration=2 steps", *more)
    divided = runs("divided", 2, "engine.kind=fsdp2", "duration=4 steps", *more)
    np.testing.assert_allclose(losses(divided), losses(alone), rtol=FLOAT64_ENGINES_RELATIVE, atol=1e-15)
    for below in ("", "ema"):
        found, expected = (
            load_file(RunDir(run).checkpoint(4) / below / "adapter_model.safetensors") for run in (divided, alone)
        )
        for name, value in expected.items():
            torch.testing.assert_close(found[name], value, rtol=0, atol=FLOAT64_ENGINES_RELATIVE)
