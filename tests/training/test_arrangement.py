"""How a run computes: chosen in the recipe, told in the log and the manifests, and free to change on the way."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import llmtrainer as lt
from llmtrainer.base.errors import UserError
from llmtrainer.models import paths
from llmtrainer.models.attention import attend_blocks
from llmtrainer.models.visible import Visible
from llmtrainer.training.recipe import Recipe
from llmtrainer.training.run import open_trainer

Make = Callable[..., Recipe]
no_cuda = pytest.mark.skipif(torch.cuda.is_available(), reason="a machine where flex runs refuses nothing")


def events(run: Path, kind: str) -> list[dict[str, Any]]:
    lines = (run / "events.jsonl").read_text().splitlines()
    return [event for event in map(json.loads, lines) if event["kind"] == kind]


def losses(recipe: Recipe) -> list[float]:
    with open_trainer(recipe) as trainer:
        return [info.loss for info in trainer.steps()]


@no_cuda
def test_a_fallback_is_told_once_and_the_manifest_says_what_ran(recipe: Make, tmp_path: Path) -> None:
    asked = ("engine.device=cpu", "engine.attention=flex", "engine.kernels=liger", "duration=2 steps")
    with pytest.raises(UserError, match="`flex` cannot run here"):
        lt.train(recipe(*asked, f"tokenizer={tmp_path}/none"))     # refused before any text is looked at
    lt.train(recipe(*asked, "engine.fallback=true"))
    told = [event["text"] for event in events(tmp_path / "run", "warning")]
    assert [text for text in told if "flex" in text] == [
        "attention runs by `blocks` instead of `flex`: flex_attention has no backward on cpu, it is compiled for CUDA"
    ]
    assert len([text for text in told if "Liger" in text]) == 1
    manifest = json.loads(next((tmp_path / "run").rglob("manifest.json")).read_text())
    assert (manifest["attention"], manifest["kernels"]) == ("blocks", "torch")
    (start,) = events(tmp_path / "run", "start")
    assert start["attention"] == "blocks"


def test_recomputation_changes_no_loss_and_may_begin_in_a_continued_run(recipe: Make, tmp_path: Path) -> None:
    whole = losses(recipe("duration=6 steps", f"run={tmp_path}/whole"))
    asked = (f"run={tmp_path}/cut", "optim.schedule.length=6 steps")
    again = ("engine.recompute_every=1", "engine.recompute=mlp")
    assert [*losses(recipe("duration=3 steps", *asked)), *losses(recipe("duration=6 steps", *asked, *again))] == whole


def test_an_idle_recompute_is_refused(recipe: Make) -> None:
    with pytest.raises(UserError, match=r"`engine\.recompute` was set and nothing read it"):
        losses(recipe("duration=2 steps", "engine.recompute=mlp"))


def test_wrong_attention_ends_a_run_before_its_first_step(
    recipe: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def wrong(q: Tensor, k: Tensor, v: Tensor, visible: Visible) -> Tensor:
        return attend_blocks(q, k, v, visible) * 1.5

    monkeypatch.setitem(paths.PATHS, "blocks", wrong)
    with pytest.raises(UserError, match="within bounds: sdpa, reference"):
        losses(recipe("duration=2 steps", "engine.device=cpu"))
    assert not events(tmp_path / "run", "step")
