"""A continued run is the run that was never interrupted: same weights, optimizer, rate, rows, losses."""

from __future__ import annotations

import errno
import json
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from llmtrainer.base.errors import UserError
from llmtrainer.base.events import read_events, steps
from llmtrainer.base.rundir import RunDir
from llmtrainer.training import checkpoint
from llmtrainer.training.recipe import Recipe
from llmtrainer.training.resume import Resumption
from llmtrainer.training.run import open_trainer, train

Make = Callable[..., Recipe]


def hashes(run: Path, step: int) -> dict[str, str]:
    """SHA-256 of weights and optimizer of one checkpoint."""
    files = checkpoint.read_manifest(RunDir(run).checkpoint(step))["files"]
    return {name: files[name]["sha256"] for name in ("model.safetensors", "optimizer.safetensors")}


def curve(run: Path) -> list[tuple[int, int, float, float, float]]:
    """(step, tokens, loss, learning rate, gradient norm) of every step, the last line of a step counting."""
    return [
        (event["step"], event["tokens"], event["loss"], event["learning_rate"], event["grad_norm"])
        for event in steps(run / "events.jsonl")
    ]


def train_until(recipe: Recipe, step: int) -> None:
    """Ask the run to stop after a step, as a signal would."""
    with open_trainer(recipe) as trainer:
        for info in trainer.steps():
            if info.progress.step == step:
                trainer.parts.stop.request("test")


def test_stopping_at_every_step_of_three_epochs_changes_nothing(recipe: Make, tmp_path: Path) -> None:
    """Also at the last step of an epoch, where others do zero steps and call it done (S38)."""
    words = ("duration=3 epochs", "data.sequences_per_step=19", "save.every=never")
    whole = train(recipe(*words, f"run={tmp_path / 'whole'}"))
    for _ in range(1000):
        with open_trainer(recipe(*words)) as trainer:
            for _ in trainer.steps():
                trainer.parts.stop.request("test")
            if trainer.finished:
                break
    assert trainer.progress.step == whole.step > 10
    assert hashes(tmp_path / "run", whole.step) == hashes(tmp_path / "whole", whole.step)
    assert curve(tmp_path / "run") == curve(tmp_path / "whole")


def test_evaluating_and_saving_between_steps_changes_nothing(recipe: Make, tmp_path: Path) -> None:
    train(recipe("evaluate.every=1 steps", "save.every=1 steps"))
    train(recipe("evaluate.every=never", "save.every=never", "save.background=false", f"run={tmp_path / 'bare'}"))
    assert hashes(tmp_path / "run", 12) == hashes(tmp_path / "bare", 12)


