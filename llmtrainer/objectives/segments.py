"""Segment preferences: several pairs of answers to one prompt, each pair compared within itself alone."""

from __future__ import annotations

import torch
from pydantic import Field
from torch.nn.functional import logsigmoid

from llmtrainer.base.errors import UserError
from llmtrainer.core.batch import GROUP, REFERENCE, Batch, Outputs
from llmtrainer.core.objective import Objective, Term
from llmtrainer.core.preferences import Pairs, log_ratio, preference_metrics


class Segments(Objective):
    """Prefer the first of each two neighbouring segments that follow one prompt: -log s(beta r - beta r' - gamma).

    r is a segment's log-probability, over the reference's if there is one. The sequences of a comparison stand in
    pairs, chosen before rejected; a pair is compared with no other. Every pair of a step counts the same.
    """

    beta: float = Field(default=0.1, gt=0.0, allow_inf_nan=False)
    """Factor on what is compared."""

    gamma: float = Field(default=0.0, ge=0.0, allow_inf_nan=False)
    """By how much the chosen segment must lead."""

    mean: bool = False
    """Compare means over the tokens of a segment instead of sums."""

    reference: bool = True
    """Compare log-ratios over a frozen reference. false: the policy's own log-probabilities."""

    @property
    def reads(self) -> tuple[str, ...]:
        return (REFERENCE,) if self.reference else ()

    def terms(self, out: Outputs, batch: Batch) -> list[Term]:
        assert out.logp_BT is not None
        pairs = neighbours(batch)
        read_BT = log_ratio(out.logp_BT, batch) if self.reference else out.logp_BT
        reward_S = self.beta * (batch.mean_by_sequence(read_BT) if self.mean else batch.sum_by_sequence(read_BT))
        loss_P = -logsigmoid(reward_S[pairs.better_P] - reward_S[pairs.worse_P] - self.gamma)
        # Two sequences are a pair here, whatever else answers their prompt: the unit `pairs` would count every two.
        metrics = preference_metrics(pairs, reward_S, batch.sum_by_sequence(out.logp_BT))
        told = [Term(metric.name, 2 * metric.total, "sequences", coef=0.0) for metric in metrics]
        return [Term("loss/segments", 2 * loss_P.sum(), "sequences"), *told]


def neighbours(batch: Batch) -> Pairs:
    """Sequences 0 and 1, 2 and 3, ... of each comparison. UserError where one has an odd number of them."""
    S = batch.sequences
    better_P = torch.arange(0, S - S % 2, 2, device=batch.tokens_BT.device)
    n_G = torch.bincount(batch.signals[GROUP][:S]) if GROUP in batch.signals else torch.tensor([S])
    if bool((n_G % 2).any()):
        raise UserError(
            f"a prompt has {int(n_G[n_G % 2 == 1][0])} segments", where="data",
            why="segments come in pairs, chosen before rejected", fix="records with an even number of answers",
        )
    return Pairs(better_P, better_P + 1, better_P)
