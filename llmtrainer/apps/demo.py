"""The whole life of a small model, on text that every machine with Python has: its own standard library."""

from __future__ import annotations

import math
import shutil
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal

from pydantic import Field

from llmtrainer.base.config import Config
from llmtrainer.base.events import read_events
from llmtrainer.base.events import steps as steps_of
from llmtrainer.base.rundir import RunDir
from llmtrainer.base.units import Duration, Every
from llmtrainer.data.compressors import COMPRESSORS, bits_per_byte_of
from llmtrainer.data.open import documents, find
from llmtrainer.training.cache import receipt
from llmtrainer.training.console import bar, say
from llmtrainer.training.datasets.examples import Examples
from llmtrainer.training.datasets.preferences import Preferences
from llmtrainer.training.models import model_folder
from llmtrainer.training.pace import Trained, begun_steps, steps_within, train_within
from llmtrainer.training.prepare import prepared, trained_tokenizer
from llmtrainer.training.recipe import Recipe
from llmtrainer.training.told import Told
from llmtrainer.training.use import Evaluation, Generation, Plot, evaluate, generate, plot

Stage = Literal[
    "tokenizer", "prepare", "train", "evaluate", "compress", "sample", "answer", "prefer", "reinforce", "plot"
]
STAGES: tuple[Stage, ...] = (
    "tokenizer", "prepare", "train", "evaluate", "compress", "sample", "answer", "prefer", "reinforce", "plot",
)

SHARES: dict[Stage, tuple[float, int]] = {"answer": (0.2, 4), "prefer": (0.125, 8), "reinforce": (0.125, 8)}
"""Time that a stage after training learns, as a share of training's; and by what its number of steps is divided."""
SHAPE = {"hidden_size": 256, "layers": 4, "heads": 4, "intermediate_size": 640}
"""Of the model: what two cores teach something in minutes."""
QUESTIONS = "questions"
"""The name of the held-out questions in the events."""
SENTENCE = r"[A-Z]\S*( [^\s.]+([.][^\s.]+)*){3,20}[.]"
COMMAND = r"\A(?!This\b|The\b|An?\b)[A-Z][a-z]*(?<![a-rt-z]s)\b"
"""What earns a reward, half each: an answer of one sentence of 4 to 21 words, and one that begins with a command, as
Python's guide to docstrings has it (PEP 257): `Return the size.`, not `Returns the size.`"""
ANSWERS_A_STEP = 64
LAST = 5
"""What is told as the reward in the end is the mean of the last fifth of the steps: one step is 64 answers."""


class Demo(Config):
    """Learn a vocabulary, prepare text, train, evaluate, write, answer, learn from comparisons and from rewards:
    `llmtrainer demo`, about six minutes and a half."""

    run: str = "runs/demo"
    """The run directory; `answer`, `prefer` and `reinforce` train in others, named so with `-answers`, `-preferences`
    and `-rewards` behind it. Run again, the demo goes on where it was; a finished one shows its figures again."""

    stages: tuple[Stage, ...] = STAGES
    """Which parts of the demo to run, in their own order. What a part needs from an earlier one is made if it
    is not there, except the model: `train` comes before `evaluate`, `sample` and `answer`, and `answer` before
    `prefer` and `reinforce`."""

    data: str = "stdlib:train"
    """The text to learn from."""

    held_out: str = "stdlib:held_out"
    """Text that the model never sees: what it is measured on, and the compressors beside it."""

    questions: str = "stdlib:questions"
    """Conversations to learn answering from: here, what functions and classes do, answered by their docstrings. And
    comparisons to learn preferring from: that answer, and its first half."""

    held_out_questions: str = "stdlib:held_out_questions"
    """Conversations that it never sees, to measure how well it answers and prefers. Their questions alone are what it
    is asked when it learns from rewards."""

    vocabulary: int = Field(default=4096, ge=269)
    """Number of different pieces that text is cut into."""

    seconds: float = Field(default=180.0, gt=0.0)
    """Most seconds to spend on training; a fifth as many on answering afterwards, an eighth on comparisons, and an
    eighth on rewards. The speed is measured first, then the number of steps is fixed."""

    steps: int | None = Field(default=None, ge=1)
    """Train exactly so many steps, a quarter as many on answering, and an eighth each on comparisons and on rewards,
    instead of measuring; two machines then do the same work."""

    prompt: str = 'def read_lines(path):\n    """'
    """How the function begins that the model is to write."""

    ask: tuple[str, ...] = ("What does dumps in json do?", "What does Thread.join in threading do?")
    """What it is asked in the end."""

    new_tokens: int = Field(default=120, ge=1)
    """Length of what it writes, in tokens; an answer may end before."""

    cache: str = ".llmtrainer/cache"
    """Where the vocabulary and the tokens are kept, by content."""

    seed: int = Field(default=0, ge=0)
    """Everything random is a function of this number and the step."""


