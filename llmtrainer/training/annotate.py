"""The frozen models beside a policy, reference and teacher: read with every batch, or once for every row."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from llmtrainer.base.errors import UserError
from llmtrainer.core.batch import ADVANTAGE, REFERENCE, TEACHER_IDS
from llmtrainer.core.objective import Objective
from llmtrainer.core.protocols import Annotator, Engine
from llmtrainer.models.stored import Policy
from llmtrainer.tokenizer.tokenizer import FileTokenizer
from llmtrainer.training.console import say
from llmtrainer.training.dataset import Opened
from llmtrainer.training.fill_cache import Filled, fill, folder_of
from llmtrainer.training.logp_cache import LogpCache
from llmtrainer.training.recipe import Recipe
from llmtrainer.training.reference import FACT, Frozen, LiveReference, reference_of, require_same
from llmtrainer.training.resume import Resumption
from llmtrainer.training.teacher import FACT as TEACHER_FACT
from llmtrainer.training.teacher import LiveTeacher, teacher_of


@dataclass(frozen=True)
class Models:
    """Who says what of the rows."""

    frozen: Frozen | None
    """The reference, if the objective asks for one."""
    annotators: tuple[Annotator, ...]
    facts: Mapping[str, str]
    """What every checkpoint says of them: their hashes."""


def models_beside(
    recipe: Recipe, rows: Opened, policy: Policy, tokenizer: FileTokenizer, engine: Engine, compute: torch.dtype,
    resumption: Resumption | None,
) -> Models:
    """The models that the objective asks for. UserError where one is another than the run began with."""
    facts, annotators = dict[str, str](), list[Annotator]()
    frozen = _frozen_of(recipe, policy, engine, compute, resumption)
    if frozen is not None:
        facts[FACT] = frozen.sha256
        if rows.prompts is None:     # a source of rollouts asks it itself, once for all passes over an answer
            annotators.append(LiveReference(frozen))
    if TEACHER_IDS in recipe.objective.reads:
        teacher = teacher_of(recipe.teacher, recipe.objective, policy, tokenizer, engine, compute)
        if resumption is not None:
            require_same("teacher", resumption.manifest.get(TEACHER_FACT), teacher.sha256, resumption.folder)
        facts[TEACHER_FACT] = teacher.sha256
        annotators.append(teacher)
    return Models(frozen, tuple(annotators), facts)


def with_caches(
    recipe: Recipe, rows: Opened, found: Models, policy: Policy, engine: Engine, compute: torch.dtype
) -> Models:
    """The same, with those replaced by what they said, once, that the recipe wants to be cached."""
    if rows.train is None:
        if found.frozen is not None and recipe.reference.cached:
            raise UserError(
                "the reference cannot be cached: the policy writes its rows itself, and they are new every time",
                where="reference.cached", fix="reference.cached=false",
            )
        return found
    annotators = []
    for live in found.annotators:
        if (recipe.reference if isinstance(live, LiveReference) else recipe.teacher).cached:
            _require_main(recipe.objective, live)
            filled, cached = cache_of(recipe, rows, live, policy, engine, compute)
            say(f"{_who(live)}: {filled.rows:,} rows, {filled.computed:,} of them read now, the others known before; "
                f"kept in {filled.folder}")
            live = cached
        annotators.append(live)
    return replace(found, frozen=None, annotators=tuple(annotators))


def cache_of(
    recipe: Recipe, rows: Opened, live: Annotator, policy: Policy, engine: Engine, compute: torch.dtype
) -> tuple[Filled, Annotator]:
    """Have one of them read every row of training and evaluation that it has not read before."""
    assert rows.train is not None
    facts = _facts(live, policy, engine, compute)
    cache = engine.in_turn(lambda: LogpCache(folder_of(Path(recipe.cache), facts), facts))
    measured = rows.measured()
    try:
        return fill(
            cache, live, _distinct([rows.train, *measured.values()]), _who(live),
            tokens_per_batch=recipe.data.tokens_per_batch, seed=recipe.seed, compute=compute, engine=engine,
        )
    finally:
        for source in measured.values():
            source.close()


def _facts(live: Annotator, policy: Policy, engine: Engine, compute: torch.dtype) -> dict[str, Any]:
    """Whose words these are, and what decides their digits."""
    how = {"precision": str(compute), "attention": policy.path, "device": engine.device.type}
    if isinstance(live, LiveTeacher):
        asked = {"top_k": live.k, "temperature": live.temperature, "ids": live.rows}
        return {"what": "teacher", "sha256": live.sha256, **asked, **how}
    assert isinstance(live, LiveReference)
    return {"what": "reference", "sha256": live.frozen.sha256, **how}


def _require_main(objective: Objective, live: Annotator) -> None:
    """UserError where rows beside the main ones read it: those are others in every epoch."""
    other = getattr(objective, "beside", None)
    if isinstance(other, Objective) and not set(other.reads).isdisjoint(live.adds):
        raise UserError(
            f"the objective beside the main one reads a {_who(live)} too, and its rows are not cached",
            where=f"{_who(live)}.cached", fix=f"{_who(live)}.cached=false",
        )


def _distinct(sources: Sequence[Any]) -> list[Any]:
    """One for each store: the held-out part is one of the training set's."""
    return list({source.store.path: source for source in reversed(sources)}.values())[::-1]


def _who(live: Annotator) -> str:
    return "reference" if REFERENCE in live.adds else "teacher"


def _frozen_of(
    recipe: Recipe, policy: Policy, engine: Engine, compute: torch.dtype, resumption: Resumption | None
) -> Frozen | None:
    if REFERENCE not in recipe.objective.reads:
        return None
    moves = ADVANTAGE in recipe.objective.reads and recipe.rollout.mix_reference > 0.0
    frozen = reference_of(recipe.reference, recipe.model, policy, engine, compute, moves=moves)
    if resumption is not None:
        require_same("reference", resumption.manifest.get(FACT), frozen.sha256, resumption.folder)
    return frozen