def test_a_disk_too_full_to_rename_what_is_no_longer_kept_is_told_and_costs_nothing(
    recipe: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    words = ("duration=4 steps", "save.every=1 steps", "save.keep_newest=1", "save.keep_best=0")
    whole = train(recipe(*words, f"run={tmp_path / 'whole'}"))
    rename = Path.rename

    def full(path: Path, target: Path) -> Path:
        if str(target).endswith(".deleted"):
            raise OSError(errno.ENOSPC, "No space left on device", str(path))
        return rename(path, target)

    with monkeypatch.context() as broken:
        broken.setattr(Path, "rename", full)
        with pytest.raises(UserError, match=r"the disk is full: .*step-00000001 could not be written"):
            train(recipe(*words))
    assert train(recipe(*words)).step == whole.step
    assert hashes(tmp_path / "run", whole.step) == hashes(tmp_path / "whole", whole.step)


def test_a_finished_run_is_left_alone_and_tells_its_last_figures(recipe: Make) -> None:
    first, second = train(recipe()), train(recipe())
    assert second.exit_code == 0
    assert (second.step, second.tokens, second.loss) == (first.step, first.tokens, first.loss)


def test_an_extended_run_keeps_the_schedule_it_began_with_and_says_so(recipe: Make, tmp_path: Path) -> None:
    train(recipe())
    train(recipe("duration=16 steps"))
    rates = [rate for _, _, _, rate, _ in curve(tmp_path / "run")]
    assert rates[12:] == [rates[11]] * 4
    warnings = [event["text"] for event in read_events(tmp_path / "run/events.jsonl") if event["kind"] == "warning"]
    assert any("keeps its schedule of 12 steps" in text for text in warnings)
    train(recipe("duration=20 steps", "optim.schedule.length=20 steps"))
    assert curve(tmp_path / "run")[-1][3] != rates[11] or rates[-1] == rates[11]


@pytest.mark.parametrize(
    ("override", "named"),
    [
        ("optim.schedule.peak=1e-4", "optim.schedule.peak"),
        ("data.sequences_per_step=6", "data.sequences_per_step"),
        ("seed=12", "seed"),
        ("model.dropout=0.2", "model.dropout"),
        ("objective.z_loss=0.1", "objective.z_loss"),
    ],
)
def test_anything_else_that_differs_is_refused_by_name(recipe: Make, override: str, named: str) -> None:
    train_until(recipe(), 3)
    with pytest.raises(UserError, match="differs") as caught:
        train(recipe(override))
    assert f"`{named}`" in str(caught.value)


def test_what_allow_names_may_differ(recipe: Make) -> None:
    train_until(recipe(), 3)
    assert train(recipe("optim.schedule.peak=1e-4", "allow=[optim.schedule]")).step == 12


def test_what_nobody_can_allow_is_not_offered_to_be_allowed(recipe: Make) -> None:
    train_until(recipe(), 3)
    for allowed, said in ((), "differs"), (("allow=[precision]",), "numbers of another type"):
        with pytest.raises(UserError, match=said) as caught:
            train(recipe("precision=float64", *allowed))
        assert "model.start_from=" in str(caught.value.fix) and "allow=" not in str(caught.value.fix)


def test_another_rule_is_answered_with_a_way_that_works(recipe: Make, tmp_path: Path) -> None:
    train_until(recipe(), 3)
    for allowed, said in ((), "differs"), (("allow=[optim.rule]",), "the optimizer's state"):
        with pytest.raises(UserError, match=said) as caught:
            train(recipe("optim.rule.kind=lion", *allowed))
        fix = str(caught.value.fix)
        assert "run=runs/other model.start_from=" in fix and "allow=" not in fix
    began = RunDir(tmp_path / "run").newest_checkpoint()
    anew = (f"run={tmp_path / 'other'}", f"model={{start_from: {began}}}")
    assert train(recipe("optim.rule.kind=lion", *anew)).step == 12


@pytest.mark.parametrize("override", ["data.tokens_per_batch=160", "save.every=1 steps", "evaluate.every=never"])
def test_what_the_contract_lets_change_may_change(recipe: Make, override: str) -> None:
    train_until(recipe(), 3)
    assert train(recipe(override)).step == 12


def test_other_data_is_refused(recipe: Make, world: Path, tmp_path: Path) -> None:
    from llmtrainer.training.prepare import Preparation, prepare

    shutil.copytree(world / "text", tmp_path / "text")
    tokens = tmp_path / "store"
    prepare(Preparation(data=str(tmp_path / "text"), out=str(tokens), tokenizer=str(world / "tokenizer"), workers=1))
    train_until(recipe(f"data.train={tokens}"), 3)
    shutil.rmtree(tokens)
    (tmp_path / "text" / "000.txt").write_text("something else entirely")
    prepare(Preparation(data=str(tmp_path / "text"), out=str(tokens), tokenizer=str(world / "tokenizer"), workers=1))
    with pytest.raises(UserError, match="data changed") as caught:
        train(recipe(f"data.train={tokens}"))
    assert "model.start_from" in str(caught.value)


@pytest.mark.parametrize("lost", ["model.safetensors", "optimizer.safetensors", "manifest.json", "config.json"])
def test_a_lost_piece_of_state_means_an_older_checkpoint_and_the_same_end(
    recipe: Make, tmp_path: Path, lost: str
) -> None:
    train(recipe(f"run={tmp_path / 'whole'}"))
    train_until(recipe(), 7)
    (RunDir(tmp_path / "run").checkpoint(7) / lost).unlink()
    train(recipe())
    assert hashes(tmp_path / "run", 12) == hashes(tmp_path / "whole", 12)
    resumed = [event for event in read_events(tmp_path / "run/events.jsonl") if event["kind"] == "resume"]
    assert resumed[0]["checkpoint"] == "step-00000006"


def test_a_field_that_only_a_beginning_or_a_continued_run_reads_is_no_error_in_the_other(recipe: Make) -> None:
    overrides = ("model.init_std=0.03", "allow=[optim.schedule]")
    train_until(recipe(*overrides), 3)
    assert train(recipe(*overrides)).step == 12


def test_never_refuses_to_touch_a_run_that_has_begun(recipe: Make) -> None:
    train_until(recipe(), 3)
    with pytest.raises(UserError, match="already holds checkpoints"):
        train(recipe("resume=never"))


def test_a_run_may_continue_elsewhere_from_a_named_checkpoint(recipe: Make, tmp_path: Path) -> None:
    train(recipe())
    folder = RunDir(tmp_path / "run").checkpoint(9)
    train(recipe(f"resume={folder}", f"run={tmp_path / 'other'}"))
    assert hashes(tmp_path / "other", 12) == hashes(tmp_path / "run", 12)


def test_resuming_reads_no_more_of_the_data_the_later_it_happens(
    recipe: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """O(1) resume: the rows of a step are looked up, not walked to."""
    from llmtrainer.data.packed import Store

    read: list[int] = []
    original = Store.read
    monkeypatch.setattr(
        Store, "read", lambda self, document, start, stop: (read.append(1), original(self, document, start, stop))[1]
    )
    calls = []
    for step in (0, 10_000):
        with open_trainer(recipe(f"run={tmp_path / str(step)}")) as trainer:
            trainer.parts.source.close()
            read.clear()
            trainer.parts.source._batches(step)  # type: ignore[attr-defined]
            calls.append(len(read))
    assert calls[1] <= 2 * calls[0]


def test_the_resumption_knows_its_scores(recipe: Make, tmp_path: Path) -> None:
    train(recipe())
    folder = RunDir(tmp_path / "run").newest_checkpoint()
    scores = Resumption(folder, checkpoint.read_manifest(folder)).scores
    figures = {
        event["step"]: event["held_out/loss"]
        for event in read_events(tmp_path / "run/events.jsonl")
        if event["kind"] == "evaluate"
    }
    assert scores == {min(figures, key=lambda step: (figures[step], step)): min(figures.values())}


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_ends_with_a_full_checkpoint_and_exit_code_3(
    recipe_file: Path, tmp_path: Path, number: signal.Signals
) -> None:
    command = [sys.executable, "-m", "llmtrainer", "train", str(recipe_file), "duration=100000 steps", "--json"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as child:
        assert child.stderr is not None
        for line in child.stderr:
            if "step" in line:
                break
        child.send_signal(number)
        out, _ = child.communicate(timeout=60)
    told = json.loads(out)
    assert child.returncode == 3 and told["stopped"] == number.name
    folder = RunDir(tmp_path / "run").newest_checkpoint()
    assert folder.name == f"step-{told['step']:08d}" and checkpoint.verify(folder) is None
    assert read_events(tmp_path / "run/events.jsonl")[-1]["kind"] == "stop"


@pytest.mark.parametrize(("name", "fix"), [("duplicate", "did you mean `duplicates`?"), ("nosuch", "optim.rule")])
def test_a_name_that_is_neither_a_guard_nor_a_key_is_no_permission(recipe: Make, name: str, fix: str) -> None:
    with pytest.raises(UserError, match=f"`allow` names `{name}`") as caught:
        recipe(f"allow=[{name}]")
    assert fix in str(caught.value.fix)
    assert recipe("allow=[duplicates, optim, optim.rule, optim.rule.betas]").allow
