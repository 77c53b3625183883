"""The dry run: it finds what would go wrong, and leaves nothing behind."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from llmtrainer.training.check import check
from llmtrainer.training.recipe import Recipe

Make = Callable[..., Recipe]


def test_a_sound_recipe_passes_every_check(recipe: Make, tmp_path: Path) -> None:
    result = check(recipe("data.tokens_per_batch=64"))
    assert [item.name for item in result.checks] == ["data", "plan", "steps", "memory", "save", "evaluate", "resume"]
    assert all(item.ok for item in result.checks) and result.exit_code == 0
    details = {item.name: item.detail for item in result.checks}
    assert "5 rows of 32 tokens a step in 3 micro-batches" in details["plan"]
    assert "held_out/loss" in details["evaluate"]
    assert "bit-equal" in details["resume"]
    assert not (tmp_path / "run").exists()


def test_a_recipe_without_its_data_fails_where_it_fails_and_nothing_after_is_tried(recipe: Make) -> None:
    result = check(recipe("data.train=/no/such/folder"))
    assert [(item.name, item.ok) for item in result.checks] == [("data", False)]
    assert result.exit_code == 2 and "/no/such/folder" in result.checks[0].detail
    assert result.text().startswith("FAIL  data")


def test_an_ignored_setting_is_found_before_the_real_run(recipe: Make) -> None:
    result = check(recipe("data.held_out=0"))
    assert not result.checks[-1].ok and "evaluate.held_out_rows" in result.checks[-1].detail
