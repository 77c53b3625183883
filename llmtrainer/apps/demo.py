"""The whole life of a small model, on text that every machine with Python has: its own standard library."""

from __future__ import annotations

import io
import math
import shutil
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from pydantic import Field
from rich.console import Console
from rich.table import Table

from llmtrainer.base.config import Config
from llmtrainer.base.events import read_events
from llmtrainer.base.events import steps as steps_of
from llmtrainer.base.result import Result
from llmtrainer.base.rundir import RunDir
from llmtrainer.base.units import Duration, Every
from llmtrainer.data.compressors import COMPRESSORS, bits_per_byte_of
from llmtrainer.data.open import documents, find
from llmtrainer.training.cache import receipt
from llmtrainer.training.console import bar, say
from llmtrainer.training.datasets.examples import Examples
from llmtrainer.training.figures import amount, short, span
from llmtrainer.training.models import model_folder
from llmtrainer.training.pace import begun_steps, steps_within, train_within
from llmtrainer.training.prepare import prepared, trained_tokenizer
from llmtrainer.training.recipe import Recipe
from llmtrainer.training.use import Evaluation, Generation, Plot, evaluate, generate, plot

Stage = Literal["tokenizer", "prepare", "train", "evaluate", "compress", "sample", "answer", "plot"]
STAGES: tuple[Stage, ...] = (
    "tokenizer", "prepare", "train", "evaluate", "compress", "sample", "answer", "plot",
)

ANSWER_SHARE = 0.2
"""Time in which the model learns to answer, as a share of what training took before."""
QUESTIONS = "questions"
"""The name of the held-out questions in the events."""


class Demo(Config):
    """Learn a vocabulary, prepare text, train, evaluate, write and answer: `llmtrainer demo`, at most six minutes."""

    run: str = "runs/demo"
    """The run directory; `answer` trains in a second one, named so with `-answers` behind it. Run again, the demo
    goes on where it was; a finished one shows its figures again."""

    stages: tuple[Stage, ...] = STAGES
    """Which parts of the demo to run, in their own order. What a part needs from an earlier one is made if it
    is not there, except the model: `train` comes before `evaluate`, `sample` and `answer`."""

    data: str = "stdlib:train"
    """The text to learn from."""

    held_out: str = "stdlib:held_out"
    """Text that the model never sees: what it is measured on, and the compressors beside it."""

    questions: str = "stdlib:questions"
    """Conversations to learn answering from: here, what functions and classes do, answered by their docstrings."""

    held_out_questions: str = "stdlib:held_out_questions"
    """Conversations that it never sees, to measure how well it answers."""

    vocabulary: int = Field(default=4096, ge=269)
    """Number of different pieces that text is cut into."""

    seconds: float = Field(default=200.0, gt=0.0)
    """Most seconds to spend on training, and a fifth as many on answering afterwards. The speed is measured first, then
    the number of steps is fixed."""

    steps: int | None = Field(default=None, ge=1)
    """Train exactly so many steps, and a quarter as many on answering, instead of measuring; two machines then do the
    same work."""

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


