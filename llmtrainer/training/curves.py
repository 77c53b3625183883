"""A run's events as a picture: the loss large, below it what explains it."""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any, Literal

import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.font_manager import FontProperties, findfont
from matplotlib.ft2font import FT2Font
from matplotlib.layout_engine import ConstrainedLayoutEngine
from matplotlib.ticker import FuncFormatter, MaxNLocator, NullFormatter
from numpy.typing import NDArray

from llmtrainer.training.figures import short, span

Numbers = NDArray[np.float64]
Scale = Literal["step", "tokens", "minutes"]
Panel = tuple[str, str, Callable[[Axes, Sequence["Curve"]], None]]
"""Title, what it means in a few words, what draws it."""

# Okabe and Ito's colours: told apart by colour-blind readers too.
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")
GREY, PALE = "#555555", "#dddddd"
POINTS = 1500
"""Of a line. A longer log is drawn as the lowest and the highest value of so many stretches: spikes stay."""
SMOOTHING = 40
"""The thick line is the mean over one such part of the run, before and after each step."""
COUNTS = ("tokens", "bytes", "documents", "step", "time")
"""Figures of an evaluation that say how much was read and not how well."""
FIRST = {
    "reward/mean": ("Reward", "what the policy's own answers earned. Higher is better"),
    "preference/accuracy": ("Accuracy", "share of pairs in which the better answer has more"),
}
"""Metrics that matter besides the loss, with the title and the meaning of their panels, which come first."""
PERPLEXITIES = (1.5, 2, 3, 5, 10, 20, 50, 100, 200, 500, 1_000, 2_000, 5_000, 10_000, 20_000, 50_000, 100_000)


@dataclass(frozen=True)
class Curve:
    """What one run wrote down, last line for every step."""

    name: str
    steps: list[dict[str, Any]]
    evaluations: list[dict[str, Any]] = field(default_factory=list)
    resumed: list[int] = field(default_factory=list)
    """Steps after which the run was continued."""

    def column(self, key: str) -> Numbers:
        """One value a step; nan where it is missing or was not finite."""
        return _column(self.steps, key)

    def place(self, scale: Scale) -> Numbers:
        """Where each step stands on the horizontal axis."""
        if scale == "minutes":
            return np.nancumsum(self.column("seconds")) / 60
        return self.column(scale)

    def place_of(self, steps: Sequence[int], scale: Scale) -> Numbers:
        """Where given steps stand on the horizontal axis."""
        return np.interp(np.asarray(steps, dtype=float), self.column("step"), self.place(scale))

    def figures(self, name: str, scale: Scale) -> dict[str, tuple[Numbers, Numbers]]:
        """One figure of all evaluations by suite: places and values."""
        found: dict[str, tuple[Numbers, Numbers]] = {}
        suites = {key.rpartition("/")[0] for event in self.evaluations for key in event if _figure(key) == name}
        for suite in sorted(suites):
            key = f"{suite}/{name}" if suite else name
            told = [event for event in self.evaluations if event.get(key) is not None]
            places = self.place_of([event["step"] for event in told], scale)
            found[suite.replace("_", " ")] = (places, _column(told, key))
        return found


def draw(curves: Sequence[Curve], path: Path, scale: Scale = "step") -> list[str]:
    """Write the picture and return the titles of its panels. Runs are overlaid, one colour each."""
    panels = _panels(curves, scale)
    rows = math.ceil((len(panels) - 1) / 4)
    columns = math.ceil((len(panels) - 1) / rows)
    layout = ConstrainedLayoutEngine(w_pad=0.12, h_pad=0.08)
    figure = Figure(figsize=(13, 5.4 + 3.0 * rows), dpi=110, layout=layout, facecolor="white")
    FigureCanvasAgg(figure)
    # Two pictures of their own, so that the scale at the right of the loss takes no room from what is below it.
    above, below = figure.subfigures(2, 1, squeeze=False, height_ratios=[5.4, 3.0 * rows]).flat
    above.suptitle(_headline(curves), fontsize=13, x=0.012, ha="left", fontweight="bold")
    frames = [above.subplots(), *below.subplots(rows, columns, squeeze=False).flat]
    for index, (axes, panel) in enumerate(zip(frames, panels, strict=False)):
        title, meaning, paint = panel
        axes.set_title(title, loc="left", fontsize=12.5 if index == 0 else 10.5, fontweight="bold", pad=19)
        axes.annotate(
            meaning, (0, 1), xytext=(0, 6), xycoords="axes fraction", textcoords="offset points", va="bottom",
            fontsize=10 if index == 0 else 8.5, color=GREY,
        )
        _dress(axes, scale)
        paint(axes, curves)
    for axes in frames[len(panels):]:
        axes.remove()
    path.parent.mkdir(parents=True, exist_ok=True)
    # Drawn aside and renamed: whoever watches the file never sees half a picture.
    aside = path.with_name(f".{path.name}.partial")
    figure.savefig(aside, format="png", metadata={"Software": None})
    os.replace(aside, path)
    return [title for title, _, _ in panels]


