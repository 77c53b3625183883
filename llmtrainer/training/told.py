"""What the demo found out, as figures with a line on what each of them means."""

from __future__ import annotations

import io
import math
from dataclasses import dataclass, field
from typing import Any

from rich.console import Console
from rich.table import Table

from llmtrainer.base.result import Result
from llmtrainer.training.figures import amount, short, span


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
    preferences: dict[str, Any] | None = None
    """How it learned to prefer: `run`, `pairs`, `held_out_pairs`, `steps`, `seconds`, and the share of held-out pairs
    in which the better answer has gained on the worse since the run began, `accuracy_before` and `accuracy_after`."""
    rewards: dict[str, Any] | None = None
    """How it learned from rewards: `run`, `steps`, `seconds`, `answers` that it wrote, the mean reward of those of the
    first step, `reward_before`, and of the last fifth, `reward_after`; that of the likeliest answers to questions that
    were not learned from, `held_out_before` and `held_out_after`; and what was `said`."""
    plot: str | None = None

    def text(self) -> str:
        """The figures, with a line on what each of them means."""
        parts = [
            _figures(self), _comparison(self), _written(self), _answered(self), _preferred(self), _earned(self),
            _where_to_go(self),
        ]  # fmt: skip
        return "\n\n".join(part for part in parts if part)


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
    return "\n".join([*lines, *_dialogue(found["said"])])


def _preferred(told: Told) -> str:
    if told.preferences is None:
        return ""
    found = told.preferences
    return (
        f"Shown whole answers beside broken-off ones ({found['pairs']:,} pairs, {found['steps']:,} steps of DPO in "
        f"{span(found['seconds'])}), it leans\ntowards the whole one more than it did before in "
        f"{found['accuracy_after']:.0%} of {found['held_out_pairs']:,} pairs that it never saw; a guess would be 50%."
    )


def _earned(told: Told) -> str:
    if told.rewards is None:
        return ""
    found = told.rewards
    lines = [
        "Rewarded for one sentence that commands, as Python's own guide wants it (PEP 257), it wrote "
        f"{found['answers']:,} answers",
        f"({found['steps']:,} steps of GRPO in {span(found['seconds'])}). What they earn of 1 went from "
        f"{found['reward_before']:.2f} to {found['reward_after']:.2f}; to questions",
        f"that it did not learn from, its likeliest answers went from {found['held_out_before']:.2f} to "
        f"{found['held_out_after']:.2f}:",
    ]
    return "\n".join([*lines, *_dialogue(found["said"])])


def _dialogue(said: list[dict[str, str]]) -> list[str]:
    lines: list[str] = []
    for one in said:
        unfinished = "" if one["finish"] == "end" else " ..."
        lines += [*_lines(one["prompt"]), *(f"    {line}" for line in _lines(one["text"].strip() + unfinished))]
    return lines


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
    for name, found in (("prefers", told.preferences), ("earns", told.rewards)):
        if found:
            rows.append((f"the one that {name}", found["run"], ""))
    rows.append(("train on your text", "llmtrainer train recipes/tiny/pretrain.yaml data.train=FOLDER", ""))
    rows.append(("or on your chats", "llmtrainer train recipes/tiny/sft.yaml data.train=FILE data.evaluate='{}'", ""))
    rows.append(("on comparisons", "llmtrainer train recipes/tiny/dpo.yaml data.train=FILE data.evaluate='{}'", ""))
    rows.append(("or on rewards", "llmtrainer train recipes/tiny/grpo.yaml data.train=FILE", ""))
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
