"""Numbers that do not depend on the layout: every objective under every re-arrangement, by the real command line.

`python -m tests.invariants.table` runs all cells and all seeded bugs and prints the table; `--write docs` also puts it
into the pages. A cell is a run of three steps in float64, held against the plain run of the same recipe.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import re
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from llmtrainer.base.kinds import kinds_in
from tests.invariants.cells import Command, Curve, apart, curve_of, nursery
from tests.tolerances import FLOAT64_INVARIANT

SHAPE = {"hidden_size": 32, "layers": 2, "heads": 2, "kv_heads": 1, "intermediate_size": 64, "context_length": 128}
RECIPE: dict[str, Any] = {
    "optim": {
        "rule": {"kind": "adamw", "epsilon": 1e-6}, "clip": 0.5,
        "schedule": {"kind": "constant", "peak": 1e-3, "warmup": "0 steps"},
    },
    "engine": {"kind": "single", "device": "cpu", "threads": 1}, "precision": "float64", "duration": "3 steps",
    "save": {"every": "never"}, "evaluate": {"every": "never"}, "seed": 11, "allow": ["preflight"],
}  # fmt: skip


@dataclass(frozen=True)
class Case:
    """An objective with data that it learns from."""

    name: str
    data: Mapping[str, Any]
    few: int
    """data.tokens_per_batch of a few micro-batches a step; the plain run has one."""
    least: int
    """The least that every row fits."""
    more: Mapping[str, Any]
    dropout: float = 0.0
    """Not where answers share the prompt in front of them."""

    @property
    def writes(self) -> bool:
        """Whether the policy writes its rows itself."""
        return self.data["kind"] == "prompts"


def cases(world: Path) -> list[Case]:
    """Every objective. All of them are uneven: rows of one token to some dozens."""
    chats = {"kind": "examples", "train": [str(world / "chats.jsonl")], "sequences_per_step": 10}
    pairs = {"kind": "preferences", "train": [str(world / "pairs.jsonl")], "pairs_per_step": 12}
    liked = {"kind": "preferences", "train": [str(world / "liked.jsonl")], "pairs_per_step": 9}
    asked = {"kind": "prompts", "train": [str(world / "prompts.jsonl")], "prompts_per_step": 3}
    text = {
        "kind": "documents", "train": str(world / "text"), "sequence_length": 24, "sequences_per_step": 12,
    }  # fmt: skip
    whole = {**text, "policy": "whole", "sequence_length": 60, "train": str(world / "short")}
    earns = {
        "group_size": 3, "sampling": {"max_new_tokens": 8}, "rewards": [{"kind": "regex", "pattern": "[a-d]"}],
    }  # fmt: skip
    graded = {**pairs, "kind": "tests.invariants.graded.Graded"}
    beside = {**chats, "sequences_per_step": 4}

    def of(kind: str, **settings: Any) -> dict[str, Any]:
        return {"objective": {"kind": kind, **settings}}

    found = [
        Case("causal_lm, text", text, 72, 24, of("causal_lm", z_loss=1e-2, label_smoothing=0.1), 0.1),
        Case("causal_lm, padded", whole, 180, 60, of("causal_lm"), 0.1),
        Case("causal_lm, chats", chats, 100, 50, of("causal_lm", z_loss=1e-2), 0.1),
        Case("dpo", pairs, 200, 100, of("dpo", nll_weight=0.5)), Case("simpo", pairs, 200, 100, of("simpo")),
        Case("cpo", pairs, 200, 100, of("cpo")), Case("orpo", pairs, 200, 100, of("orpo")),
        Case("segments", pairs, 200, 100, of("segments")),
        Case("kto", liked, 100, 50, of("kto", loss="apo_zero")),
        Case("reward", pairs, 200, 100, {**of("reward", centre=0.01), "model": {"head": {"kind": "score"}}}),
        Case("ordinal", graded, 200, 100, {**of("ordinal"), "model": {"head": {"kind": "ordinal", "classes": 4}}}),
        Case("distill", chats, 100, 50, {
            **of("distill"), "teacher": {"start_from": str(world / "teacher"), "top_k": 8},
        }, 0.1),
        Case("mix", pairs, 200, 100, {**of("mix", main={"kind": "dpo"}, weight=0.3), "beside": beside}),
        Case("grpo", asked, 80, 50, {**of("grpo", kl=0.05), "rollout": earns}),
        Case("ppo", asked, 80, 50, {
            **of("ppo"), "model": {"head": {"kind": "value"}}, "rollout": {**earns, "answers_per_step": 3},
        }),
    ]  # fmt: skip
    return found


@dataclass(frozen=True)
class Cell:
    """One case under one re-arrangement."""

    case: Case
    axis: str
    commands: tuple[Command, ...]

    @property
    def name(self) -> str:
        return f"{self.case.name}: {self.axis}"


def arrangements(case: Case) -> Iterator[tuple[str, tuple[Command, ...]]]:
    """Everything that must not matter to a case, by axis."""

    def one(*words: str, processes: int = 1, patches: tuple[str, ...] = ()) -> tuple[Command, ...]:
        return (Command(words, processes, patches),)

    few, least = f"data.tokens_per_batch={case.few}", f"data.tokens_per_batch={case.least}"
    # What is most uneven: a few micro-batches, of which some are larger.
    yield "micro split", one(few)
    yield "accumulation", one(least)
    for processes in (1, 2, 4):
        yield f"processes {processes}", one("engine.kind=ddp", few, processes=processes)
    for kind in engines():
        yield f"engine {kind}", one(f"engine.kind={kind}", processes=2)
    if case.name == "causal_lm, chats" or case.name == "distill":
        yield "packed or padded", one(patches=("unpacked",))
    if case.data["kind"] not in ("documents", "examples") and case.name != "kto":
        name = "rollout" if case.writes else "data"
        yield "packed or padded", one(f"{name}.share_prompt=false", few if case.writes else least)
    yield "padding width", one(patches=("wider",))
    yield "row neighbours", one(few, patches=("neighbours",))
    yield "chunk", one(patches=("small_chunks",))
    yield "recompute layer", one("engine.recompute_every=1")
    yield "recompute mlp", one("engine.recompute_every=1", "engine.recompute=mlp")
    yield "compile", one("engine.compile=true")
    yield "attention sdpa", one("engine.attention=sdpa")
    yield "attention reference", one("engine.attention=reference")
    yield "resume point", (Command(("duration=1 steps", few)), Command((least,)))


def engines() -> list[str]:
    """Engines of several processes that know float64."""
    return [kind for kind in kinds_in("llmtrainer.parallel.engines") if kind not in ("single", "deepspeed")]


@dataclass(frozen=True)
class Bug:
    """A seeded bug, and the axis on which it must be noticed: a run with it differs from another run with it."""

    name: str
    case: str
    axis: str
    words: tuple[str, ...] = ()
    """What both runs have besides."""


BUGS = (
    Bug("mean_of_means", "causal_lm, chats", "micro split"),
    Bug("overwritten_gradients", "dpo", "accumulation"),
    Bug("averaged_over_ranks", "causal_lm, text", "processes 2"),
    Bug("around_the_wrapper", "reward", "engine ddp"),
    Bug("one_document", "causal_lm, chats", "packed or padded"),
    Bug("running_positions", "simpo", "packed or padded"),
    Bug("padding_counts", "causal_lm, padded", "padding width"),
    Bug("masks_by_row", "causal_lm, text", "row neighbours"),
    Bug("last_chunk_lost", "orpo", "chunk"),
    Bug("other_masks_again", "causal_lm, chats", "recompute layer"),
    Bug("compiled_otherwise", "causal_lm, text", "compile", ("model.dropout=0.0",)),
    Bug("sees_itself_alone", "cpo", "attention sdpa"),
    Bug("momentum_forgotten", "causal_lm, text", "resume point"),
)


class Table:
    """Runs cells in a folder of their own and keeps what was found."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        make_world(folder / "world")
        self.cases = cases(folder / "world")
        self.cells = [Cell(case, axis, commands) for case in self.cases for axis, commands in arrangements(case)]
        self._plain: dict[str, Curve] = {}

    def away(self, cell: Cell) -> float:
        """How far the cell is from the plain run of its case; that one is made where it is not there yet."""
        case = cell.case.name
        if case not in self._plain:
            self._plain[case] = self._run(cell.case, (Command(),), "plain")
        away = apart(self._plain[case], self._run(cell.case, cell.commands, cell.axis), _but(cell))
        print(f"{cell.name}: {away:.0e}", file=sys.stderr, flush=True)
        return away

    def noticed(self, bug: Bug) -> str:
        """How the cell of a bug notices it: by how far it is away, or by the error that ended it; "" if not at all."""
        (cell,) = (cell for cell in self.cells if (cell.case.name, cell.axis) == (bug.case, bug.axis))

        def seeded(command: Command) -> Command:
            return Command((*command.words, *bug.words), command.processes, (*command.patches, bug.name))

        plain = self._run(cell.case, (seeded(Command()),), f"{bug.name}-plain")
        try:
            away = apart(plain, self._run(cell.case, tuple(map(seeded, cell.commands)), bug.name), _but(cell))
        except AssertionError as error:
            refused = re.findall(r"llmtrainer train: (.*)", str(error))
            return f"refused: {refused[-1]}" if refused else ""
        print(f"{bug.name}: {away:.0e}", file=sys.stderr, flush=True)
        return f"{away:.0e}" if away > FLOAT64_INVARIANT else ""

    def _run(self, case: Case, commands: Sequence[Command], name: str) -> Curve:
        place = self.folder / re.sub(r"\W+", "-", f"{case.name}-{name}")
        place.mkdir()
        recipe = place / "recipe.yaml"
        recipe.write_text(json.dumps(recipe_of(case, self.folder)))     # which is YAML too
        return curve_of(recipe, commands, place / "run")


