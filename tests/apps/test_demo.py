"""The demo, small: every stage leaves what it promises, and its rivals are the programs everybody has."""

from __future__ import annotations

import math
import re
import shutil
import subprocess
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace

import pytest

from llmtrainer.apps import demo as module
from llmtrainer.apps.demo import Demo, demo
from llmtrainer.base.config import load
from llmtrainer.base.events import read_events
from llmtrainer.data.compressors import bits_per_byte_of
from llmtrainer.training import pace
from llmtrainer.training.console import voice
from llmtrainer.training.recipe import Recipe

_QUESTIONS = {"questions": "stdlib:questions", "held_out_questions": "stdlib:held_out_questions"}
TEXTS = [b"def f(x):\n    return x + 1\n" * 40, b"import os\n" * 3, bytes(range(32, 127)) * 20]
PROGRAMS = {"gzip": ["gzip", "-9", "-n"], "xz": ["xz", "-9"], "zstd": ["zstd", "-19", "-q"]}


@pytest.fixture(autouse=True)
def quiet() -> Iterator[None]:
    with voice(quiet=True):
        yield


@pytest.fixture
def small(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Demo:
    """A demo of a few steps of a smaller model on a few small files, in an empty folder."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(module, "SHAPE", {"hidden_size": 64, "layers": 2, "heads": 2, "intermediate_size": 128})
    monkeypatch.setattr(module, "_has_compiler", lambda: False)    # compiling takes longer than all the rest
    for part, count in (("train", 40), ("held_out", 12)):
        (tmp_path / part).mkdir()
        for number in range(count):
            body = "".join(f"def f{line}(x):\n    return x * {number + line}\n\n" for line in range(30))
            body += f'def multiplied{number}(x):\n    """The number {number}, multiplied by what is given."""\n'
            (tmp_path / part / f"{part}{number}.py").write_text(body)
    return Demo(
        data="train", held_out="held_out", questions="train", held_out_questions="held_out", vocabulary=320, steps=4,
        new_tokens=8,
    )


@pytest.mark.parametrize("name", PROGRAMS)
def test_a_rival_is_the_program_of_that_name(name: str) -> None:
    if shutil.which(name) is None:
        pytest.skip(f"{name} is not installed here")
    sizes = [len(subprocess.run(PROGRAMS[name], input=text, capture_output=True, check=True).stdout) for text in TEXTS]
    ours = bits_per_byte_of(TEXTS)[name]
    # The programs and the libraries differ in a few bytes of header.
    assert abs(ours - 8 * sum(sizes) / sum(map(len, TEXTS))) < 8 * 8 * len(TEXTS) / sum(map(len, TEXTS))


def test_every_text_is_compressed_alone() -> None:
    together = bits_per_byte_of([b"".join([TEXTS[0]] * 5)])
    apart = bits_per_byte_of([TEXTS[0]] * 5)
    assert all(apart[name] > 2 * together[name] for name in apart)


def test_the_whole_demo_leaves_everything_it_promises(small: Demo) -> None:
    told = demo(small)
    run = Path("runs/demo")
    assert (run / "recipe.yaml").is_file() and (run / "events.jsonl").is_file()
    assert [path.name for path in (run / "checkpoints").iterdir()].count("step-00000004") == 1
    assert told.plot and Path(told.plot).read_bytes().startswith(b"\x89PNG")
    written = (run / "samples" / "function.txt").read_bytes().decode()
    assert told.sample and written.startswith(small.prompt) and told.sample["text"] in written
    found = told.json()
    assert set(found) >= {"run", "bits_per_byte", "seconds"}
    assert set(found["bits_per_byte"]) == {"model", "gzip", "xz", "zstd"}
    assert all(bits > 0 for bits in found["bits_per_byte"].values())
    assert found["training"]["steps"] == 4
    answers = found["answers"]
    assert answers["run"] == "runs/demo-answers" and answers["steps"] == 1
    assert answers["rows"] == 40 and answers["held_out_rows"] == 12
    assert [said["prompt"] for said in answers["said"]] == list(small.ask)
    assert {said["finish"] for said in answers["said"]} <= {"end", "length"}
    preferences, rewards = found["preferences"], found["rewards"]
    assert preferences["run"] == "runs/demo-preferences" and preferences["steps"] == rewards["steps"] == 1
    assert preferences["pairs"] == 40 and preferences["held_out_pairs"] == 12
    # The policy is its own reference before the first step: no answer has gained on another.
    assert preferences["accuracy_before"] == 0.0 <= preferences["accuracy_after"] <= 1.0
    assert rewards["run"] == "runs/demo-rewards" and rewards["answers"] == 64
    for name in ("reward", "held_out"):
        assert 0.0 <= rewards[f"{name}_before"] <= 1.0 and 0.0 <= rewards[f"{name}_after"] <= 1.0
    assert [said["prompt"] for said in rewards["said"]] == [small.ask[0]]
    text = told.text()
    assert f"in {preferences['accuracy_after']:.0%} of 12 pairs" in text
    assert f"from {rewards['reward_before']:.2f} to {rewards['reward_after']:.2f}" in text
    assert "runs/demo-preferences" in text and "runs/demo-rewards" in text
    assert f"from {answers['loss_before']:.3f} to {answers['loss_after']:.3f}" in text
    assert "llmtrainer generate runs/demo-answers --chat" in text
    for name in ("this model", "gzip -9", "xz -9", "zstd -19"):
        assert name in text
    assert f"{found['bits_per_byte']['model']:.3f}" in text and "4 steps" in text


def test_a_model_that_knows_nothing_yet_costs_as_much_as_guessing(small: Demo) -> None:
    told = demo(small.model_copy(update={"steps": 1, "stages": ("tokenizer", "train", "evaluate")}))
    assert abs(told.evaluation["loss"] - math.log(320)) < 0.5


def test_stages_select_and_what_is_missing_is_null(small: Demo) -> None:
    told = demo(small.model_copy(update={"stages": ("compress",)}))
    assert told.bits_per_byte["model"] is None and told.bits_per_byte["xz"]
    assert told.sample is None and not Path("runs").exists()


def test_a_finished_demo_shows_its_figures_again_without_training(small: Demo) -> None:
    first = demo(small.model_copy(update={"stages": ("train", "evaluate")}))
    events = Path("runs/demo/events.jsonl").read_text().count('"step"')
    again = demo(small.model_copy(update={"steps": None, "stages": ("train", "evaluate")}))
    assert again.bits_per_byte == first.bits_per_byte
    assert Path("runs/demo/events.jsonl").read_text().count('"kind": "step"') <= events


def test_the_number_of_steps_follows_from_the_measured_speed(small: Demo, monkeypatch: pytest.MonkeyPatch) -> None:
    laps = iter([9.0, 5.0, 3.0, *[0.25, 0.5, 0.5, 0.5, 4.0, 7.0, 6.0, 5.0, 8.0]])

    @contextmanager
    def opened(recipe: Recipe):
        yield SimpleNamespace(steps=lambda: (SimpleNamespace(seconds={"total": lap}) for lap in laps))

    monkeypatch.setattr(pace, "open_trainer", opened)
    steps = pace.steps_within(module._recipe(small, 10_000), 100.0)
    assert steps == int((pace.SPARE * 100.0 - pace.AGAIN * 9.0) / 0.5)


def test_a_demo_whose_time_is_up_saves_and_goes_on_the_next_time(
    small: Demo, monkeypatch: pytest.MonkeyPatch
) -> None:
    clock = iter(range(0, 10_000, 10))
    with monkeypatch.context() as patched:
        patched.setattr(module, "steps_within", lambda recipe, seconds: 6)
        patched.setattr(pace.time, "perf_counter", lambda: float(next(clock)))
        told = demo(small.model_copy(update={"steps": None, "seconds": 25.0, "stages": ("train",)}))
    assert 0 < told.training["steps"] < 6
    saved = Path("runs/demo/checkpoints") / f"step-{told.training['steps']:08d}"
    assert (saved / "manifest.json").is_file()
    assert demo(small.model_copy(update={"steps": 6, "stages": ("train",)})).training["steps"] == 6


def test_the_saved_recipe_is_the_run(small: Demo) -> None:
    demo(small.model_copy(update={"stages": ("train",)}))
    saved = load(Recipe, "runs/demo/recipe.yaml")
    assert saved.duration.value == 4 and saved.data.train.path == "train" and saved.tokenizer.vocabulary == 320


def test_the_answers_are_learned_as_the_recipe_of_that_name_says(small: Demo) -> None:
    told = load(Recipe, str(Path(__file__).parents[2] / "recipes/tiny/sft.yaml")).plain()
    ours = module._answer_recipe(small.model_copy(update=_QUESTIONS), told["run"], 484).plain()
    for name in ("data", "model", "tokenizer", "objective", "optim", "engine"):
        assert ours[name] == told[name], name


@pytest.mark.parametrize(
    ("recipe", "ours", "steps"), [("dpo", module._prefer_recipe, 100), ("grpo", module._reinforce_recipe, 100)]
)
def test_what_follows_is_learned_as_the_recipe_of_that_name_says(
    small: Demo, recipe: str, ours: Callable[[Demo, str, int], Recipe], steps: int
) -> None:
    told = load(Recipe, str(Path(__file__).parents[2] / f"recipes/tiny/{recipe}.yaml")).plain()
    found = ours(small.model_copy(update=_QUESTIONS), told["run"], steps).plain()
    for name in ("data", "model", "tokenizer", "objective", "rollout", "optim"):
        assert found[name] == told[name], name


@pytest.mark.parametrize(
    ("text", "form", "command"),
    [
        ("Return the size of it.", True, True), ("Returns the size of it.", True, False),
        ("Process a line of os.path at once.", True, True), ("This is a file object.", True, False),
        ("Return it.", False, True), ("Return the size of it. And more of it.", False, True),
        ("Return the size of", False, True), ("return the size of it.", False, False), ("", False, False),
        ("A file that is open.", True, False), ("Return " * 22 + "it.", False, True),
    ],
)
def test_the_rule_wants_one_sentence_that_commands(text: str, form: bool, command: bool) -> None:
    assert bool(re.fullmatch(module.SENTENCE, text)) == form and bool(re.search(module.COMMAND, text)) == command


def test_learning_to_answer_lowers_the_loss_on_questions_about_what_was_not_seen(small: Demo) -> None:
    told = demo(small.model_copy(update={"steps": 40, "stages": ("train", "answer"), "ask": ()}))
    assert told.answers and told.answers["loss_after"] < 0.8 * told.answers["loss_before"]
    events = [event for event in read_events(Path("runs/demo-answers/events.jsonl")) if event["kind"] == "evaluate"]
    assert events[0]["step"] == 0
    assert events[0]["questions/loss"] == told.answers["loss_before"]
    assert events[-1]["questions/loss"] == told.answers["loss_after"]


def test_answering_takes_a_fifth_of_the_time_of_training_and_what_follows_an_eighth_on_top_of_it(
    small: Demo, monkeypatch: pytest.MonkeyPatch
) -> None:
    planned = []
    monkeypatch.setattr(module, "steps_within", lambda recipe, seconds: planned.append((recipe.run, seconds)) or 2)
    timed = small.model_copy(update={"steps": None, "seconds": 100.0, "ask": ()})
    demo(timed.model_copy(update={"stages": ("train", "answer", "prefer", "reinforce")}))
    assert planned == [
        ("runs/demo", 100.0), ("runs/demo-answers", 20.0), ("runs/demo-preferences", 12.5), ("runs/demo-rewards", 12.5),
    ]
    demo(timed.model_copy(update={"run": "runs/other", "stages": ("train",)}))
    assert planned[4:] == [("runs/other", 100.0)]
