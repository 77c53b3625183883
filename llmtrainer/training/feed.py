"""Who gives a run its rows, and who adds what is known of them."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import torch

from llmtrainer.base.config import count_as_read
from llmtrainer.base.errors import UserError
from llmtrainer.core.at_rest import at_rest
from llmtrainer.core.batch import (
    ADVANTAGE,
    BESIDE,
    GROUP,
    LIKED,
    LOW,
    MARGIN,
    OLD,
    OLD_VALUE,
    REFERENCE,
    RETURN,
    ROLLOUT,
    TEACHER_IDS,
    Batch,
    Outputs,
)
from llmtrainer.core.environment import Environment
from llmtrainer.core.objective import Objective
from llmtrainer.core.protocols import Annotator, Engine, Source
from llmtrainer.core.reward import every
from llmtrainer.core.weights_version import weights_version
from llmtrainer.data.comparison_source import ComparisonSource
from llmtrainer.generation.loop import text_stream
from llmtrainer.generation.sampling import Sampling
from llmtrainer.models.decoder import Decoder
from llmtrainer.models.stored import Policy
from llmtrainer.tokenizer.tokenizer import FileTokenizer
from llmtrainer.training.annotate import models_beside, with_caches
from llmtrainer.training.asynchronous import Ahead
from llmtrainer.training.beside import BesideSource
from llmtrainer.training.conversations import Talking, encoder
from llmtrainer.training.dataset import Opened
from llmtrainer.training.following import following
from llmtrainer.training.gathering import Gathering
from llmtrainer.training.mismatched import PointOfReference, point_of_reference
from llmtrainer.training.parts import Before
from llmtrainer.training.ready_rewards import ready
from llmtrainer.training.recipe import Recipe, Rollouts
from llmtrainer.training.reference import Frozen
from llmtrainer.training.resume import Resumption
from llmtrainer.training.rollout import RolloutSource
from llmtrainer.training.saving import ROLLOUTS, State
from llmtrainer.training.shared_prompts import require_exact
from llmtrainer.training.turns import Turn
from llmtrainer.training.writing import text_after


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
    examined: Mapping[str, Callable[[], Mapping[str, float]]] = field(default_factory=dict)
    """What answers to prompts that are never learned from earn now, by the name of their set."""
    point: PointOfReference | None = None
    """Who estimates the point that an objective compares with, before each step and each evaluation."""


    def before(self, rows: Opened) -> Before | None:
        """What is worked out before each step of training; None: nothing is."""
        if self.point is None:
            return None
        assert isinstance(rows.train, ComparisonSource), "only such rows know the signal"
        return partial(self.point, rows.train)


def feed_of(
    recipe: Recipe, rows: Opened, policy: Policy, tokenizer: FileTokenizer, engine: Engine, compute: torch.dtype,
    resumption: Resumption | None, tell: Callable[[Mapping[str, Any]], None],
) -> Feed:
    """Everything that feeds the loop, where the run continues. UserError where the parts do not belong together."""
    found = models_beside(recipe, rows, policy, tokenizer, engine, compute, resumption)
    require_known(recipe.objective.reads, rows, found.annotators)
    require_pairs(recipe.objective, rows)
    continued = None if resumption is None else resumption.folder
    source = source_of(recipe, rows, policy, tokenizer, engine, found.frozen, tell, continued)
    found = with_caches(recipe, rows, found, policy, engine, compute)
    annotators, facts = found.annotators, found.facts
    starts_at = recipe.objective.starts_at if begins_at_its_reference(recipe, policy, compute) else {}
    every = with_beside(recipe, rows, source)
    if not isinstance(source, RolloutSource):
        point = point_of_reference(recipe, policy, annotators, engine)
        return Feed(every, annotators, facts, {}, dict, starts_at, point=point)
    if resumption is not None:
        source.load_state(resumption.state(ROLLOUTS))
    assert rows.prompts is not None
    if resumption is not None or rows.prompts.prompts_per_step < engine.world_size:
        # In the middle of a rollout the next answers are written later, and a rank without a prompt writes none: here
        # what decides about them counts as read.
        environment = () if recipe.rollout.environment is None else (recipe.rollout.environment,)
        rollout = (
            recipe.rollout, recipe.rollout.sampling, recipe.rollout.sampler, *recipe.rollout.rewards, *environment
        )
        count_as_read(*rollout, recipe.objective)
    examined = {name: partial(source.examined, prompts) for name, prompts in rows.asked.items()}
    return Feed(every, annotators, facts, {ROLLOUTS: source.state}, source.told, starts_at, examined)


def with_beside(recipe: Recipe, rows: Opened, source: Source) -> Source:
    """The source, and the rows of the other objective where there is one. UserError where one of the two is missing."""
    if BESIDE not in recipe.objective.reads:
        if rows.beside is not None:
            raise UserError(
                "`beside` names rows, and the objective has none beside it", where="beside, objective.kind",
                fix="objective='{kind: mix, main: {kind: grpo}, weight: 0.1}', or remove `beside`",
            )
        return source
    if rows.beside is None:
        raise UserError(
            "the objective has another one beside it, and nothing says what that learns", where="beside",
            fix="beside='{kind: documents, train: texts/, sequences_per_step: 8}'",
        )
    return BesideSource(source, rows.beside)


def source_of(
    recipe: Recipe, rows: Opened, policy: Policy, tokenizer: FileTokenizer, engine: Engine, frozen: Frozen | None,
    tell: Callable[[Mapping[str, Any]], None], continued: Path | None,
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
        require_taught(recipe.objective)
    settings = recipe.rollout
    require_shareable(settings, engine)
    if settings.share_prompt and settings.group_size > 1:
        require_exact("rollout.share_prompt", policy, policy.context_length)

    read = engine.reader(policy)

    def look(batch: Batch, wants: tuple[str, ...]) -> Outputs:
        with at_rest(policy):
            return read(batch, wants)

    def version() -> str:
        return weights_version(policy.module)

    gathering, ahead = None, None
    if settings.max_staleness is None:
        gathering = gathering_of(recipe, settings, rows, policy, tokenizer, engine)
    else:
        require_corrected(recipe.objective, settings.max_staleness)
        ahead = partial(
            Ahead, recipe, policy.module, version, rows.prompts.fingerprint, settings.max_staleness, continued
        )  # fmt: skip
        if rows.asked:      # written here: with rewards of its own, so that no model goes to the other process
            own = {"rewards": tuple(reward.model_copy(deep=True) for reward in settings.rewards)}
            gathering = gathering_of(recipe, settings.model_copy(update=own), rows, policy, tokenizer, engine)
    return RolloutSource(
        rows.prompts, gathering, recipe.objective, settings,
        tokens_per_batch=recipe.data.tokens_per_batch, seed=recipe.seed, vocabulary=policy.vocabulary, look=look,
        reference=None if frozen is None else lambda batch, wants: frozen.say(batch, wants),
        version=version, tell=tell, ranks=engine, whole=partial(engine.whole, policy),
        following=following(None if frozen is None else frozen.model, policy, settings.mix_reference), ahead=ahead,
    )


def gathering_of(
    recipe: Recipe, settings: Rollouts, rows: Opened, policy: Policy, tokenizer: FileTokenizer, engine: Engine
) -> Gathering:
    """Who writes answers in this process, ready to begin."""
    assert rows.prompts is not None
    sampling = with_ends(settings.sampling, rows)
    ready(settings.rewards)
    # What the policy says of answers is asked in the micro-batches in which they are learned, so not one by one.
    sampler = settings.sampler.open(policy, tokenizer, engine.forward, settings.weights, "fast")
    return Gathering(
        rows.prompts, sampler, settings.model_copy(update={"sampling": sampling}),
        text=lambda prompt, answer: text_of(tokenizer, sampling, prompt, answer), seed=recipe.seed,
        earns=ADVANTAGE in recipe.objective.reads, talking=talking_of(settings.environment, rows, policy),
        ranks=engine,
    )


def require_shareable(settings: Rollouts, engine: Engine) -> None:
    """UserError where several processes write answers and something of it can only be done by one."""
    if engine.world_size == 1:
        return
    if settings.max_staleness is not None:
        raise UserError(
            "rollouts are written ahead beside one process so far", where="rollout.max_staleness, engine.kind",
            why=f"{engine.world_size:,} processes train, and each of them writes its share of the answers",
            fix="rollout.max_staleness=null, or one process: engine.kind=single",
        )
    for reward in (part for whole in settings.rewards for part in every(whole)):
        if reward.one_process:
            raise UserError(
                f"the reward `{reward.title}` is one process's to give", where="rollout.rewards, engine.kind",
                why=f"{engine.world_size:,} processes would ask for it at the same time",
                fix="another reward, or one process: engine.kind=single",
            )


def require_corrected(objective: Objective, max_staleness: int) -> None:
    """UserError where answers of older weights would be learned as if those of today had written them."""
    if max_staleness and ADVANTAGE in objective.reads and ROLLOUT not in objective.reads:
        raise UserError(
            "older weights may write the answers, and nothing corrects for it",
            where="rollout.max_staleness, objective.correction",
            why="the policy's ratio would be taken to itself, which is 1 however far it has moved since",
            fix="objective.correction.bypass=true takes it to the weights that wrote; or objective.correction.weights="
            "token; or rollout.max_staleness=0",
        )


def talking_of(environment: Environment | None, rows: Opened, policy: Policy) -> Talking | None:
    """With whom the policy talks, by the template of its prompts."""
    if environment is None:
        return None
    assert rows.chat is not None, "prompts come with a template"
    return Talking(environment, encoder(rows.chat), policy.context_length)


def require_taught(objective: Objective) -> None:
    """UserError where an objective that asks for no reward learns nothing from answers of the policy's own. What a
    teacher would have said at each of their places is worth learning (arXiv:2306.13649)."""
    if TEACHER_IDS not in objective.reads:
        raise UserError(
            "prompts alone have no answers to learn from", where="data.kind, objective.kind",
            why="only what learns from its own answers is asked prompts",
            fix="objective.kind=grpo, objective.kind=distill, or data.kind=examples",
        )
    main = getattr(objective, "main", objective)     # what stands beside it has rows of its own
    if "logp" in main.wants:
        raise UserError(
            "the policy would imitate its own answers", where="objective.coefficient",
            why="(1 - coefficient) of the loss is the text's own, and the text is the policy's",
            fix="objective.coefficient=1.0, and the teacher's word alone counts",
        )


def with_ends(sampling: Sampling, rows: Opened) -> Sampling:
    """Answers also end where the template's do."""
    ends = () if rows.chat is None else rows.chat.end_ids
    return sampling.model_copy(update={"stop_ids": tuple(dict.fromkeys([*sampling.stop_ids, *ends]))})