def _but(cell: Cell) -> tuple[str, ...]:
    """What is not compared: a prompt that is read once is counted once."""
    return ("tokens",) if cell.axis == "packed or padded" else ()


def recipe_of(case: Case, folder: Path) -> dict[str, Any]:
    """The plain run of a case: one process, each step one micro-batch."""
    world = folder / "world"

    def read(data: Mapping[str, Any]) -> dict[str, Any]:
        if data["kind"] == "documents":
            return {"tokens_per_batch": 4096, **data, "train": {"path": data["train"], "workers": 1}}
        workers = {} if data["kind"] == "prompts" else {"workers": 1}
        return {"template": "alpaca", "sequence_length": 50, "tokens_per_batch": 4096, **workers, **data}

    beside = {"beside": read(case.more["beside"])} if "beside" in case.more else {}
    fresh = case.dropout or case.name == "teacher"
    began = {**SHAPE, "dropout": case.dropout} if fresh else {"start_from": str(world / "teacher")}
    return {
        **RECIPE, "tokenizer": str(world / "tokenizer"), "cache": str(folder / "cache"), "data": read(case.data),
        **case.more, **beside, "model": {**began, **case.more.get("model", {})},
    }  # fmt: skip


def make_world(world: Path) -> None:
    """A vocabulary, text, conversations, comparisons, prompts and a teacher, of made-up words."""
    from llmtrainer.base.config import load
    from llmtrainer.tokenizer.train import train_vocabulary
    from llmtrainer.training.recipe import Recipe
    from llmtrainer.training.run import train

    draw = random.Random(3)
    words = ["".join(draw.choices("abcdefgh", k=draw.randint(1, 5))) for _ in range(40)]

    def said(most: int) -> str:
        return " ".join(draw.choices(words, k=draw.randint(1, most)))

    records = {
        "chats": [{"prompt": said(8), "completion": said(12)} for _ in range(40)],
        "pairs": [{"prompt": said(8), "chosen": said(12), "rejected": said(12)} for _ in range(30)],
        "liked": [{"prompt": said(8), "completion": said(12), "label": draw.random() < 0.5} for _ in range(40)],
        "prompts": [{"prompt": said(8), "answer": said(2)} for _ in range(20)],
        "text": [{"text": said(60)} for _ in range(40)], "short": [{"text": said(12)} for _ in range(40)],
    }  # fmt: skip
    for name, found in records.items():
        folder = world / name if name in ("text", "short") else world
        folder.mkdir(parents=True, exist_ok=True)
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(record) + "\n" for record in found))
    train_vocabulary([record["text"] for record in records["text"]], 320).save(world / "tokenizer")
    teacher = Case("teacher", {"kind": "documents", "train": str(world / "text"), "sequence_length": 24,
                               "sequences_per_step": 12}, 1, 1, {})    # fmt: skip
    path = world / "teacher.yaml"
    path.write_text(json.dumps(recipe_of(teacher, world.parent)))
    train(load(Recipe, path, overrides=[f"run={world / 'teacher'}", "duration=1 steps"]))