def _panels(curves: Sequence[Curve], scale: Scale) -> list[Panel]:
    def line(key: str, **style: Any) -> Callable[[Axes, Sequence[Curve]], None]:
        return lambda axes, curves: _line(axes, curves, key, scale, **style)

    panels: list[Panel] = [
        ("Loss", _loss_meaning(curves), lambda axes, curves: _loss(axes, curves, scale)),
        ("Learning rate", "how large a step each update takes", line("learning_rate", floor=0.0)),
        ("Gradient norm", "how hard the data pulls, before clipping", line("grad_norm", smooth=True, spiky=True)),
        ("Speed", "tokens read per second", line("tokens_per_second", smooth=True, floor=0.0)),
    ]
    if (chosen := _evaluation_figure(curves)) is not None:
        title, meaning = chosen.replace("_", " "), "on text the model does not learn from"
        panels.append((f"Evaluation: {title}", meaning, lambda axes, curves: _evaluation(axes, curves, chosen, scale)))
    for key in _other_terms(curves):
        title, meaning = FIRST.get(key, (key, "averaged over each step"))
        panels.append((title, meaning, line(key, smooth=True)))
    return panels


def _loss_meaning(curves: Sequence[Curve]) -> str:
    if _is_language_model(curves):
        return "How surprised the model is by the next token. Lower is better: while the line falls, it learns."
    return "What training makes smaller. Lower is better: while the line falls, it learns."


def _is_language_model(curves: Sequence[Curve]) -> bool:
    """Whether exp(loss) is a perplexity: the loss is nats per token and nothing else."""
    terms = {key for curve in curves for event in curve.steps for key in event if key.startswith("loss/")}
    return terms == {"loss/lm"}


def _loss(axes: Axes, curves: Sequence[Curve], scale: Scale) -> None:
    alone = len(curves) == 1
    for index, curve in enumerate(curves):
        colour = COLOURS[index % len(COLOURS)]
        places, losses = curve.place(scale), curve.column("loss")
        axes.plot(*_thinned(places, losses), color=colour, alpha=0.25, linewidth=0.8)
        label = "training, smoothed" if alone else shown(curve.name)
        smooth = smoothed(losses)
        axes.plot(*_thinned(places, smooth), color=colour, linewidth=2.0, label=label)
        if alone:
            _first_and_last(axes, places, smooth, colour)
            _resumptions(axes, curve, scale)
        for number_, (suite, (at, values)) in enumerate(curve.figures("loss", scale).items(), start=1):
            axes.plot(
                at, values, color=COLOURS[number_ % len(COLOURS)] if alone else colour, linewidth=1.2, marker="o",
                markersize=4.5, markeredgecolor="white", label=shown(suite or "evaluation") if alone else None,
            )
        bad = places[~np.isfinite(losses)]
        if bad.size:
            label = f"not a number ({bad.size:,} steps)"
            axes.plot(bad, np.zeros_like(bad), "x", color="#cc0000", transform=axes.get_xaxis_transform(), label=label)
    if not alone and any(curve.figures("loss", scale) for curve in curves):
        axes.plot([], [], color=GREY, linewidth=1.2, marker="o", markersize=4.5, label="evaluation")
    axes.legend(frameon=False, fontsize=10, loc="upper right", bbox_to_anchor=(1, 1))
    axes.set_ylabel("nats per token" if _is_language_model(curves) else "loss")
    if _is_language_model(curves):
        _perplexity_axis(axes)


