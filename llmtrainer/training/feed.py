"""Who gives a run its rows, and who adds what is known of them."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from llmtrainer.base.errors import UserError
from llmtrainer.core.batch import ADVANTAGE, OLD, REFERENCE, ROLLOUT, Batch
from llmtrainer.core.protocols import Annotator, Engine, Source
from llmtrainer.generation.sampling import Sampling
from llmtrainer.models.decoder import Decoder
from llmtrainer.models.stored import Policy
from llmtrainer.tokenizer.tokenizer import FileTokenizer
from llmtrainer.training.dataset import Opened
from llmtrainer.training.recipe import Recipe
from llmtrainer.training.reference import FACT, LiveReference, at_rest, reference_of, require_same_reference
from llmtrainer.training.resume import Resumption
from llmtrainer.training.rollout import RolloutSource
from llmtrainer.training.saving import ROLLOUTS, State
from llmtrainer.training.writer import PolicyWriter


@dataclass(frozen=True)
class Feed:
    """Rows, and what is known of them."""

    source: Source
    annotators: tuple[Annotator, ...]
    facts: Mapping[str, str]
    """What every checkpoint says of them."""
    states: Mapping[str, State]
    """What the source itself goes on from, by the file of a checkpoint."""
    told: Callable[[], Mapping[str, float]]
    """What the source says of the rows it gave last."""
    starts_at: Mapping[str, float]
    """What Terms must be at the first step."""


def feed_of(
    recipe: Recipe, rows: Opened, policy: Policy, tokenizer: FileTokenizer, engine: Engine, compute: torch.dtype,
    resumption: Resumption | None, tell: Callable[[Mapping[str, Any]], None],
) -> Feed:
    """Everything that feeds the loop, where the run continues. UserError where the parts do not belong together."""
    annotators, facts = annotators_of(recipe, rows, policy, engine, compute, resumption)
    source = source_of(recipe, rows, policy, tokenizer, engine, tell)
    starts_at = recipe.objective.starts_at if begins_at_its_reference(recipe, policy) else {}
    if not isinstance(source, RolloutSource):
        return Feed(source, annotators, facts, {}, dict, starts_at)
    if resumption is not None:
        source.load_state(resumption.state(ROLLOUTS))
    return Feed(source, annotators, facts, {ROLLOUTS: source.state}, source.told, starts_at)


def source_of(
    recipe: Recipe, rows: Opened, policy: Policy, tokenizer: FileTokenizer, engine: Engine,
    tell: Callable[[Mapping[str, Any]], None],
) -> Source:
    """The rows on disk, or those that the policy writes itself. UserError where objective and data do not belong
    together."""
    writes = ADVANTAGE in recipe.objective.reads
    if rows.train is not None and writes:
        raise UserError(
            "the objective learns from the policy's own answers, and the data has rows of its own",
            where="objective.kind, data.kind", fix="data.kind=prompts asks; objective.kind=causal_lm imitates",
        )
    if rows.train is not None:
        return rows.train
    assert rows.prompts is not None
    if not writes:
        raise UserError(
            "prompts alone have no answers to learn from", where="data.kind, objective.kind",
            why="only what learns from its own answers is asked prompts",
            fix="objective.kind=grpo, or data.kind=examples",
        )
    if engine.world_size > 1:
        raise UserError("answers are written by one process so far", where="engine", fix="engine.kind=single")
    writer = writer_of(recipe, rows, policy, tokenizer)

    def look(batch: Batch) -> Tensor:
        with at_rest(policy), torch.no_grad():
            found = engine.forward(batch, ("logp",)).logp_BT
        assert found is not None
        return found

    return RolloutSource(
        rows.prompts, writer, recipe.objective, recipe.rollout, tokens_per_batch=recipe.data.tokens_per_batch,
        seed=recipe.seed, look=look, tell=tell,
    )


def writer_of(recipe: Recipe, rows: Opened, policy: Policy, tokenizer: FileTokenizer) -> PolicyWriter:
    """The policy as it answers in training."""
    sampling = recipe.rollout.sampling
    require_plain(sampling)
    return PolicyWriter(policy, tokenizer, with_ends(sampling, rows), recipe.rollout.rows_at_once)


def with_ends(sampling: Sampling, rows: Opened) -> Sampling:
    """Answers also end where the template's do."""
    ends = () if rows.chat is None else rows.chat.end_ids
    return sampling.model_copy(update={"stop_ids": tuple(dict.fromkeys([*sampling.stop_ids, *ends]))})


def require_plain(sampling: Sampling) -> None:
    """Refuse to draw from another distribution than the one whose probabilities are trained."""
    plain = Sampling()
    for name in ("temperature", "top_k", "top_p", "min_p"):
        if getattr(sampling, name) != getattr(plain, name):
            raise UserError(
                f"rollout.sampling.{name} is {getattr(sampling, name)}",
                why="answers would be drawn from another distribution than the one that is trained",
                fix=f"rollout.sampling.{name}={getattr(plain, name)}",
            )
    if sampling.penalises or sampling.suppress:
        raise UserError(
            "penalties and suppressed ids change what answers are drawn from", where="rollout.sampling",
            why="their probabilities would not be those that are trained",
            fix="remove the penalties and `suppress` from rollout.sampling",
        )


def annotators_of(
    recipe: Recipe, rows: Opened, policy: Policy, engine: Engine, compute: torch.dtype,
    resumption: Resumption | None,
) -> tuple[tuple[Annotator, ...], dict[str, str]]:
    """Who adds the signals that the objective reads, and what every checkpoint says of them.

    UserError where nobody knows a signal, and where the reference is another than the run began with.
    """
    annotators: list[Annotator] = []
    facts: dict[str, str] = {}
    if REFERENCE in recipe.objective.reads:
        frozen = reference_of(recipe.reference, recipe.model, policy, engine, compute)
        if resumption is not None:
            require_same_reference(resumption.manifest, frozen.sha256, resumption.folder)
        facts[FACT] = frozen.sha256
        annotators.append(LiveReference(frozen))
    written = () if rows.prompts is None else (ADVANTAGE, OLD, ROLLOUT)
    known = {*rows.signals, *written, *(name for annotator in annotators for name in annotator.adds)}
    if missing := [name for name in recipe.objective.reads if name not in known]:
        raise UserError(
            f"the objective reads `{missing[0]}`, and nobody knows it",
            where="objective.kind, data.kind",
            why="the rows know: " + (", ".join(sorted(known)) or "only their tokens"),
            fix="data.kind=preferences for comparisons, data.kind=prompts for answers of the policy's own",
        )
    return tuple(annotators), facts


def begins_at_its_reference(recipe: Recipe, policy: Policy) -> bool:
    """Whether the policy of a run that begins says the same as its reference: no other one is named, and nothing is
    dropped or added at random while training."""
    if REFERENCE not in recipe.objective.reads or recipe.reference.start_from is not None:
        return False
    return isinstance(policy, Decoder) and policy.family.dropout == 0.0 and policy.neftune == 0.0
