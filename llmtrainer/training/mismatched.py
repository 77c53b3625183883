"""KTO's point of reference: how far the policy has left the reference on answers that were given to other prompts."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import nn

from llmtrainer.base.errors import UserError
from llmtrainer.core.at_rest import at_rest
from llmtrainer.core.batch import KL, REFERENCE, Batch, Outputs
from llmtrainer.core.preferences import log_ratio
from llmtrainer.core.protocols import Annotator, Engine, annotated
from llmtrainer.data.comparison_source import ComparisonSource
from llmtrainer.training.recipe import Recipe


@dataclass(frozen=True)
class PointOfReference:
    """Adds the signal `kl_S` to the micro-batches of a step: z0 of arXiv:2402.01306, section 4.1, in nats.

    z0 = max(0, mean of log policy(y'|x) - log reference(y'|x)), y' the answer that stands before x's own in the step.
    The mean is over the whole step and all ranks, so that it does not depend on how the step is cut. Both models read
    without dropout, and no gradient goes through it.
    """

    policy: nn.Module
    read: Callable[[Batch, tuple[str, ...]], Outputs]
    """The policy's forward pass, of what is only read."""
    annotators: Sequence[Annotator]
    """Who says what the reference makes of a batch."""
    engine: Engine

    def __call__(self, source: ComparisonSource, step: int, batches: list[Batch]) -> list[Batch]:
        """The micro-batches of a step of `source`, knowing z0."""
        share, read = self.engine.share, source.mismatched(step)
        each, sequences = len(read) // len(share.mine), 0
        # Micro-batch by micro-batch, each said by the process that has it: a sum over ranks would round otherwise with
        # another number of them.
        nats = {f"{part} {place}": 0.0 for part in range(share.of) for place in range(each)}
        with torch.no_grad(), at_rest(self.policy):
            for number, batch in enumerate(read):
                batch = annotated(batch.to(self.engine.device), self.annotators)
                logp_BT = self.read(batch, ("logp",)).logp_BT
                assert logp_BT is not None
                if batch.sequences:
                    told = float(batch.sum_by_sequence(log_ratio(logp_BT, batch)).sum())
                    nats[f"{batch.shard} {number % each}"] = told
                sequences += batch.sequences
        found = self.engine.sum({**nats, "sequences": float(sequences)})
        point = max(0.0, math.fsum(found[name] for name in nats) / found["sequences"])
        return [batch.with_signals({KL: torch.full((batch.sequences,), point)}) for batch in batches]


def point_of_reference(
    recipe: Recipe, policy: nn.Module, annotators: Sequence[Annotator], engine: Engine
) -> PointOfReference | None:
    """Who estimates it; None where the objective does not ask. UserError where what the reference says is read from a
    cache, which holds the rows of the data alone."""
    if KL not in recipe.objective.reads:
        return None
    if recipe.reference.cached:
        raise UserError(
            "the reference is read from a cache, and the objective compares with it on answers to other prompts",
            where="reference.cached", why="the cache holds what it says of the data's own rows",
            fix="reference.cached=false, or objective.point=own",
        )
    assert any(REFERENCE in annotator.adds for annotator in annotators)
    return PointOfReference(policy, engine.reader(policy), annotators, engine)
