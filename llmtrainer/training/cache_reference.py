"""cache-reference: what the frozen models of a recipe say of its rows, worked out before the run and kept."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from llmtrainer.base.errors import UserError
from llmtrainer.base.result import Result
from llmtrainer.core.precision import DTYPES
from llmtrainer.training.annotate import cache_of, models_beside
from llmtrainer.training.assemble import engine_of, require_choices, rows_of, tokenizer_of, trained_policy
from llmtrainer.training.console import warn
from llmtrainer.training.feed import require_known
from llmtrainer.training.fill_cache import Filled
from llmtrainer.training.recipe import Recipe


@dataclass(frozen=True)
class CachedReference(Result):
    """What became of the rows of a recipe, over every model that its objective asks for."""

    folders: tuple[Path, ...]
    """Where it is kept: one folder for each model."""
    rows: int
    """Rows with a target, of training and evaluation."""
    computed: int
    """Of them, read now."""
    reused: int
    """Of them, known before or equal to another row."""
    checked: int
    """Of those known before, read again and compared."""
    damaged: int
    """Shards that were found damaged, and removed."""

    def text(self) -> str:
        return (
            f"{self.rows:,} rows: {self.computed:,} read now, {self.reused:,} known before or equal to another row "
            f"({self.checked:,} of them checked), {self.damaged:,} damaged shards removed\n"
            f"kept in {', '.join(map(str, self.folders))}\n"
            "reference.cached=true (teacher.cached=true) trains with it"
        )


def cache_reference(recipe: Recipe) -> CachedReference:
    """Fill the cache for a recipe and train nothing. What is there already is not worked out again.

    UserError where the objective asks for no frozen model, or the policy writes its rows itself.
    """
    engine, precision = engine_of(recipe)
    compute = DTYPES[precision]
    require_choices(recipe, engine.device, compute)
    folder, tokenizer = engine.in_turn(lambda: tokenizer_of(recipe))
    rows = engine.in_turn(lambda: rows_of(recipe, folder, tokenizer, engine))
    if rows.train is None:
        raise UserError(
            "the policy writes its rows itself, and they are new every time", where="data.kind",
            fix="data.kind=preferences, or data.kind=examples",
        )
    try:
        policy, _ = trained_policy(recipe, tokenizer, engine, compute, rows, None, warn)
        found = models_beside(recipe, rows, policy, tokenizer, engine, compute, None)
        if not found.annotators:
            raise UserError(
                "the objective asks for neither reference nor teacher", where="objective.kind",
                fix="objective.kind=dpo, or objective.kind=distill",
            )
        require_known(recipe.objective.reads, rows, found.annotators)
        done = [cache_of(recipe, rows, live, policy, engine, compute)[0] for live in found.annotators]
    finally:
        rows.train.close()
        engine.close()
    return _summed(done)


def _summed(done: list[Filled]) -> CachedReference:
    return CachedReference(
        tuple(Path(one.folder) for one in done), sum(one.rows for one in done), sum(one.computed for one in done),
        sum(one.reused for one in done), sum(one.checked for one in done), sum(len(one.damaged) for one in done),
    )
