"""The shipped recipes: the tiny ones run and their loss falls."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from llmtrainer.base.config import load
from llmtrainer.base.events import read_events, steps
from llmtrainer.tokenizer.train import train_vocabulary
from llmtrainer.training.recipe import Recipe
from llmtrainer.training.run import train
from llmtrainer.training.use import Evaluation, evaluate

RECIPES = Path(__file__).resolve().parents[2] / "recipes" / "tiny"
TINY, CONTINUE, ANSWER, JUDGE, DISTILL = (
    RECIPES / f"{name}.yaml" for name in ("pretrain", "continue", "sft", "reward", "distill")
)
PREFER, EARN, CRITIC = (RECIPES / f"{name}.yaml" for name in ("dpo", "grpo", "ppo"))
GRADE, SEVERAL = (RECIPES / f"{name}.yaml" for name in ("ordinal", "segments"))
FULL = sorted((RECIPES.parent / "full").glob("*.yaml"))


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


def test_a_published_model_goes_on_by_the_recipe_and_its_held_out_loss_falls(tmp_path: Path) -> None:
    """The published model is one that transformers wrote: a folder of others, in bfloat16."""
    transformers = pytest.importorskip("transformers", reason="writes the folder that the run starts from")
    texts = [f"the {word} of {number} is {word} and not {number}." for word in ("sum", "root") for number in range(60)]
    (tmp_path / "texts").mkdir()
    for number, text in enumerate(texts):
        (tmp_path / "texts" / f"{number}.txt").write_text(text * 8)
    train_vocabulary(texts, 400).save(tmp_path / "model")
    config = transformers.LlamaConfig(
        vocab_size=448, hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=512, tie_word_embeddings=True,
    )  # fmt: skip
    torch.manual_seed(0)
    transformers.LlamaForCausalLM(config).to(torch.bfloat16).save_pretrained(tmp_path / "model")
    recipe = load(
        Recipe, CONTINUE,
        overrides=[
            f"run={tmp_path / 'run'}", f"cache={tmp_path / 'cache'}", f"data.train={tmp_path / 'texts'}",
            f"model.start_from={tmp_path / 'model'}", f"tokenizer={tmp_path / 'model'}", "data.held_out=0.2",
            "data.sequence_length=64", "data.tokens_per_step=1024", "data.tokens_per_batch=512",
            "optim.schedule.peak=3e-3", "duration=16 steps", "evaluate.every=4 steps", "evaluate.max_new_tokens=4",
        ],
    )  # fmt: skip
    train(recipe)
    events = read_events(tmp_path / "run" / "events.jsonl")
    losses = [event["held_out/loss"] for event in events if event["kind"] == "evaluate"]
    assert len(losses) == 4 and losses[-1] < losses[0] - 0.3, losses


def library(folder: Path) -> None:
    """Two modules: functions to learn from, and others of the same kind."""
    verbs, things = ("Open", "Close", "Count", "Print"), ("file", "door", "queue", "table", "line", "page")
    for name, words in (("known", things), ("unknown", ("letter", "window"))):
        source = [
            f'def {verb.lower()}_{thing}(it):\n    """{verb} the {thing} that is given."""\n'
            for verb in verbs for thing in words
        ]
        (folder / f"{name}.py").write_text("\n".join(source))


def trained_base(folder: Path) -> None:
    """A small model of two steps, in the run `base`."""
    train(load(
        Recipe, TINY,
        overrides=[
            f"run={folder / 'base'}", f"cache={folder / 'cache'}", f"data.train={folder / 'known.py'}",
            "tokenizer.vocabulary=300", "model.hidden_size=64", "model.layers=2", "data.sequence_length=64",
            "data.tokens_per_step=256", "data.tokens_per_batch=256", "optim.schedule.warmup=0 steps",
            "duration=2 steps", "evaluate={}",
        ],
    ))  # fmt: skip


def test_a_small_base_learns_by_the_recipe_what_functions_do_and_the_loss_on_others_falls(tmp_path: Path) -> None:
    library(tmp_path)
    trained_base(tmp_path)
    recipe = load(
        Recipe, ANSWER,
        overrides=[
            f"run={tmp_path / 'run'}", f"cache={tmp_path / 'cache'}", f"model.start_from={tmp_path / 'base'}",
            f"tokenizer={tmp_path / 'base'}", f"data.train={tmp_path / 'known.py'}",
            f"data.evaluate={{questions: {tmp_path / 'unknown.py'}}}", "data.sequence_length=192",
            "data.sequences_per_step=8", "optim.schedule.peak=3e-3", "optim.schedule.warmup=2 steps",
            "evaluate.every=4 steps", "evaluate.max_new_tokens=4", "duration=12 steps",
        ],
    )  # fmt: skip
    train(recipe)
    events = read_events(tmp_path / "run" / "events.jsonl")
    losses = [event["questions/loss"] for event in events if event["kind"] == "evaluate"]
    assert len(losses) == 3 and losses[-1] < losses[0] - 0.3, losses
    assert (tmp_path / "run" / "samples" / "step-00000012.json").is_file()


def test_by_the_recipe_a_small_base_learns_which_of_two_answers_is_right(tmp_path: Path) -> None:
    library(tmp_path)
    trained_base(tmp_path)
    recipe = load(
        Recipe, JUDGE,
        overrides=[
            f"run={tmp_path / 'run'}", f"cache={tmp_path / 'cache'}", f"model.start_from={tmp_path / 'base'}",
            f"tokenizer={tmp_path / 'base'}", f"data.train={tmp_path / 'known.py'}",
            f"data.evaluate={{questions: {tmp_path / 'known.py'}}}", "data.pairs_per_step=12",
            "optim.schedule.peak=3e-3", "optim.schedule.warmup=2 steps", "evaluate.every=never",
            "duration=40 steps",
        ],
    )  # fmt: skip
    result = train(recipe)
    accuracy = result.figures["questions/preference/accuracy"]
    assert accuracy > 0.95, result.figures
    assert (tmp_path / "run" / "plots" / "questions-gap-step-00000040.png").is_file()
    measured = evaluate(Evaluation(model=str(tmp_path / "run"), data=str(tmp_path / "known.py"), items=True))
    assert measured.preference is not None and measured.preference["accuracy"] == accuracy
    assert measured.preference["gap/std"] == pytest.approx(result.figures["questions/gap/std"], rel=1e-3)
    assert measured.items is not None and len(measured.items) == measured.documents == 24
    gaps = [item["scores"][0] - item["scores"][1] for item in measured.items]
    assert sum(gap > 0 for gap in gaps) / 24 == accuracy
    assert "of 24 pairs: the better answer has more" in measured.text()


def test_by_the_recipe_a_smaller_model_comes_near_its_teacher_from_rows_and_then_by_its_own_answers(
    tmp_path: Path,
) -> None:
    library(tmp_path)
    trained_base(tmp_path)
    shared = [
        f"cache={tmp_path / 'cache'}", f"tokenizer={tmp_path / 'base'}", "optim.schedule.warmup=2 steps",
        "evaluate.every=never",
    ]  # fmt: skip
    rows = [f"data.train={tmp_path / 'known.py'}", "data.evaluate={}", "data.sequences_per_step=8", "duration=16 steps"]
    taught = [*shared, *rows, f"run={tmp_path / 'teacher'}", f"model.start_from={tmp_path / 'base'}"]
    train(load(Recipe, ANSWER, overrides=[*taught, "evaluate.prompts=[]", "optim.schedule.peak=1e-2"]))
    shared += [f"teacher.start_from={tmp_path / 'teacher'}"]
    overrides = [*shared, *rows, f"run={tmp_path / 'run'}", "model.hidden_size=32", "model.layers=2"]
    train(load(Recipe, DISTILL, overrides=[*overrides, "optim.schedule.peak=1e-2"]))
    told = [event["loss/distill"] for event in steps(tmp_path / "run" / "events.jsonl")]
    assert told[-1] < 0.6 * told[0], told
    overrides = [
        *shared, f"run={tmp_path / 'own'}", f"model={{start_from: {tmp_path / 'run'}}}", "objective.coefficient=1.0",
        f"data={{kind: prompts, train: {tmp_path / 'known.py'}, template: chatml, prompts_per_step: 8}}",
        "objective.divergence=reverse_kl", "rollout.group_size=1", "rollout.sampling.max_new_tokens=8",
        "teacher.cached=false", "duration=8 steps", "optim.schedule.peak=1e-2",
    ]  # fmt: skip
    train(load(Recipe, DISTILL, overrides=overrides))
    told = [event["loss/distill"] for event in steps(tmp_path / "own" / "events.jsonl")]
    assert sum(told[-2:]) < sum(told[:2]), told


def started_from_base(folder: Path) -> list[str]:
    """The recipe's model, data and folders, replaced by small ones."""
    library(folder)
    trained_base(folder)
    return [
        f"run={folder / 'run'}", f"cache={folder / 'cache'}", f"model.start_from={folder / 'base'}",
        f"tokenizer={folder / 'base'}", f"data.train={folder / 'known.py'}",
    ]


