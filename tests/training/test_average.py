"""The moving average of the weights: its values, what evaluates it, and that it survives a stop."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor

from llmtrainer.base.errors import UserError
from llmtrainer.base.events import read_events
from llmtrainer.base.rundir import RunDir
from llmtrainer.training.average import MovingAverage
from llmtrainer.training.checkpoint import verify
from llmtrainer.training.models import load_model, load_tokenizer, open_model
from llmtrainer.training.recipe import Ema, Recipe
from llmtrainer.training.run import open_trainer, train
from tests.tolerances import FLOAT32_HIDDEN
from tests.worlds import tiny_model

Make = Callable[..., Recipe]
QUIET = ("evaluate.every=never", "save.every=never")


def copied(policy: torch.nn.Module) -> dict[str, Tensor]:
    return {name: value.detach().clone() for name, value in policy.named_parameters()}


def test_the_average_is_the_recursion_by_hand(recipe: Make, tmp_path: Path) -> None:
    settings = ("optim.ema.decay=0.6", "optim.ema.warmup=false", "duration=4 steps", *QUIET)
    with open_trainer(recipe(*settings)) as trainer:
        expected = {name: value.double() for name, value in copied(trainer.parts.policy).items()}
        for _ in trainer.steps():
            for name, value in copied(trainer.parts.policy).items():
                expected[name] = 0.6 * expected[name] + 0.4 * value.double()
    ours = load_model(tmp_path / "run" / "ema")
    for name, value in ours.named_parameters():
        torch.testing.assert_close(value.detach().double(), expected[name], rtol=0, atol=FLOAT32_HIDDEN)
    last = load_model(tmp_path / "run")
    assert not torch.equal(last.head_weight, ours.head_weight)


def test_it_looks_back_less_far_at_first_and_as_far_however_often() -> None:
    policy = tiny_model()
    kept = MovingAverage(policy, Ema(decay=0.99)).kept
    assert [kept(step) for step in (1, 10, 881, 10_000)] == pytest.approx([2 / 11, 11 / 20, 882 / 891, 0.99])
    assert MovingAverage(policy, Ema(decay=0.9, warmup=False, every=3)).kept(3) == pytest.approx(0.9**3)


def test_every_third_step_takes_in_the_weights_of_every_third_step() -> None:
    policy = tiny_model()
    average = MovingAverage(policy, Ema(decay=0.5, warmup=False, every=3))
    start = copied(policy)
    with torch.no_grad():
        for step in range(1, 6):
            for parameter in policy.parameters():
                parameter.add_(1.0)
            average.update(step)
    now = copied(policy)
    with average.in_place():
        for name, value in policy.named_parameters():
            # After step 3 the weights are 3 above their start, and 1 - 0.5^3 of that is taken in.
            torch.testing.assert_close(value.detach(), start[name] + 3 * 0.875, rtol=0, atol=FLOAT32_HIDDEN)
    assert all(torch.equal(value, now[name]) for name, value in policy.named_parameters())


def test_frozen_weights_have_no_average_and_stay_as_they_are(recipe: Make, tmp_path: Path) -> None:
    train(recipe("optim.ema.decay=0.5", "model.freeze=['*.embed_tokens.*']", "duration=3 steps", *QUIET))
    averaged, last = (load_model(tmp_path / "run" / name) for name in ("ema", "."))
    same = {name for name, value in averaged.named_parameters() if torch.equal(value, last.get_parameter(name))}
    assert same == {"model.embed_tokens.weight"}


def test_stopping_and_continuing_has_the_same_bits_in_the_average(recipe: Make, tmp_path: Path) -> None:
    def averaged(run: str, stops: set[int]) -> tuple[dict[str, str], list[float]]:
        for _ in range(len(stops) + 1):
            made = recipe("optim.ema.decay=0.9", "evaluate.ema=true", f"run={tmp_path / run}", "duration=6 steps")
            with open_trainer(made) as trainer:
                for info in trainer.steps():
                    if info.progress.step in stops:
                        trainer.parts.stop.request("test")
        folder = RunDir(tmp_path / run).newest_checkpoint()
        assert verify(folder) is None
        files = json.loads((folder / "manifest.json").read_text())["files"]
        events = read_events(tmp_path / run / "events.jsonl")
        return (
            {name: file["sha256"] for name, file in files.items() if name.endswith(".safetensors")},
            [event["held_out/loss"] for event in events if event["kind"] == "evaluate"][-1:],
        )

    whole, pieces = averaged("whole", set()), averaged("pieces", {2, 5})
    assert whole == pieces
    assert set(whole[0]) == {"model.safetensors", "optimizer.safetensors", "ema/model.safetensors"}


def test_an_evaluation_that_asks_for_it_measures_the_average_and_training_does_not_notice(
    recipe: Make, tmp_path: Path
) -> None:
    def run(name: str, *words: str) -> tuple[list[dict[str, float]], bytes]:
        train(recipe(*words, f"run={tmp_path / name}", "duration=6 steps", "evaluate.every=2 steps"))
        events = read_events(tmp_path / name / "events.jsonl")
        weights = (RunDir(tmp_path / name).newest_checkpoint() / "model.safetensors").read_bytes()
        return [event for event in events if event["kind"] == "evaluate"], weights

    plain, weights = run("plain")
    beside, same_weights = run("beside", "optim.ema.decay=0.9")
    measured, also_same = run("measured", "optim.ema.decay=0.9", "evaluate.ema=true")
    assert weights == same_weights == also_same
    losses = [[event["held_out/loss"] for event in events] for events in (plain, beside, measured)]
    assert losses[0] == losses[1] and all(a != b for a, b in zip(losses[0], losses[2], strict=True))
    from_average = f"model={{start_from: {tmp_path / 'measured' / 'ema'}}}"
    with open_trainer(recipe(f"run={tmp_path / 'new'}", from_average)) as trainer:
        assert trainer.evaluate()["held_out/loss"] == losses[2][-1]


def test_the_average_is_a_model_folder_of_its_own(recipe: Make, tmp_path: Path) -> None:
    train(recipe("optim.ema.decay=0.9", "precision=bfloat16", "duration=2 steps", *QUIET))
    newest = RunDir(tmp_path / "run").newest_checkpoint()
    for path in (tmp_path / "run" / "ema", newest / "ema"):
        opened = open_model(path)
        assert (opened.folder, opened.precision) == (newest / "ema", "bfloat16")
        assert load_tokenizer(path).fingerprint == opened.tokenizer.fingerprint
    assert open_model(newest).folder == newest


def test_checkpoints_with_an_average_are_retained_and_deleted_whole(recipe: Make, tmp_path: Path) -> None:
    train(recipe("optim.ema.decay=0.9", "duration=5 steps", "save.every=1 steps", "save.keep_newest=1",
                 "save.keep_best=0"))  # fmt: skip
    assert [path.name for path in (tmp_path / "run" / "checkpoints").iterdir()] == ["step-00000005"]


def test_a_damaged_average_is_found_before_a_run_continues(recipe: Make, tmp_path: Path) -> None:
    train(recipe("optim.ema.decay=0.9", "duration=2 steps", *QUIET))
    newest = RunDir(tmp_path / "run").newest_checkpoint()
    file = newest / "ema" / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-1] + b"\x7f")
    assert verify(newest) == "ema/model.safetensors is not the file that was written"


def test_an_average_may_begin_in_a_continued_run_if_that_is_allowed(recipe: Make, tmp_path: Path) -> None:
    train(recipe("duration=2 steps", *QUIET))
    with pytest.raises(UserError, match=r"optim\.ema"):
        train(recipe("duration=3 steps", "optim.ema.decay=0.9", *QUIET))
    before = load_model(tmp_path / "run")
    words = ("duration=3 steps", "optim.ema.decay=0.9", "optim.ema.warmup=false", "allow=[optim.ema]", *QUIET)
    train(recipe(*words))
    after, average = (load_model(tmp_path / "run" / name) for name in (".", "ema"))
    expected = 0.9 * before.head_weight + 0.1 * after.head_weight
    torch.testing.assert_close(average.head_weight, expected, rtol=0, atol=FLOAT32_HIDDEN)
    told = [event["text"] for event in read_events(tmp_path / "run" / "events.jsonl") if event["kind"] == "warning"]
    assert any("no moving average so far" in text for text in told)


def test_to_measure_an_average_that_nobody_keeps_is_refused(recipe: Make) -> None:
    with pytest.raises(UserError, match="none is kept"):
        recipe("evaluate.ema=true")