def _first_and_last(axes: Axes, places: Numbers, losses: Numbers, colour: str) -> None:
    """Write the value beside both ends of a line."""
    known = np.flatnonzero(np.isfinite(losses))
    if known.size < 2:
        return
    axes.margins(y=0.1)
    for index in (known[0], known[-1]):
        axes.plot(places[index], losses[index], "o", color=colour, markersize=5)
        text = f"{losses[index]:.2f}"
        _value(axes, text, places[index], losses[index], colour, size=11.5, above=index == known[0])


def _value(
    axes: Axes, text: str, x: float, y: float, colour: str, size: float, *, above: bool = False
) -> None:
    """A number in bold at the right of a point, or above it."""
    place: dict[str, Any] = {"xytext": (-4, 6), "va": "bottom"} if above else {"xytext": (7, 0), "va": "center"}
    axes.annotate(
        text, (x, y), textcoords="offset points", color=colour, fontsize=size, fontweight="bold", **place
    )


def _resumptions(axes: Axes, curve: Curve, scale: Scale) -> None:
    for index, place in enumerate(curve.place_of(curve.resumed, scale)):
        label = "continued here" if index == 0 else None
        axes.axvline(place, color=GREY, linewidth=0.9, linestyle=(0, (1, 2)), label=label, zorder=0)


def _perplexity_axis(axes: Axes) -> None:
    """A second scale at the right: exp(loss), the number of tokens the model hesitates between."""
    low, high = axes.get_ylim()
    right = axes.twinx()
    ticks = [value for value in PERPLEXITIES if low <= math.log(value) <= high]
    right.set_ylim(low, high)
    right.set_yticks([math.log(value) for value in ticks], [f"{value:,}" for value in ticks])
    right.set_ylabel("perplexity: as unsure as\na guess among so many tokens", color=GREY)
    right.tick_params(colors=GREY, length=3, labelsize=9)
    right.spines[["top", "left", "right", "bottom"]].set_visible(False)


def _line(
    axes: Axes, curves: Sequence[Curve], key: str, scale: Scale, *, smooth: bool = False, spiky: bool = False,
    floor: float | None = None,
) -> None:
    values = [curve.column(key) for curve in curves]
    told = np.concatenate([line[np.isfinite(line)] for line in values])
    logarithmic = bool(spiky and told.size and told.min() > 0 and told.max() > 10 * np.median(told))
    for index, (curve, line) in enumerate(zip(curves, values, strict=True)):
        colour, places = COLOURS[index % len(COLOURS)], curve.place(scale)
        if smooth:
            axes.plot(*_thinned(places, line), color=colour, alpha=0.25, linewidth=0.8)
            # On a logarithmic axis the mean of logarithms: one spike would lift a mean for 1/20 of the run.
            line = np.exp(smoothed(np.log(line))) if logarithmic else smoothed(line)
        axes.plot(*_thinned(places, line), color=colour, linewidth=1.6)
    if logarithmic:
        axes.set_yscale("log")
        axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
        axes.yaxis.set_minor_formatter(NullFormatter())
    elif floor is not None and told.size and told.max() > floor:
        axes.set_ylim(bottom=floor)


def _evaluation_figure(curves: Sequence[Curve]) -> str | None:
    """Bits per byte if measured, which other vocabularies can be compared by; else the loss; else the first."""
    names = [_figure(key) for curve in curves for event in curve.evaluations for key in event]
    measured = [name for name in names if name not in (*COUNTS, "kind")]
    return next((name for name in ("bits_per_byte", "loss", *measured) if name in measured), None)


def _evaluation(axes: Axes, curves: Sequence[Curve], name: str, scale: Scale) -> None:
    alone = len(curves) == 1
    for index, curve in enumerate(curves):
        for suite_index, (suite, (places, values)) in enumerate(curve.figures(name, scale).items()):
            colour = COLOURS[(suite_index + 1 if alone else index) % len(COLOURS)]
            label = shown(suite or "evaluation") if alone else None
            axes.plot(
                places, values, color=colour, linewidth=1.6, marker="o", markersize=4, markeredgecolor="white",
                label=label,
            )
            if values.size:
                _value(axes, f"{values[-1]:.4g}", places[-1], values[-1], colour, size=9.5)
    if alone:
        axes.legend(frameon=False, fontsize=8.5, loc="upper right")
    axes.margins(x=0.16, y=0.12)