Act = Callable[[Demo], dict[str, Any]]
"""A stage: what it found out, by the names of Told."""


def demo(settings: Demo) -> Told:
    """Run the stages in their order, each with its title, and sum up."""
    started = time.perf_counter()
    acts: dict[Stage, tuple[str, Act]] = {
        "tokenizer": ("learn a vocabulary: which pieces of text deserve a number of their own", _tokenizer),
        "prepare": ("turn the text into those numbers, once", _prepare),
        "train": ("train: guess the next piece, over and over, and learn from every miss", _train),
        "evaluate": ("measure the model on files it has never seen", _evaluate),
        "compress": ("measure three compressors on the same files", _compress),
        "sample": ("let the model write", _sample),
        "answer": ("teach the model to answer questions, and ask it two", _answer),
        "prefer": ("show it a whole answer and one that breaks off, and which of them is better (DPO)", _prefer),
        "reinforce": ("let it answer, and make what a rule likes more likely (GRPO)", _reinforce),
        "plot": ("draw the curves", _plot),
    }
    chosen = [stage for stage in STAGES if stage in settings.stages]
    found: dict[str, Any] = {"bits_per_byte": dict.fromkeys(("model", *COMPRESSORS))}
    for number, stage in enumerate(chosen, start=1):
        title, act = acts[stage]
        say(f"\n{number} of {len(chosen)}: {title}")
        for name, value in act(settings).items():
            found[name] = {**found.get(name, {}), **value} if isinstance(value, dict) else value
    return Told(run=settings.run, seconds=time.perf_counter() - started, **found)


def _tokenizer(settings: Demo) -> dict[str, Any]:
    files = find(settings.data)
    folder = trained_tokenizer(settings.data, settings.vocabulary, Path(settings.cache))
    learned = receipt(folder)
    return {
        "corpus": {"files": len(files), "bytes": sum(file.bytes for file in files)},
        "vocabulary": {name: learned[name] for name in ("vocabulary", "bytes_per_token")},
    }


def _prepare(settings: Demo) -> dict[str, Any]:
    folder = trained_tokenizer(settings.data, settings.vocabulary, Path(settings.cache))
    figures = receipt(prepared(settings.data, folder, Path(settings.cache)))
    return {"corpus": {name: figures[name] for name in ("documents", "tokens")}}


def _train(settings: Demo) -> dict[str, Any]:
    if not _has_compiler():
        say("no C++ compiler on the path: the model runs uncompiled, which is slower and as right")
    trial, seconds = _recipe(settings, 10_000), settings.seconds
    steps = settings.steps or begun_steps(settings.run) or steps_within(trial, seconds)
    done = train_within(_recipe(settings, steps), None if settings.steps else seconds)
    progress, loss = done.progress, steps_of(RunDir(Path(settings.run)).events)[-1]["loss"]
    return {"training": {"steps": progress.step, "tokens": progress.tokens, "loss": loss, "seconds": done.seconds}}