def test_by_the_recipe_a_small_base_comes_to_prefer_the_right_answers(tmp_path: Path) -> None:
    recipe = load(
        Recipe, PREFER,
        overrides=[
            *started_from_base(tmp_path), f"data.evaluate={{questions: {tmp_path / 'known.py'}}}",
            "data.pairs_per_step=12", "optim.schedule.peak=1e-3", "optim.schedule.warmup=2 steps",
            "evaluate.every=never", "duration=30 steps",
        ],
    )  # fmt: skip
    result = train(recipe)
    events = steps(tmp_path / "run" / "events.jsonl")
    assert events[0]["loss"] == pytest.approx(0.6931, abs=1e-3), "the policy begins as its own reference: log 2"
    assert events[-1]["loss"] < 0.5 and result.figures["questions/preference/accuracy"] > 0.9, result.figures


def test_by_the_recipe_a_small_base_learns_the_grades_of_answers(tmp_path: Path) -> None:
    given = started_from_base(tmp_path)
    said = ("Remember {} things.", "Say {} to the one who asks for it.", "Say {} " + "again and " * 8 + "again.")
    module = (f'def say_{n}(it):\n    """{said[n % 3].format(f"number {n}")}"""\n' for n in range(12))
    (tmp_path / "known.py").write_text("\n".join(module))
    result = train(load(
        Recipe, GRADE,
        overrides=[
            *given, f"data.evaluate={{questions: {tmp_path / 'known.py'}}}", "data.pairs_per_step=12",
            "optim.schedule.peak=1e-2", "optim.schedule.warmup=2 steps", "evaluate.every=never", "duration=24 steps",
        ],
    ))  # fmt: skip
    assert result.figures["questions/ordinal/accuracy"] > 0.9, result.figures


