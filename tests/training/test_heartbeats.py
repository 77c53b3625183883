"""A run says which phase of which step it is in, and the same run without anybody watching has the same bytes."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from llmtrainer.base.heartbeat import read_beats
from llmtrainer.base.rundir import RunDir
from llmtrainer.training.recipe import Recipe
from llmtrainer.training.run import open_trainer

Make = Callable[..., Recipe]


def test_every_phase_of_a_step_is_told_in_order(recipe: Make, tmp_path: Path) -> None:
    """160 tokens a micro-batch: a step is several of them."""
    told: list[tuple[str, int]] = []
    with open_trainer(recipe("duration=2 steps", "evaluate.every=2 steps", "save.every=never")) as trainer:
        folder = RunDir(tmp_path / "run").control / "heartbeats"
        beat = trainer.parts.beat

        def tell(phase: str, step: int) -> None:
            beat(phase, step)
            found = read_beats(folder)[0]
            assert (found.phase, found.step) == (phase, step)
            told.append((phase, step))

        trainer.parts.beat = tell
        for _ in trainer.steps():
            pass
    assert not folder.exists()
    first = [phase for phase, step in told if step == 1]
    micro = first.count("forward")
    assert first[0] == "data" and first[1 : 1 + 2 * micro] == ["forward", "backward"] * micro
    assert first[1 + 2 * micro :] == ["optimizer", "between"]
    assert told[-1] == ("save", 2) and ("evaluate", 2) in told
