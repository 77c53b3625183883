"""Numbers of which a mean says too little: their quantiles, their histogram, and all of them in a file."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from llmtrainer.base.errors import UserError
from llmtrainer.base.rundir import RunDir
from llmtrainer.base.units import Progress
from llmtrainer.core.objective import Objective
from llmtrainer.core.protocols import Engine

Numbers = NDArray[np.float64]
QUANTILES = {"p5": 0.05, "p25": 0.25, "median": 0.5, "p75": 0.75, "p95": 0.95}
FILE = "spread.jsonl"
"""In the run directory: a line for every step with all its numbers."""


class Spread:
    """Gathers what an objective says of each pair or sequence, micro-batch by micro-batch."""

    def __init__(self) -> None:
        self._parts: dict[str, list[Tensor]] = {}

    def add(self, found: Mapping[str, Tensor]) -> None:
        for name, values in found.items():
            self._parts.setdefault(name, []).append(values.detach())

    def taken(self, engine: Engine) -> dict[str, Numbers]:
        """All numbers by name, those of rank 0 first, and begin anew."""
        parts, self._parts = self._parts, {}
        own = {
            name: np.concatenate([value.cpu().double().numpy() for value in values]) for name, values in parts.items()
        }
        return {name: _of_all_ranks(engine, own[name]) for name in sorted(own)}


def _of_all_ranks(engine: Engine, own: Numbers) -> Numbers:
    if engine.world_size == 1:
        return own
    sizes = engine.sum({str(rank): len(own) * float(rank == engine.rank) for rank in range(engine.world_size)})
    begin = int(sum(sizes[str(rank)] for rank in range(engine.rank)))
    found = np.zeros(int(sum(sizes.values())))
    found[begin : begin + len(own)] = own
    return np.array(list(engine.sum({str(place): float(value) for place, value in enumerate(found)}).values()))


def statistics(values: Numbers) -> dict[str, float]:
    """mean, std (over all of them, not a sample's), and quantiles by linear interpolation."""
    if not len(values):
        return {}
    cuts = np.quantile(values, list(QUANTILES.values()))
    quantiles = {name: float(cut) for name, cut in zip(QUANTILES, cuts, strict=True)}
    return {"mean": float(values.mean()), "std": float(values.std()), **quantiles}


def write_spread(run: RunDir, title: str, name: str, progress: Progress, values: Numbers) -> Path:
    """plots/TITLE-NAME-step-00000040.png, and beside it a .json with every number. Returns the picture's path."""
    path = run.plots / f"{title}-{name}-step-{progress.step:08d}.png"
    run.plots.mkdir(parents=True, exist_ok=True)
    told: dict[str, Any] = {"step": progress.step, "name": name, **statistics(values), "values": values.tolist()}
    path.with_suffix(".json").write_text(json.dumps(told) + "\n", encoding="utf-8")
    draw_histogram(values, path, f"{title}: {name}, step {progress.step:,}", name)
    return path


Keep = Callable[[Progress, Mapping[str, Numbers]], None]
"""Writes down the numbers of a step."""


def keeper(objective: Objective, wanted: bool, run: RunDir) -> Keep | None:
    """What writes every number of every step to spread.jsonl, if that is wanted. UserError where there are none.

    Of a step that was taken twice, because the run was continued from before it, the last line counts.
    """
    if not wanted:
        return None
    if type(objective).spread is Objective.spread:
        raise UserError(
            f"objective `{objective.kind}` has no numbers to write", where="log.spread",
            why="its Terms are all there is", fix="log.spread=false",
        )

    def append(progress: Progress, found: Mapping[str, Numbers]) -> None:
        line = {"step": progress.step, **{name: values.tolist() for name, values in found.items()}}
        with (run.path / FILE).open("a", encoding="utf-8") as file:
            file.write(json.dumps(line) + "\n")

    return append


def draw_histogram(values: Numbers, path: Path, title: str, name: str) -> None:
    """How often which number occurs, with the share on either side of 0 in colour and in words."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg  # which takes half a second that most runs save
    from matplotlib.figure import Figure

    from llmtrainer.training.curves import COLOURS, GREY, shown

    figure = Figure(figsize=(7.5, 4.2), dpi=110, layout="constrained", facecolor="white")
    FigureCanvasAgg(figure)
    axes = figure.subplots()
    above, below = values[values > 0], values[values <= 0]
    edges = _edges(values)
    for part, colour, side in ((above, COLOURS[0], "above 0"), (below, COLOURS[1], "0 or below")):
        label = f"{side}: {len(part):,} of {len(values):,} ({len(part) / max(len(values), 1):.1%})"
        axes.hist(part, bins=edges, color=colour, alpha=0.8, label=label)    # type: ignore[arg-type]
    told = statistics(values)
    if told:
        axes.axvline(told["mean"], color=GREY, linewidth=1.2, linestyle="--", label=f"mean {told['mean']:.3g}")
    axes.set_title(shown(title), loc="left", fontsize=11, fontweight="bold")
    axes.set_xlabel(shown(name))
    axes.set_ylabel("how many")
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(frameon=False, fontsize=9)
    # Drawn aside and renamed: whoever watches the file never sees half a picture.
    aside = path.with_name(f".{path.name}.partial")
    figure.savefig(aside, format="png", metadata={"Software": None})
    os.replace(aside, path)


def _edges(values: Numbers) -> Sequence[float]:
    """Borders of at most 40 bins of one width, one of them at 0, so that no bin holds both signs."""
    if not len(values):
        return [-1.0, 0.0, 1.0]
    low, high = min(float(values.min()), 0.0), max(float(values.max()), 0.0)
    width = (high - low) / 40 or 1.0
    first, last = int(np.floor(low / width)), int(np.ceil(high / width))
    return [place * width for place in range(first, last + 1)] if last > first else [-width, 0.0, width]