def in_words(table: Table, found: Mapping[str, float], bugs: Mapping[str, str]) -> str:
    """Both tables as Markdown: objectives by arrangement, and seeded bugs."""
    axes = list(dict.fromkeys(cell.axis for cell in table.cells))
    lines = ["| " + " | ".join(["arrangement", *(case.name for case in table.cases)]) + " |"]
    lines += ["|" + "---|" * (len(table.cases) + 1)]
    for axis in axes:
        of = [found.get(f"{case.name}: {axis}") for case in table.cases]
        lines.append("| " + " | ".join([axis, *("" if away is None else _shown(away) for away in of)]) + " |")
    lines += ["", "| seeded bug | noticed by | as |", "|---|---|---|"]
    lines += [f"| {bug.name.replace('_', ' ')} | {bug.case}: {bug.axis} | {bugs[bug.name]} |" for bug in BUGS]
    return "\n".join(lines)


def _shown(away: float) -> str:
    return "0" if away == 0.0 else f"{away:.0e}"


BEGIN, END = "<!-- table -->", "<!-- end of table -->"


def write_into(page: Path, table: str) -> None:
    """Put the table between the page's marks."""
    before, _, rest = page.read_text(encoding="utf-8").partition(BEGIN)
    page.write_text(f"{before}{BEGIN}\n\n{table}\n\n{END}{rest.partition(END)[2]}", encoding="utf-8")


