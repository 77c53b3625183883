"""Whole runs in several processes, for tests: what each process has to say about its run."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import torch

from llmtrainer.base.config import load
from llmtrainer.base.errors import UserError
from llmtrainer.core.batch import Batch
from llmtrainer.parallel.units import divided
from llmtrainer.training.cache_reference import cache_reference
from llmtrainer.training.logp_cache import LogpCache
from llmtrainer.training.recipe import Recipe
from llmtrainer.training.reference import LiveReference
from llmtrainer.training.rollout import RolloutSource
from llmtrainer.training.run import open_trainer

UNTOLD = ("rollout/seconds", "tokens_per_second")
"""Figures that differ from one run to the next."""


def ran(file: Path, overrides: tuple[str, ...]) -> dict[str, Any]:
    """Every step's figures, the last evaluation, ids of the answers that were written, and all weights."""
    recipe = load(Recipe, file, overrides=overrides)
    steps, answers = [], []
    with open_trainer(recipe) as trainer:
        for info in trainer.steps():
            told = {name: value for name, value in info.metrics.items() if name not in UNTOLD}
            steps.append({"loss": info.loss, "grad_norm": info.grad_norm, "tokens": info.tokens, **told})
            source = getattr(trainer.parts.source, "main", trainer.parts.source)
            if isinstance(source, RolloutSource):
                answers.append([answer.tolist() for answer in source._held.rollout.answers])
        weights = {name: value.tolist() for name, value in trainer.parts.engine.weights(trainer.parts.policy).items()}
        return {"steps": steps, "answers": answers, "figures": dict(trainer.figures), "weights": weights}


def poisoned(file: Path, overrides: tuple[str, ...], where: str, how: str) -> str:
    """What a run says in which rank 1 gets a number that is none after its first step: in a `weight`, or in what
    backward says of one (`gradient`)."""
    with open_trainer(load(Recipe, file, overrides=overrides)) as trainer:
        parameter = dict(trainer.parts.policy.named_parameters())[where]
        trainer.step()
        if trainer.parts.engine.rank == 1 and how == "weight":
            parameter.data[0, 0] = math.nan
        if trainer.parts.engine.rank == 1 and how == "gradient":
            # Of a parameter in pieces, backward knows the whole one that its unit computes with.
            (gathered,) = [
                each.unsharded_param for each in divided(getattr(trainer.parts.engine, "_units", ()))
                if each.sharded_param is parameter
            ] or [parameter]
            gathered.register_hook(lambda gradient: torch.full_like(gradient, math.nan))
        try:
            trainer.step()
        except UserError as error:
            return str(error)
    return "no error"


def evaluated(file: Path, overrides: tuple[str, ...]) -> tuple[dict[str, float], int]:
    """The figures of a run that has not begun, and how many tokens this process read for them."""
    with open_trainer(load(Recipe, file, overrides=overrides)) as trainer:
        read: list[int] = []
        trainer.parts.policy.register_forward_pre_hook(lambda module, given: read.append(given[0].input_tokens))
        return trainer.evaluate(), sum(read)


def cached(file: Path, overrides: tuple[str, ...]) -> tuple[int, int, dict[bytes, list[float]]]:
    """(rows asked about now, forward passes of the frozen model on this process, what is in the cache)."""
    passes: list[int] = []
    original = LiveReference.__call__

    def counted(self: LiveReference, batch: Batch) -> Batch:
        passes.append(batch.input_tokens)
        return original(self, batch)

    LiveReference.__call__ = counted    # type: ignore[method-assign]
    try:
        told = cache_reference(load(Recipe, file, overrides=overrides))
    finally:
        LiveReference.__call__ = original    # type: ignore[method-assign]
    cache = LogpCache(told.folders[0], {})
    known = {key: next(iter(cache[key].values())).tolist() for key in cache._places}
    return told.computed, len(passes), known
