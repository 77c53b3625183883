"""The whole life of a small model, on text that every machine with Python has: its own standard library."""

from __future__ import annotations

import gzip
import io
import itertools
import lzma
import math
import shutil
import statistics
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import zstandard
from pydantic import Field
from rich.console import Console
from rich.table import Table

from llmtrainer.base.config import Config, load
from llmtrainer.base.errors import RunStopped
from llmtrainer.base.events import steps as steps_of
from llmtrainer.base.result import Result
from llmtrainer.base.rundir import RunDir
from llmtrainer.base.units import Duration, Every
from llmtrainer.data.open import documents, find
from llmtrainer.training.cache import receipt
from llmtrainer.training.console import bar, say, voice
from llmtrainer.training.figures import amount, short, span
from llmtrainer.training.prepare import prepared, trained_tokenizer
from llmtrainer.training.recipe import Recipe
from llmtrainer.training.run import open_trainer
from llmtrainer.training.use import Evaluation, Generation, Plot, evaluate, generate, plot

Stage = Literal["tokenizer", "prepare", "train", "evaluate", "compress", "sample", "plot"]
STAGES: tuple[Stage, ...] = ("tokenizer", "prepare", "train", "evaluate", "compress", "sample", "plot")

WARM_STEPS, TIMED_STEPS = 3, 9
"""Steps before and during the measurement of speed: the first ones load kernels and fill caches."""
SPARE = 0.88
"""Share of the time that is planned for: the rest is for saving, evaluating and a machine that slows down."""

AGAIN = 0.4
"""Share of the first step's time that it takes once more in the run: compiled kernels come from torch's cache."""

TIME_IS_UP = "the time is up"
"""Why a demo stops its own training: the machine became slower than it was when it was measured."""

COMPRESSORS: dict[str, Callable[[bytes], bytes]] = {
    "gzip": lambda text: gzip.compress(text, 9, mtime=0),
    "xz": lambda text: lzma.compress(text, preset=9),
    "zstd": lambda text: zstandard.ZstdCompressor(level=19, write_checksum=True).compress(text),
}
"""`gzip -9`, `xz -9` and `zstd -19`, each on a whole file."""


class Demo(Config):
    """Learn a vocabulary, prepare text, train, evaluate and write: `llmtrainer demo`, at most six minutes."""

    run: str = "runs/demo"
    """The run directory. Run again, the demo goes on where it was; a finished one shows its figures again."""

    stages: tuple[Stage, ...] = STAGES
    """Which parts of the demo to run, in their own order. What a part needs from an earlier one is made if it
    is not there, except the model: `train` comes before `evaluate` and `sample`."""

    data: str = "stdlib:train"
    """The text to learn from."""

    held_out: str = "stdlib:held_out"
    """Text that the model never sees: what it is measured on, and the compressors beside it."""

    vocabulary: int = Field(default=4096, ge=269)
    """Number of different pieces that text is cut into."""

    seconds: float = Field(default=200.0, gt=0.0)
    """Most seconds to spend on training. The speed is measured first, then the number of steps is fixed."""

    steps: int | None = Field(default=None, ge=1)
    """Train exactly so many steps instead of measuring; two machines then do the same work."""

    prompt: str = 'def read_lines(path):\n    """'
    """How the function begins that the model is to write."""

    new_tokens: int = Field(default=120, ge=1)
    """Length of what it writes, in tokens."""

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
    plot: str | None = None

    def text(self) -> str:
        """The figures, with a line on what each of them means."""
        parts = [_figures(self), _comparison(self), _written(self), _where_to_go(self)]
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
    recipe = _recipe(settings, _steps(settings))
    started = time.perf_counter()
    with open_trainer(recipe) as trainer:
        stop = trainer.parts.stop
        for _ in trainer.steps():
            if settings.steps is None and time.perf_counter() - started > settings.seconds:
                stop.request(TIME_IS_UP)
        progress, reason = trainer.progress, stop.requested
    if not trainer.finished:
        if reason != TIME_IS_UP:
            raise RunStopped(f"stopped at step {progress.step:,} ({reason}); the same command goes on from there")
        say(f"the time is up at step {progress.step:,} of {recipe.duration}: this machine slowed down meanwhile")
    loss = steps_of(RunDir(Path(settings.run)).events)[-1]["loss"]
    seconds = time.perf_counter() - started
    return {"training": {"steps": progress.step, "tokens": progress.tokens, "loss": loss, "seconds": seconds}}


def _steps(settings: Demo) -> int:
    """How many steps the run has: as it began, or as given, or as many as fit the time on this machine."""
    if settings.steps is not None:
        return settings.steps
    begun = RunDir(Path(settings.run)).recipe
    if begun.is_file():
        return int(load(Recipe, str(begun)).duration.value)
    trials = WARM_STEPS + TIMED_STEPS
    with bar("measuring the speed", trials, "steps") as advance, tempfile.TemporaryDirectory() as place:
        laps = []
        trial = _recipe(settings, 10_000).model_copy(update={"run": place})
        # The bar stands for this run: its own view would promise 10,000 steps.
        with voice(quiet=True), open_trainer(trial) as trainer:
            for info in itertools.islice(trainer.steps(), trials):
                laps.append(info.seconds["total"])
                advance(1)
    # The lower quartile: a moment in which something else ran must not decide how long the model learns.
    lap = statistics.quantiles(laps[WARM_STEPS:], n=4)[0]
    steps = max(int((SPARE * settings.seconds - AGAIN * laps[0]) / lap), 1)
    say(f"one step takes {lap * 1000:,.0f} ms here, so {steps:,} steps fit {span(settings.seconds)}")
    return steps


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
    return {
        "corpus": {"held_out_files": len(texts), "held_out_bytes": sum(map(len, texts))},
        "bits_per_byte": bits_per_byte_of(texts),
    }


def bits_per_byte_of(texts: list[bytes]) -> dict[str, float]:
    """Compressed bits per byte of text, by compressor: each text is compressed alone."""
    total = sum(map(len, texts))
    packed = dict.fromkeys(COMPRESSORS, 0)
    with bar("compress", total, "bytes") as advance:
        for text in texts:
            for name, compress in COMPRESSORS.items():
                packed[name] += len(compress(text))
            advance(len(text))
    return {name: 8 * size / max(total, 1) for name, size in packed.items()}


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
    # A young model also writes control characters, which a terminal would obey.
    text = (told.sample["prompt"] + told.sample["text"]).expandtabs(4)
    lines = "".join(letter if letter.isprintable() or letter == "\n" else "?" for letter in text).split("\n")
    return "\n".join(["A function, as the model writes it:", *(f"    {line}" for line in lines)])


def _where_to_go(told: Told) -> str:
    rows = [("everything is in", told.run, "recipe.yaml, events.jsonl, checkpoints, samples, plots")]
    if told.plot:
        rows.append(("the curves", told.plot, ""))
    rows.append(("let it write", f"llmtrainer generate {told.run} 'import '", ""))
    rows.append(("train on your text", "llmtrainer train recipes/tiny/pretrain.yaml data.train=FOLDER", ""))
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