def text_of(tokenizer: FileTokenizer, sampling: Sampling, prompt: Sequence[int], answer: Turn) -> str:
    """What was written, without control tokens and without the stop string that ended it."""
    if sampling.stop:
        growing = text_stream(sampling, tokenizer, prompt)
        return "".join(growing.feed(token) for token in answer.tokens) + growing.close()
    ended = bool(answer.tokens) and answer.tokens[-1] in sampling.stop_ids
    return text_after(tokenizer, prompt, answer.tokens[:-1] if ended else answer.tokens)


WRITTEN = (ADVANTAGE, OLD, ROLLOUT, REFERENCE, OLD_VALUE, RETURN)
"""What a source of rollouts knows of its rows."""


def require_known(reads: Sequence[str], rows: Opened, annotators: Sequence[Annotator]) -> None:
    """UserError where the objective reads a signal that nobody knows."""
    written = () if rows.prompts is None else WRITTEN
    known = {*rows.signals, *written, BESIDE, *(name for annotator in annotators for name in annotator.adds)}
    if missing := [name for name in reads if name not in known]:
        lacking = _LACKING.get(missing[0]) if GROUP in rows.signals else None
        raise UserError(
            f"the objective reads `{missing[0]}`, and nobody knows it",
            where="objective.kind, data.kind",
            why="the rows know: " + (", ".join(sorted(known)) or "only their tokens"),
            fix=lacking or "data.kind=preferences for comparisons, data.kind=prompts for answers of the policy's own",
        )


