"""The shipped recipes: the tiny one runs and its loss falls."""

from __future__ import annotations

from pathlib import Path

from llmtrainer.base.config import load
from llmtrainer.base.events import steps
from llmtrainer.training.recipe import Recipe
from llmtrainer.training.run import train

TINY = Path(__file__).resolve().parents[2] / "recipes" / "tiny" / "pretrain.yaml"


def test_the_tiny_recipe_runs_on_this_pythons_own_library_and_its_loss_falls(tmp_path: Path) -> None:
    """A few of its steps, on its held-out modules alone: preparing all of the library takes a minute."""
    text = tmp_path / "unseen.py"
    text.write_text("def add(a, b):\n    return a + b\n" * 20)
    recipe = load(
        Recipe, TINY,
        overrides=[
            f"run={tmp_path / 'run'}", f"cache={tmp_path / 'cache'}", "data.train=stdlib:held_out",
            "tokenizer.vocabulary=1024", "data.tokens_per_step=2048", "data.tokens_per_batch=2048",
            "optim.schedule.warmup=3 steps", "duration=12 steps", "evaluate.every=6 steps",
            f"evaluate.suites=[{{name: stdlib, path: {text}}}]", "evaluate.max_new_tokens=4",
        ],
    )  # fmt: skip
    result = train(recipe)
    losses = [event["loss"] for event in steps(tmp_path / "run" / "events.jsonl")]
    assert result.step == 12 and losses[-1] < losses[0] - 0.3
    assert 0 < result.figures["stdlib/bits_per_byte"] < 8 and result.figures["stdlib/documents"] == 1
    assert (tmp_path / "run" / "samples" / "step-00000012.json").is_file()
