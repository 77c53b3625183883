"""Everything a recipe measures on the way: rows held out, named sets, suites, and samples of the model's writing."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from pathlib import Path

import torch

from llmtrainer.base.rundir import RunDir
from llmtrainer.base.units import Progress
from llmtrainer.core.at_rest import at_rest
from llmtrainer.core.batch import Batch
from llmtrainer.core.objective import Objective, count
from llmtrainer.core.protocols import Annotator, Engine, Tokenizer, annotated
from llmtrainer.core.suite import Read, Suite
from llmtrainer.data.comparison_source import ComparisonSource
from llmtrainer.models.stored import Policy
from llmtrainer.training.average import MovingAverage
from llmtrainer.training.dataset import Rows
from llmtrainer.training.mismatched import PointOfReference
from llmtrainer.training.spread import Numbers, Spread, statistics
from llmtrainer.training.whole_steps import knowing_each_other

Draw = Callable[[str, str, Progress, Numbers], object]
"""Writes down the numbers of one name that an evaluation set gave."""


class Evaluations:
    """Runs them all and returns their figures by name. Nothing here moves the training: no state, no draw."""

    def __init__(
        self, policy: Policy, tokenizer: Tokenizer, objective: Objective, engine: Engine, *,
        suites: tuple[Suite, ...], read: Read, measured: Mapping[str, Rows],
        sample: Callable[[Progress], None] | None, average: MovingAverage | None = None,
        annotators: Sequence[Annotator] = (), draw: Draw | None = None,
        examined: Mapping[str, Callable[[], Mapping[str, float]]] | None = None, point: PointOfReference | None = None,
    ) -> None:  # fmt: skip
        self._policy = policy
        self._tokenizer = tokenizer
        self._objective = objective
        self._engine = engine
        self._suites = suites
        self._read = read
        self._measured = measured
        self._sample = sample
        self._average = average
        """What is measured instead of the policy's own weights."""
        self._annotators = annotators
        self._draw = draw
        self._examined = dict(examined or {})
        """What answers to some prompts earn, by the name of the set."""
        self._point = point

    def run(self, progress: Progress) -> dict[str, float]:
        with at_rest(self._policy), nullcontext() if self._average is None else self._average.in_place():
            return self._figures(progress)

    def _figures(self, progress: Progress) -> dict[str, float]:
        figures: dict[str, float] = {}
        for title, rows in self._measured.items():
            spread = Spread()
            batches = rows.batches(0)
            if self._point is not None and isinstance(rows, ComparisonSource):
                batches = self._point(rows, 0, batches)
            numbers = measure(self._engine, self._objective, batches, self._annotators, spread)
            figures.update({f"{title}/{name}": value for name, value in numbers.items()})
            for name, values in spread.taken(self._engine).items():
                figures.update({f"{title}/{name}/{which}": value for which, value in statistics(values).items()})
                if self._draw is not None and self._engine.rank == 0:
                    self._draw(title, name, progress, values)
        if self._examined or self._suites or self._sample is not None:
            # What follows reads the policy in ways of its own.
            with self._engine.whole(self._policy):
                self._add_answers(figures, progress)
        return figures

    def _add_answers(self, figures: dict[str, float], progress: Progress) -> None:
        for title, examine in self._examined.items():
            figures.update({f"{title}/{name}": value for name, value in examine().items()})
        for suite in self._suites:
            numbers = suite.run(self._policy, self._tokenizer, self._read, ranks=self._engine)
            figures.update({f"{suite.title}/{name}": value for name, value in numbers.items()})
        if self._sample is not None:
            self._sample(progress)


@torch.no_grad()
def measure(
    engine: Engine, objective: Objective, batches: list[Batch], annotators: Sequence[Annotator] = (),
    spread: Spread | None = None,
) -> dict[str, float]:
    """Each Term of an objective over some batches, averaged over its unit, and their sum as `loss`. `spread` gets what
    the objective says of each pair or sequence."""
    counts = engine.sum(count(batches))
    if objective.whole_steps:
        batches, annotators = knowing_each_other(engine, objective, batches, annotators), ()
    sums: dict[str, float] = {}
    coefs: dict[str, float] = {}
    for batch in batches:
        batch = annotated(batch.to(engine.device), annotators)
        out = engine.forward(batch, objective.wants)
        if spread is not None:
            spread.add(objective.spread(out, batch))
        for term in [*objective.terms(out, batch), *out.aux]:
            sums[term.name] = sums.get(term.name, 0.0) + float(term.total) / (counts[term.unit] or 1.0)
            coefs[term.name] = term.coef
    figures = engine.sum(sums)
    loss = sum(coefs[name] * value for name, value in figures.items())
    # A Term that is the whole loss is told once. With label smoothing, `loss/lm` is the loss without it.
    whole = [name for name, coef in coefs.items() if coef]
    return {"loss": loss, **{name: value for name, value in figures.items() if [name] != whole}}


def write_samples(run: RunDir, progress: Progress, samples: list[Mapping[str, object]]) -> Path:
    """samples/step-00000040.json: prompt, text, tokens, finish."""
    run.samples.mkdir(parents=True, exist_ok=True)
    path = run.samples / f"step-{progress.step:08d}.json"
    path.write_text(json.dumps({"step": progress.step, "samples": samples}, indent=2, ensure_ascii=False) + "\n")
    return path