_LACKING = {
    LIKED: "records of a prompt, a completion and a label that says whether it was liked; or objective.kind=dpo",
    MARGIN: "records with a margin, or with a score of either answer; or leave out objective.margin",
    LOW: "records with a grade; or objective.kind=reward for pairs",
}
"""What records of comparisons have to say for an objective to read it."""


def require_pairs(objective: Objective, rows: Opened) -> None:
    """UserError where an objective that compares answers is given, for training or by name for evaluation, records of
    one answer each: every loss would be 0."""
    if not objective.compares:
        return
    measured = rows.measured()
    try:
        for name, source in {"data.train": rows.train, **measured}.items():
            if not isinstance(source, ComparisonSource) or bool((source.table.answers > 1).any()):
                continue
            fitting = "kto" if source.table.liked is not None else "ordinal"
            raise UserError(
                f"objective `{objective.kind}` compares two answers to a prompt, and no record has two",
                where=name if name == "data.train" else f"data.evaluate.{name}",
                why="each record is one answer, liked or not" if fitting == "kto" else "each record is one graded text",
                fix=f"objective.kind={fitting}, or records of two answers: prompt, chosen, rejected",
            )
    finally:
        for source in measured.values():
            source.close()


def begins_at_its_reference(recipe: Recipe, policy: Policy, compute: torch.dtype) -> bool:
    """Whether the policy of a run that begins says the same as its reference: no other one is named, nothing is
    dropped or added at random while training, and no rounding of 16 bits lies between this batch and a cached one."""
    if REFERENCE not in recipe.objective.reads or recipe.reference.start_from is not None:
        return False
    if recipe.reference.cached and compute in (torch.bfloat16, torch.float16):
        return False
    if not isinstance(policy, Decoder) or policy.neftune:
        return False
    return not policy.family.dropout and not getattr(policy.adapter, "dropout", None)