def main(words: Sequence[str]) -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--write", type=Path, help="a folder of pages to put the table into")
    parser.add_argument("--only", default="", help="cells and bugs whose names match this pattern")
    parser.add_argument("--at-a-time", type=int, default=os.cpu_count() or 1)
    wish = parser.parse_args(words)
    started = time.monotonic()
    with tempfile.TemporaryDirectory() as folder, nursery(Path(folder)):
        table = Table(Path(folder))
        cells = [cell for cell in table.cells if re.search(wish.only, cell.name)]
        bugs = [bug for bug in BUGS if re.search(wish.only, bug.name)]
        found, noticed = run(table, cells, bugs, wish.at_a_time)
    wrong = [name for name, away in found.items() if not away <= FLOAT64_INVARIANT]
    missed = [name for name, how in noticed.items() if not how]
    seconds = time.monotonic() - started
    text = in_words(table, found, {bug.name: noticed.get(bug.name, "") for bug in BUGS})
    print(text)
    print(
        f"\n{len(found)} cells, the farthest {max(found.values(), default=0.0):.0e} away, {len(noticed)} seeded bugs, "
        f"{seconds:,.0f} s; not equal: {wrong or 'none'}; not noticed: {missed or 'none'}"
    )
    if wish.write is not None and not (wrong or missed):
        for page in ("invariance.md", "invariance.zh-CN.md"):
            write_into(wish.write / page, text)
    return 1 if wrong or missed else 0


def run(
    table: Table, cells: Sequence[Cell], bugs: Sequence[Bug], at_a_time: int
) -> tuple[dict[str, float], dict[str, str]]:
    """How far each cell is away, infinitely where it failed, and how each bug was noticed."""

    def away(cell: Cell) -> tuple[str, float]:
        try:
            return cell.name, table.away(cell)
        except AssertionError as error:
            print(f"{cell.name}: {error}", file=sys.stderr)
            return cell.name, float("inf")

    with ThreadPoolExecutor(at_a_time) as pool:
        # The plain runs first: each also prepares what its cells read.
        firsts = {cell.case.name: cell for cell in reversed(cells)}
        found = dict(pool.map(away, firsts.values()))
        found |= dict(pool.map(away, [cell for cell in cells if cell.name not in found]))
        return found, dict(zip([bug.name for bug in bugs], pool.map(table.noticed, bugs), strict=True))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