def _other_terms(curves: Sequence[Curve]) -> list[str]:
    """Terms of an objective that deserve a panel: metrics, and the parts of a loss that has several."""
    keys = sorted({key for curve in curves for event in curve.steps for key in event if "/" in key})
    losses = [key for key in keys if key.startswith("loss/")]
    metrics = [key for key in keys if not key.startswith(("loss/", "seconds/")) and key not in FIRST]
    return [key for key in FIRST if key in keys] + metrics + (losses if len(losses) > 1 else [])


def _dress(axes: Axes, scale: Scale) -> None:
    axes.spines[["top", "right"]].set_visible(False)
    axes.spines[["left", "bottom"]].set_color("#aaaaaa")
    axes.grid(color=PALE, linewidth=0.6)
    axes.set_axisbelow(True)
    axes.tick_params(colors=GREY, length=3, labelsize=9)
    axes.yaxis.set_major_formatter(FuncFormatter(_tick))
    axes.xaxis.set_major_locator(MaxNLocator(6, integer=scale != "minutes"))
    axes.xaxis.set_major_formatter(FuncFormatter(_tick))
    axes.set_xlabel({"step": "steps", "tokens": "tokens", "minutes": "minutes"}[scale], fontsize=9, color=GREY)


def _tick(value: float, position: int | None = None) -> str:
    return short(value) if value >= 10_000 else f"{value:,g}"


def _headline(curves: Sequence[Curve]) -> str:
    if len(curves) > 1:
        return f"{len(curves)} runs"
    (curve,) = curves
    steps, tokens, seconds = (curve.column(key) for key in ("step", "tokens", "seconds"))
    facts = [f"{steps[-1]:,.0f} steps", f"{short(np.nanmax(tokens, initial=0))} tokens"]
    facts.append(span(float(np.nansum(seconds))) + " of training")
    return f"{shown(curve.name)}    " + ",  ".join(facts)


def _figure(key: str) -> str:
    return key.rpartition("/")[2]


def _column(events: Sequence[Mapping[str, Any]], key: str) -> Numbers:
    values = (event.get(key) for event in events)
    return np.array([math.nan if value is None else float(value) for value in values], dtype=np.float64)


def smoothed(values: Numbers) -> Numbers:
    """Mean over the neighbours of each value, 1/40 of the line to each side. Values that are nan do not count.

    The window is as wide to the left as to the right, so the line does not lag behind a loss that falls; at the
    start it shrinks, where the loss falls most; at the end it keeps its left half, where noise would mislead.
    """
    known = np.isfinite(values)
    sums = np.concatenate([[0.0], np.cumsum(np.where(known, values, 0.0))])
    counts = np.concatenate([[0], np.cumsum(known)])
    place = np.arange(len(values))
    reach = np.minimum(place, len(values) // SMOOTHING)
    first, last = place - reach, np.minimum(place + reach + 1, len(values))
    count = counts[last] - counts[first]
    return np.where(count > 0, (sums[last] - sums[first]) / np.maximum(count, 1), math.nan)


def _thinned(places: Numbers, values: Numbers) -> tuple[Numbers, Numbers]:
    """At most 2 * POINTS points with the same highest and lowest values, in order."""
    if len(values) <= 2 * POINTS:
        return places, values
    chosen: list[int] = []
    for stretch in np.array_split(np.arange(len(values)), POINTS):
        known = stretch[np.isfinite(values[stretch])]
        if known.size:
            chosen += sorted({int(known[np.argmin(values[known])]), int(known[np.argmax(values[known])])})
    return places[chosen], values[chosen]


def shown(name: str) -> str:
    """A name as matplotlib may draw it: no formula between dollar signs, `?` where the font has no letter."""
    font = _font()
    return "".join(letter if font.get_char_index(ord(letter)) else "?" for letter in name).replace("$", r"\$")


@cache
def _font() -> FT2Font:
    return FT2Font(findfont(FontProperties()))
