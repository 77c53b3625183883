"""Step counts against a table worked out by hand, and against what a source really serves."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from llmtrainer.base.errors import UserError
from llmtrainer.data.source import DiskSource
from llmtrainer.models.layers import intermediate_size
from llmtrainer.training.plan_steps import Rollouts, plan_steps
from tests.data.worlds import counting, make_store


@pytest.mark.parametrize(
    ("stage", "settings", "batches", "steps"),
    [
        # 2 epochs of 1000 // (4 * 2) = 125 micro-batches; 250 // 5
        ("pretrain", {"epochs": 2, "rows": 1000, "batch": 4, "world_size": 2, "accumulation": 5}, 250, 50),
        # 3 epochs of 1003 // 8 = 125; the 3 rows left over never make a batch, in no epoch
        ("sft", {"epochs": 3, "rows": 1003, "batch": 8}, 375, 375),
        # 1 epoch of 999 // (2 * 4) = 124; 124 // 8 = 15, the last 4 make no step
        ("dpo", {"epochs": 1, "rows": 999, "batch": 2, "world_size": 4, "accumulation": 8}, 124, 15),
        # 100 // 10 = 10 batches of 10 prompts; 4 passes over 10 answers by twos: 20 each
        ("ppo", {"epochs": 1, "rows": 100, "batch": 10, "rollouts": Rollouts(4, 2)}, 200, 200),
        # 2 epochs of 64 // (4 * 2) = 8; 1 pass over 4 * 8 answers by 16: 2 each; 32 // 4
        (
            "grpo",
            {
                "epochs": 2,
                "rows": 64,
                "batch": 4,
                "world_size": 2,
                "accumulation": 4,
                "rollouts": Rollouts(1, 16, 8),
            },
            32,
            8,
        ),
        # 1 epoch of 50 // 5 = 10; 3 passes over 5 * 4 answers by 6: 10 each; 100 // 7 = 14, 2 left over
        (
            "grpo",
            {"epochs": 1, "rows": 50, "batch": 5, "accumulation": 7, "rollouts": Rollouts(3, 6, 4)},
            100,
            14,
        ),
    ],
)
def test_steps_are_those_of_the_hand_formula(stage: Any, settings: dict[str, Any], batches: int, steps: int) -> None:
    plan = plan_steps(stage, **settings)
    assert (plan.batches, plan.steps) == (batches, steps)


@pytest.mark.parametrize(("world_size", "accumulation"), [(1, 1), (1, 3), (2, 3), (3, 2)])
def test_the_batches_counted_are_the_batches_served(tmp_path: Path, world_size: int, accumulation: int) -> None:
    # 24 rows of 8 tokens and one more to predict; 2 rows a micro-batch, so that every combination comes out even.
    store = make_store(tmp_path / "store", counting([24 * 8 + 1]))
    plan = plan_steps("pretrain", epochs=2, rows=24, batch=2, world_size=world_size, accumulation=accumulation)
    for rank in range(world_size):
        source = DiskSource(
            store, sequence_length=8, rows_per_step=2 * world_size * accumulation, tokens_per_batch=16, seed=0,
            documents="flowing", rank=rank, world_size=world_size, cache=tmp_path, prefetch=False,
        )  # fmt: skip
        assert source.rows_per_epoch == 24 and source.steps_per_epoch * 2 == plan.steps
        served = [batch for step in range(plan.steps) for batch in source.batches(step)]
        assert len(served) == plan.batches
        assert all(batch.tokens_BT.shape == (2, 8) for batch in served)


def test_warmup_and_decay_share_the_steps() -> None:
    plan = plan_steps("sft", epochs=1, rows=1000, batch=1, warmup_share=0.03)
    assert (plan.warmup, plan.decay) == (30, 970)


def test_data_for_less_than_a_step_is_refused() -> None:
    with pytest.raises(UserError, match="not one optimizer step") as caught:
        plan_steps("pretrain", epochs=1, rows=100, batch=8, world_size=2, accumulation=16)
    assert "256 rows" in str(caught.value.why)


@pytest.mark.parametrize(
    ("hidden", "to_64", "to_256"),
    # 8/3 of 768 is 2048 exactly; of 2048 it is 5461.3 (85.3 x 64, 21.3 x 256); of 4096 10922.7 (170.7, 42.7)
    [(768, 2048, 2048), (2048, 5504, 5632), (4096, 10944, 11008)],
)
def test_intermediate_sizes_are_rounded_up(hidden: int, to_64: int, to_256: int) -> None:
    assert (intermediate_size(hidden, 64), intermediate_size(hidden)) == (to_64, to_256)
