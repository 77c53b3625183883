"""With `engine.exact` a run has the same weights and optimizer to the last bit, whoever computes it and how often."""

from __future__ import annotations

import hashlib
import os
import random
import signal
from collections.abc import Sequence
from concurrent.futures.process import BrokenProcessPool
from contextlib import nullcontext
from pathlib import Path

import pytest

from llmtrainer.base.config import load
from llmtrainer.base.errors import UserError
from llmtrainer.base.rundir import RunDir
from llmtrainer.core.pieces import Stored
from llmtrainer.training import checkpoint
from llmtrainer.training.recipe import Recipe
from llmtrainer.training.run import open_trainer, train
from tests.processes import Processes, processes  # noqa: F401  a fixture
from tests.training.conftest import RECIPE

MOST = 4
"""Processes; smaller worlds are the first of them."""
UNEVEN = ("data.policy=split", "data.sequences_per_step=21", "data.tokens_per_batch=64")
"""Rows of other lengths, shards of two and three rows, two micro-batches a shard."""
FEW = 5
"""Steps of runs whose processes let go of them instead of being killed."""
MUON = ("optim.rule.kind=muon",)


def hashes(run: Path, step: int) -> tuple[str, str]:
    """SHA-256 over weights and over the optimizer's state, whoever wrote which piece of them."""
    found = []
    for stem in ("model", "optimizer"):
        stored, digest = Stored(RunDir(run).checkpoint(step), stem), hashlib.sha256()
        assert len(stored) > 10
        for name in sorted(stored):
            digest.update(name.encode() + stored[name].contiguous().numpy().tobytes())
        found.append(digest.hexdigest())
    return found[0], found[1]


def lived(world: int, text: str, overrides: Sequence[str], crash: int | None, killed: bool) -> None:
    """Run a recipe in the first `world` processes; `crash`: end behind this step with nothing saved of it, by a kill -9
    of one process or by all of them letting go."""
    if int(os.environ["RANK"]) >= world:
        return
    os.environ["WORLD_SIZE"] = str(world)
    folder = next(item for item in overrides if item.startswith("run=")).removeprefix("run=")
    path = Path(f"{folder}-{os.environ['RANK']}.yaml")
    path.write_text(text)
    recipe = load(Recipe, path, overrides=overrides)
    if crash is None:
        train(recipe)
        return
    with open_trainer(recipe) as trainer:
        for info in trainer.steps():
            if info.progress.step == crash:
                if killed and int(os.environ["RANK"]) == crash % world:
                    os.kill(os.getpid(), signal.SIGKILL)
                if not killed:
                    break


class Lives:
    """Runs of the tiny recipe in worlds of several sizes."""

    def __init__(self, processes: Processes, world: Path, folder: Path, steps: int) -> None:  # noqa: F811
        self._processes, self._folder, self.steps = processes, folder, steps
        self._text = RECIPE.format(world=world, run=folder / "run")

    def __call__(self, name: str, worlds: Sequence[tuple[int, int | None]], *more: str) -> tuple[str, str]:
        """Hashes of the last checkpoint of a run that lived in some worlds, each up to its crash."""
        for size, crash in worlds:
            given = (
                f"run={self._folder / name}", "engine.device=cpu", f"duration={self.steps} steps",
                "evaluate.every=never", "save.every=2 steps", *UNEVEN, *more,
            )  # fmt: skip
            killed = crash is not None and self.steps > FEW
            with pytest.raises(BrokenProcessPool) if killed else nullcontext():
                self._processes.run(MOST, lived, size, self._text, given, crash, killed)
        return hashes(self._folder / name, self.steps)

    def changing(self) -> list[tuple[int, int | None]]:
        """Worlds of other sizes, one after the other, each up to a crash that loses steps; the last one ends."""
        if self.steps <= FEW:
            return [(3, 3), (4, 4), (2, None)]
        draw, at, found = random.Random(self.steps), 0, list[tuple[int, int | None]]()
        for _ in range(10):
            at += draw.randint(3, 5)
            found.append((draw.choice([size for size in (1, 2, 3, 4) if not found or size != found[-1][0]]), at))
        return [*found, (2, None)]


@pytest.fixture
def lives(processes: Processes, world: Path, tmp_path: Path, request: pytest.FixtureRequest) -> Lives:  # noqa: F811
    return Lives(processes, world, tmp_path, request.config.getoption("--exact-steps"))


KINDS = ["ddp", "zero1", "fsdp2"]
FOREACH = ("optim.rule.implementation=foreach",)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("rule", [FOREACH, MUON], ids=["adamw", "muon"])
def test_any_number_of_processes_with_crashes_between_has_the_bits_of_one(
    lives: Lives, kind: str, rule: tuple[str, ...]
) -> None:
    if kind == "fsdp2" and rule == MUON:
        pytest.skip("fsdp2 refuses Muon: it looks at whole matrices, of which each process has some rows")
    exact = ("engine.exact=true", *rule)
    alone = lives("single", [(1, None)], *exact)
    several = f"engine.kind={kind}"
    sizes = [1, 2, 3, 4] if lives.steps > FEW else [1, 4] if kind == "fsdp2" else [3]
    found = {size: lives(f"{kind}-{size}", [(size, None)], *exact, several) for size in sizes}
    small = () if kind == "fsdp2" else ("engine.bucket_mib=0.02",)
    found[0] = lives("changing", lives.changing(), *exact, several, *small)
    assert found == dict.fromkeys(found, alone)


def test_the_usual_sum_of_four_processes_has_other_bits_than_one(lives: Lives) -> None:
    """The control: without exact sums, the same comparison fails."""
    assert lives("one", [(1, None)], "engine.threads=1") != lives("four", [(4, None)], "engine.kind=ddp")


def test_an_exact_run_goes_on_with_the_sums_it_began_with(tmp_path: Path, world: Path) -> None:
    path = tmp_path / "recipe.yaml"
    path.write_text(RECIPE.format(world=world, run=tmp_path / "run"))
    given = ["engine.exact=true", "engine.device=cpu", "evaluate.every=never"]
    train(load(Recipe, path, overrides=[*given, "duration=1 steps"]))
    told = checkpoint.read_manifest(RunDir(tmp_path / "run").checkpoint(1))["exact"]
    assert told["virtual_shards"] == "8" and told["threads"] == "1" and told["precision"] == "float32"
    assert told["library"].startswith("torch ") and told["instructions"] and told["optimizer"] == "adamw:fused"
    for more, name in (("engine.virtual_shards=4", "virtual_shards"), ("data.tokens_per_batch=96", "tokens_per_batch")):
        with pytest.raises(UserError, match=f"goes on with another {name}"):
            train(load(Recipe, path, overrides=[*given, "duration=2 steps", more]))
    train(load(Recipe, path, overrides=[*given, "duration=2 steps", "engine.virtual_shards=4", "allow=engine.exact"]))
    warned = [line for line in RunDir(tmp_path / "run").events.read_text().splitlines() if '"warning"' in line]
    assert any("virtual_shards was 8 and is 4" in line for line in warned)
