"""KTO's point of reference is the paper's, over the whole step, however the step is cut."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from llmtrainer.base.errors import UserError
from llmtrainer.core.batch import KL, LIKED
from llmtrainer.data.comparison_source import ComparisonSource
from llmtrainer.generation.sampler import alone
from llmtrainer.parallel.engines.single import SingleEngine
from llmtrainer.training.mismatched import PointOfReference
from llmtrainer.training.recipe import Recipe
from llmtrainer.training.reference import Frozen, LiveReference
from llmtrainer.training.run import train
from tests.data.compared import compared_store, random_comparisons
from tests.tolerances import FLOAT64_LOGITS, FLOAT64_RUN
from tests.training.conftest import conversations
from tests.training.test_preferences import Make, make, pairs, written
from tests.worlds import tiny_model

assert make    # a fixture of its own


def sum_logp(model: torch.nn.Module, prompt: list[int], answer: list[int]) -> float:
    out = model(alone(prompt, answer), ("logp",))
    return float(out.logp_BT.detach().sum())


@pytest.mark.parametrize("tokens_per_batch", [30, 4096])
def test_the_point_is_the_mean_of_log_ratios_of_the_answers_before_and_at_least_0(
    tmp_path: Path, tokens_per_batch: int
) -> None:
    made = random_comparisons([(3, 6), (5, 2), (1, 7), (9, 4), (2, 2)], vocabulary=300)
    store = compared_store(tmp_path / "liked", made, liked=[True, False, True, True, False])
    source = ComparisonSource(
        store, pairs_per_step=5, tokens_per_batch=tokens_per_batch, seed=3, shuffle=True, prefetch=False
    )
    one, other = tiny_model(torch.float64, seed=1, init_std=0.5), tiny_model(torch.float64, seed=2, init_std=0.5)
    numbers, longest = source.comparisons(0), source.longest
    points = []
    for policy, reference in ((one, other), (other, one)):
        # TRL 1.16's collator says it as `completions[-1:] + completions[:-1]` of its batch.
        ratios = []
        for number, before in zip(numbers, [*numbers[-1:], *numbers[:-1]], strict=True):
            prompt = made[number][0]
            answer = made[before][1][0][: longest - len(prompt)]
            ratios.append(sum_logp(policy, prompt, answer) - sum_logp(reference, prompt, answer))
        by_hand = max(0.0, sum(ratios) / len(ratios))
        beside = LiveReference(Frozen(lambda batch, wants, reference=reference: reference(batch, wants), ""))  # type: ignore[misc]
        estimate = PointOfReference(policy, policy, (beside,), SingleEngine(torch.device("cpu"), "float64"))
        batches = estimate(source, 0, source.batches(0))
        assert len(batches) > 1 if tokens_per_batch == 30 else len(batches) == 1
        for batch in batches:
            assert batch.signals[KL].shape == batch.signals[LIKED].shape
            told = [by_hand] * batch.sequences    # a signal in float32
            assert batch.signals[KL].tolist() == pytest.approx(told, rel=1e-6, abs=FLOAT64_LOGITS)
        assert policy.training
        points.append(by_hand)
    assert min(points) == 0.0 < max(points)


@pytest.fixture
def labelled(make: Make, chats: Callable[..., Recipe], tmp_path: Path) -> Make:
    train(chats(conversations(16), "sft", "model.dropout=0"))
    for name, count in (("l", 10), ("d", 4)):
        written(tmp_path / f"{name}.jsonl", [
            {"prompt": pair["prompt"], "completion": pair[side], "label": side == "chosen"}
            for pair in pairs(count) for side in ("chosen", "rejected")
        ])  # fmt: skip
    asked = (
        f"model={{start_from: {tmp_path}/sft}}", "objective.kind=kto", f"data.train={tmp_path}/l.jsonl",
        f"data.evaluate={{dev: {tmp_path}/d.jsonl}}", "precision=float64", "duration=4 steps", "save.every=never",
        # Nearly all of it likes, so that the policy comes to lie above its reference, and the point above 0.
        "objective.liked_weight=4.0", "objective.disliked_weight=0.1", "optim.schedule.peak=1e-2",
    )  # fmt: skip
    return lambda *overrides: make(*asked, *overrides)


def test_a_run_of_kto_does_not_depend_on_how_its_steps_are_cut(labelled: Make, tmp_path: Path) -> None:
    found: dict[tuple[str, int], tuple[float, float]] = {}
    for point, tokens in (("mismatched", 4096), ("mismatched", 60), ("own", 4096), ("own", 60)):
        cut = (f"run={tmp_path}/{point}-{tokens}", f"data.tokens_per_batch={tokens}")
        done = train(labelled(*cut, f"objective.point={point}"))
        found[point, tokens] = done.loss, done.figures["dev/loss"]
    for point in ("mismatched", "own"):
        assert found[point, 60] == pytest.approx(found[point, 4096], abs=FLOAT64_RUN)
    assert abs(found["own", 60][0] - found["mismatched", 60][0]) > 1e-6


def test_a_cache_of_the_reference_does_not_know_answers_to_other_prompts(labelled: Make) -> None:
    with pytest.raises(UserError, match="read from a cache") as refused:
        train(labelled("reference.cached=true"))
    assert refused.value.fix is not None and "objective.point=own" in refused.value.fix