@dataclass(frozen=True)
class Told(Result):
    """What the demo found out, stage by stage; what was not run is None."""

    run: str
    bits_per_byte: dict[str, float | None]
    """Of the held-out text, by `model`, `gzip`, `xz` and `zstd`: lower is better."""
    seconds: float
    """Of the whole demo."""
    corpus: dict[str, int] = field(default_factory=dict)
    vocabulary: dict[str, float] = field(default_factory=dict)
    training: dict[str, float | None] = field(default_factory=dict)
    evaluation: dict[str, float] = field(default_factory=dict)
    sample: dict[str, str] | None = None
    answers: dict[str, Any] | None = None
    """How the model learned to answer: `run`, `rows`, `held_out_rows`, `steps`, `seconds`, `loss_before` and
    `loss_after` on held-out questions, and what was `said`: prompt, text and finish of each answer."""
    plot: str | None = None

    def text(self) -> str:
        """The figures, with a line on what each of them means."""
        parts = [_figures(self), _comparison(self), _written(self), _answered(self), _where_to_go(self)]
        return "\n\n".join(part for part in parts if part)


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
        "model": {
            "kind": "llama", "hidden_size": 256, "layers": 4, "heads": 4, "intermediate_size": 640,
            "context_length": 256, "tied_head": True,
        },
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
    run, seconds = f"{settings.run}-answers", ANSWER_SHARE * settings.seconds
    trial = _answer_recipe(settings, run, 10_000)
    assert isinstance(trial.data, Examples)
    # Before the speed is measured, so that a person sees what is prepared.
    learned, held = trial.data.prepared(model_folder(settings.run), Path(settings.cache))
    steps = max(settings.steps // 4, 1) if settings.steps else begun_steps(run) or steps_within(trial, seconds)
    done = train_within(
        _answer_recipe(settings, run, steps), None if settings.steps else seconds, evaluate_first=True
    )
    losses = [
        event[f"{QUESTIONS}/loss"] for event in read_events(RunDir(Path(run)).events) if event["kind"] == "evaluate"
    ]
    said = [_asked(settings, run, question) for question in settings.ask]
    return {"answers": {
        "run": run, "rows": learned.documents, "held_out_rows": held[QUESTIONS].documents,
        "steps": done.progress.step, "seconds": done.seconds, "loss_before": losses[0], "loss_after": losses[-1],
        "said": said,
    }}  # fmt: skip


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


def _asked(settings: Demo, run: str, question: str) -> dict[str, str]:
    wish = Generation(
        model=run, prompt=question, chat=True, max_new_tokens=settings.new_tokens, temperature=0.0, stream=False,
    )
    (completion,) = generate(wish).json()["completions"]
    return {name: completion[name] for name in ("prompt", "text", "finish")}


def _plot(settings: Demo) -> dict[str, Any]:
    return {"plot": plot(Plot(runs=(settings.run,))).json()["path"]}


def _figures(told: Told) -> str:
    corpus, training = told.corpus, told.training
    rows: list[tuple[str, str, str]] = []
    if "bytes" in corpus:
        size = f"{corpus['files']:,} files, {amount(corpus['bytes'], 'bytes')}"
        rows.append(("text", size, "Python source and docstrings found on this machine"))
    if told.vocabulary:
        pieces, length = told.vocabulary["vocabulary"], told.vocabulary["bytes_per_token"]
        remark = f"a piece (token) is {length:.2f} bytes of text on average"
        rows.append(("vocabulary", f"{pieces:,.0f} pieces", remark))
    if training:
        spent = f"{training['steps']:,.0f} steps in {span(training['seconds'] or 0.0)}"
        rows.append(("training", spent, f"{short(training['tokens'] or 0.0)} tokens read"))
    if told.evaluation:
        blind = math.log(told.vocabulary.get("vocabulary", 1.0))
        remark = "surprise per token of text it has never seen"
        if blind:
            remark += f"; guessing blindly costs {blind:.2f}"
        rows.append(("loss", f"{told.evaluation['loss']:.3f} nats", remark))
    if "held_out_bytes" in corpus:
        size = f"{corpus['held_out_files']:,} files, {amount(corpus['held_out_bytes'], 'bytes')}"
        rows.append(("held-out text", size, "not trained on: the figures below are about these files"))
    rows.append(("whole demo", span(told.seconds), ""))
    return _table(rows)


def _comparison(told: Told) -> str:
    known = {name: bits for name, bits in told.bits_per_byte.items() if bits is not None}
    if not known:
        return ""
    names = {"model": "this model", "gzip": "gzip -9", "xz": "xz -9", "zstd": "zstd -19"}
    unit = 40 / max(known.values())
    rows = [(names[name], f"{bits:.3f}", "#" * round(bits * unit)) for name, bits in known.items()]
    return (
        "Bits per byte of the held-out text, less is better. Whoever predicts text well can also store\n"
        "it in few bits, so a compressor is a fair rival:\n" + _table(rows)
    )


def _written(told: Told) -> str:
    if told.sample is None:
        return ""
    return "\n".join(["A function, as the model writes it:", *_lines(told.sample["prompt"] + told.sample["text"])])


def _answered(told: Told) -> str:
    if told.answers is None:
        return ""
    found = told.answers
    lines = [
        f"Fine-tuned on {found['rows']:,} questions about the library ({found['steps']:,} steps in "
        f"{span(found['seconds'])}), it answers. Its loss on {found['held_out_rows']:,} questions",
        f"about modules that it never saw went from {found['loss_before']:.3f} to {found['loss_after']:.3f} nats:",
    ]
    for said in found["said"]:
        unfinished = "" if said["finish"] == "end" else " ..."
        lines += [*_lines(said["prompt"]), *(f"    {line}" for line in _lines(said["text"].strip() + unfinished))]
    return "\n".join(lines)


def _lines(text: str) -> list[str]:
    """A model's text for a screen. A young model also writes control characters, which a terminal would obey."""
    shown = "".join(letter if letter.isprintable() or letter == "\n" else "?" for letter in text.expandtabs(4))
    return [f"    {line}" for line in shown.split("\n")]


def _where_to_go(told: Told) -> str:
    rows = [("everything is in", told.run, "recipe.yaml, events.jsonl, checkpoints, samples, plots")]
    if told.plot:
        rows.append(("the curves", told.plot, ""))
    rows.append(("let it write", f"llmtrainer generate {told.run} 'import '", ""))
    if told.answers:
        question = "What does Lock.acquire in threading do?"
        rows.append(("ask it", f"llmtrainer generate {told.answers['run']} --chat '{question}'", ""))
    rows.append(("train on your text", "llmtrainer train recipes/tiny/pretrain.yaml data.train=FOLDER", ""))
    rows.append(("or on your chats", "llmtrainer train recipes/tiny/sft.yaml data.train=FILE data.evaluate='{}'", ""))
    return _table(rows)


def _table(rows: list[tuple[str, str, str]]) -> str:
    """Rows of name, figure and remark as aligned plain text."""
    table = Table.grid(padding=(0, 2))
    for row in rows:
        table.add_row(*row)
    screen = Console(file=io.StringIO(), width=200, color_system=None, highlight=False, markup=False)
    with screen.capture() as text:
        screen.print(table)
    return "\n".join(line.rstrip() for line in text.get().splitlines())
