"""Set-ups of DeepSpeed: files equal to those kept here, checked without DeepSpeed, and recipes that mean the same."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from llmtrainer.apps.deepspeed_config import DeepspeedConfig, deepspeed_config
from llmtrainer.base.config import load
from llmtrainer.base.errors import UserError
from llmtrainer.parallel.zero_settings import PRESETS, Zero, engine_settings, problems
from llmtrainer.training.recipe import Recipe

KEPT = Path(__file__).parent / "deepspeed_presets"


def test_all_eight_set_ups_are_the_files_kept_here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    written = deepspeed_config(DeepspeedConfig())
    assert len(PRESETS) == 8 and len(written.files) == 16
    for file in written.files:
        assert Path(file).read_text() == (KEPT / Path(file).name).read_text(), file


def test_one_set_up_for_another_number_of_processes(tmp_path: Path) -> None:
    written = deepspeed_config(DeepspeedConfig(preset="ds_stage2", out=str(tmp_path), processes=3))
    assert sorted(path.name for path in tmp_path.iterdir()) == ["ds_stage2.json", "ds_stage2.yaml"]
    assert "num_processes: 3" in (tmp_path / "ds_stage2.yaml").read_text()
    assert list(written.recipes) == ["ds_stage2"]


def test_an_unknown_set_up_is_refused_with_the_nearest(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="ds_stage3"):
        deepspeed_config(DeepspeedConfig(preset="ds_stag3", out=str(tmp_path)))
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("name", PRESETS)
def test_the_words_of_a_set_up_are_a_recipe_of_the_same_engine(name: str) -> None:
    preset = PRESETS[name]
    recipe = load(Recipe, "recipes/tiny/pretrain.yaml", preset.words.split())
    found = recipe.engine.plain()
    assert (found["kind"], found["stage"]) == ("deepspeed", preset.zero.stage)
    assert (found["offload_optimizer"], found["offload_parameters"]) == (preset.zero.optimizer, preset.zero.parameters)
    assert recipe.precision == preset.precision


def test_settings_that_deepspeed_would_not_take_are_named() -> None:
    kept = json.loads((KEPT / "ds_stage3.json").read_text())
    assert problems(kept) == problems(engine_settings(Zero(2))) == []
    kept["zero_optimization"] |= {"stage": 2, "offload_param": {"device": 3}, "stge": 1}
    assert problems(kept) == [
        "zero_optimization.offload_param.device: 3 is no str", "zero_optimization.stge: unknown",
        "zero_optimization.offload_param: only stage 3 divides weights",
    ]