def _recipe(settings: Demo, steps: int) -> Recipe:
    """The run as `recipe.yaml` will hold it; `llmtrainer train runs/demo/recipe.yaml` is the same run."""
    return Recipe.model_validate({
        "run": settings.run,
        "model": {"kind": "llama", **SHAPE, "context_length": 256, "tied_head": True},
        "tokenizer": {"vocabulary": settings.vocabulary},
        "data": {
            "train": {"path": settings.data}, "sequence_length": 256, "tokens_per_batch": 2048,
            "tokens_per_step": 2048, "held_out": 0.01 if len(find(settings.data)) >= 1000 else 0.1,
        },
        "optim": {
            "rule": {"kind": "muon"},
            "schedule": {
                "kind": "cosine", "peak": 3e-3, "warmup": f"{min(steps // 10, 50)} steps", "final_ratio": 0.02,
            },
        },
        "engine": {"kind": "single", "compile": _has_compiler()},
        "duration": Duration(steps, "steps"),
        "evaluate": {
            "every": Every(Duration(max(steps // 5, 1), "steps")), "held_out_rows": 64, "prompts": (settings.prompt,),
        },
        "save": {"every": Every(Duration(max(steps // 4, 1), "steps")), "keep_newest": 2, "keep_best": 0},
        "seed": settings.seed,
        "cache": settings.cache,
    })  # fmt: skip


def _has_compiler() -> bool:
    """Whether torch.compile can work here. A function of the machine, so that a continued demo finds it the same."""
    return any(map(shutil.which, ("c++", "g++", "clang++")))


def _evaluate(settings: Demo) -> dict[str, Any]:
    figures = evaluate(Evaluation(model=settings.run, data=settings.held_out)).json()
    return {
        "evaluation": {name: figures[name] for name in ("loss", "tokens", "perplexity")},
        "bits_per_byte": {"model": figures["bits_per_byte"]},
    }


def _compress(settings: Demo) -> dict[str, Any]:
    texts = [document.text.encode() for document in documents(find(settings.held_out))]
    total = sum(map(len, texts))
    with bar("compress", total, "bytes") as advance:
        bits = bits_per_byte_of(texts, advance)
    return {"corpus": {"held_out_files": len(texts), "held_out_bytes": total}, "bits_per_byte": bits}


def _sample(settings: Demo) -> dict[str, Any]:
    wish = Generation(
        model=settings.run, prompt=settings.prompt, max_new_tokens=settings.new_tokens, temperature=0.7,
        top_p=0.95, seed=settings.seed, stream=False,
    )  # fmt: skip
    (completion,) = generate(wish).json()["completions"]
    samples = RunDir(Path(settings.run)).samples
    samples.mkdir(parents=True, exist_ok=True)
    text = completion["prompt"] + completion["text"]
    (samples / "function.txt").write_bytes(text.encode())    # as it is: a text file would turn its line ends
    return {"sample": {"prompt": completion["prompt"], "text": completion["text"]}}


def _answer(settings: Demo) -> dict[str, Any]:
    run = f"{settings.run}-answers"
    trial = _answer_recipe(settings, run, 10_000)
    assert isinstance(trial.data, Examples)
    # Before the speed is measured, so that a person sees what is prepared.
    learned, held = trial.data.prepared(model_folder(settings.run), Path(settings.cache))
    done = _taught(settings, "answer", run, _answer_recipe)
    losses = [event[f"{QUESTIONS}/loss"] for event in _events(run, "evaluate")]
    said = [_asked(settings, run, question) for question in settings.ask]
    return {"answers": {
        "run": run, "rows": learned.documents, "held_out_rows": held[QUESTIONS].documents,
        "steps": done.progress.step, "seconds": done.seconds, "loss_before": losses[0], "loss_after": losses[-1],
        "said": said,
    }}  # fmt: skip


def _prefer(settings: Demo) -> dict[str, Any]:
    run = f"{settings.run}-preferences"
    trial = _prefer_recipe(settings, run, 10_000)
    assert isinstance(trial.data, Preferences)
    learned, held = trial.data.prepared(model_folder(trial.tokenizer.path or ""), Path(settings.cache))
    done = _taught(settings, "prefer", run, _prefer_recipe)
    shares = [event[f"{QUESTIONS}/preference/accuracy"] for event in _events(run, "evaluate")]
    return {"preferences": {
        "run": run, "pairs": learned.comparisons, "held_out_pairs": held[QUESTIONS].comparisons,
        "steps": done.progress.step, "seconds": done.seconds, "accuracy_before": shares[0],
        "accuracy_after": shares[-1],
    }}  # fmt: skip


def _reinforce(settings: Demo) -> dict[str, Any]:
    run = f"{settings.run}-rewards"
    done = _taught(settings, "reinforce", run, _reinforce_recipe)
    rewards = [event["reward/mean"] for event in steps_of(RunDir(Path(run)).events)]
    part = math.ceil(len(rewards) / LAST)
    held = [event["held_out/reward"] for event in _events(run, "evaluate")]
    return {"rewards": {
        "run": run, "steps": done.progress.step, "seconds": done.seconds, "answers": len(rewards) * ANSWERS_A_STEP,
        "reward_before": rewards[0], "reward_after": math.fsum(rewards[-part:]) / part,
        "held_out_before": held[0], "held_out_after": held[-1],
        "said": [_asked(settings, run, question) for question in settings.ask[:1]],
    }}  # fmt: skip


def _taught(settings: Demo, stage: Stage, run: str, recipe: Callable[[Demo, str, int], Recipe]) -> Trained:
    """Train a stage after the first in its share of the time, or so many steps; measured before and after."""
    share, divisor = SHARES[stage]
    if settings.steps:
        return train_within(recipe(settings, run, max(settings.steps // divisor, 1)), None, evaluate_first=True)
    seconds = share * settings.seconds
    steps = begun_steps(run) or steps_within(recipe(settings, run, 10_000), seconds)
    return train_within(recipe(settings, run, steps), seconds, evaluate_first=True)


def _events(run: str, kind: str) -> list[dict[str, Any]]:
    return [event for event in read_events(RunDir(Path(run)).events) if event["kind"] == kind]


def _answer_recipe(settings: Demo, run: str, steps: int) -> Recipe:
    """As recipes/tiny/sft.yaml, for as long as there is time."""
    return Recipe.model_validate({
        "run": run,
        "model": {"start_from": settings.run},
        "tokenizer": settings.run,
        "data": {
            "kind": "examples", "train": settings.questions, "evaluate": {QUESTIONS: settings.held_out_questions},
            "template": "chatml", "sequence_length": 256, "too_long": "drop", "tokens_per_batch": 2048,
            "sequences_per_step": 32,
        },
        "optim": {
            "rule": {"kind": "adamw", "weight_decay": 0.0},
            "schedule": {
                "kind": "cosine", "peak": 1e-3, "warmup": f"{min(steps // 10, 20)} steps", "final_ratio": 0.1,
            },
        },
        # Uncompiled: rows of many lengths would be compiled again and again, and the run is short.
        "engine": {"kind": "single", "compile": False},
        "duration": Duration(steps, "steps"),
        "evaluate": {"every": Every(Duration(max(steps // 4, 1), "steps"))},
        "save": {"keep_newest": 1, "keep_best": 0},
        "seed": settings.seed,
        "cache": settings.cache,
    })  # fmt: skip


def _after_answers(settings: Demo, run: str, steps: int) -> dict[str, Any]:
    """What runs share that go on with the model that answers."""
    answers = f"{settings.run}-answers"
    return {
        "run": run, "model": {"start_from": answers}, "tokenizer": answers,
        "engine": {"kind": "single", "compile": False}, "duration": Duration(steps, "steps"),
        "save": {"keep_newest": 1, "keep_best": 0}, "seed": settings.seed, "cache": settings.cache,
    }  # fmt: skip


def _prefer_recipe(settings: Demo, run: str, steps: int) -> Recipe:
    """As recipes/tiny/dpo.yaml, for as long as there is time."""
    return Recipe.model_validate({
        **_after_answers(settings, run, steps),
        "data": {
            "kind": "preferences", "train": settings.questions, "evaluate": {QUESTIONS: settings.held_out_questions},
            "format": {"kind": "messages", "worse": "broken_off"}, "template": "chatml", "sequence_length": 256,
            "tokens_per_batch": 4096, "pairs_per_step": 16,
        },
        "objective": {"kind": "dpo", "beta": 0.1},
        "evaluate": {"every": Every(Duration(max(steps // 4, 1), "steps"))},
        "optim": {
            "rule": {"kind": "adamw", "weight_decay": 0.0},
            "schedule": {
                "kind": "cosine", "peak": 1e-4, "warmup": f"{min(steps // 10, 10)} steps", "final_ratio": 0.1,
            },
        },
    })  # fmt: skip


def _reinforce_recipe(settings: Demo, run: str, steps: int) -> Recipe:
    """As recipes/tiny/grpo.yaml, for as long as there is time."""
    return Recipe.model_validate({
        **_after_answers(settings, run, steps),
        "data": {
            "kind": "prompts", "train": settings.held_out_questions, "template": "chatml", "tokens_per_batch": 4096,
            "prompts_per_step": ANSWERS_A_STEP // 8, "held_out": 0.25,
        },
        "objective": {"kind": "grpo", "kl": 0.05},
        "evaluate": {"every": Every(Duration(max(steps // 4, 1), "steps"))},
        "rollout": {
            "group_size": 8, "sampling": {"max_new_tokens": 40},
            "rewards": [
                {"kind": "regex", "name": "sentence", "weight": 0.5, "match": "whole", "pattern": SENTENCE},
                {"kind": "regex", "name": "command", "weight": 0.5, "pattern": COMMAND},
            ],
        },
        "optim": {
            "rule": {"kind": "adamw", "weight_decay": 0.0},
            "schedule": {"kind": "constant", "peak": 1e-4, "warmup": "0 steps"},
        },
    })  # fmt: skip


def _asked(settings: Demo, run: str, question: str) -> dict[str, str]:
    wish = Generation(
        model=run, prompt=question, chat=True, max_new_tokens=settings.new_tokens, temperature=0.0, stream=False,
    )
    (completion,) = generate(wish).json()["completions"]
    return {name: completion[name] for name in ("prompt", "text", "finish")}


def _plot(settings: Demo) -> dict[str, Any]:
    return {"plot": plot(Plot(runs=(settings.run,))).json()["path"]}