def test_by_the_recipe_a_small_base_learns_several_preferences_behind_each_prompt(tmp_path: Path) -> None:
    given = started_from_base(tmp_path)
    (tmp_path / "known.py").write_text("".join((tmp_path / "known.py").read_text().partition("def count")[0]))
    train(load(
        Recipe, SEVERAL,
        overrides=[
            *given, "data.evaluate={}", "data.pairs_per_step=12", "optim.schedule.peak=3e-3",
            "optim.schedule.warmup=0 steps", "evaluate.every=never", "duration=8 steps",
        ],
    ))  # fmt: skip
    told = steps(tmp_path / "run" / "events.jsonl")
    assert told[0]["loss"] == pytest.approx(0.6931, abs=1e-3), "the policy begins as its own reference: log 2"
    assert told[-1]["loss"] < 0.5 and told[-1]["preference/accuracy"] > 0.9, told[-1]


CHARACTERS = "rollout.rewards=[{kind: regex, name: letters, pattern: '[a-z ]', times: 0}]"
"""A rule that a base of two steps obeys now and then: no small letter and no space."""


@pytest.mark.parametrize("name", [EARN, CRITIC], ids=["grpo", "ppo"])
def test_by_the_recipe_a_small_base_comes_to_earn_more(tmp_path: Path, name: Path) -> None:
    recipe = load(
        Recipe, name,
        overrides=[
            *started_from_base(tmp_path), CHARACTERS, "rollout.sampling.max_new_tokens=4", "objective.kl=0",
            "optim.schedule.peak=1e-2", "duration=20 steps",
        ],
    )  # fmt: skip
    train(recipe)
    rewards = [event["reward/mean"] for event in steps(tmp_path / "run" / "events.jsonl")]
    assert sum(rewards[-4:]) / 4 > sum(rewards[:4]) / 4 + 0.2, rewards


@pytest.mark.parametrize("name", [EARN, CRITIC], ids=["grpo", "ppo"])
def test_the_rule_of_the_recipe_is_measured_in_both_its_parts(tmp_path: Path, name: Path) -> None:
    train(load(Recipe, name, overrides=[*started_from_base(tmp_path), "duration=2 steps"]))
    for event in steps(tmp_path / "run" / "events.jsonl"):
        assert event["reward/mean"] == pytest.approx((event["reward/sentence"] + event["reward/command"]) / 2)


@pytest.mark.parametrize("name", FULL, ids=lambda path: path.stem)
def test_a_recipe_for_a_large_model_is_one(name: Path) -> None:
    recipe = load(Recipe, name)
    assert recipe.run == f"runs/{name.stem}" and recipe.precision == "bfloat16"
