"""Reward models: a number for each answer, such that better answers have larger ones."""

from __future__ import annotations

from collections.abc import Mapping

from pydantic import Field
from torch import Tensor
from torch.nn.functional import logsigmoid

from llmtrainer.core.batch import MARGIN, Batch, Outputs
from llmtrainer.core.objective import Objective, Term
from llmtrainer.core.preferences import Pairs, pairs_of, require_two


class BradleyTerry(Objective):
    """The score of the better answer leads that of the worse: -log s(gap), of every two answers to a prompt.

    With two scores s this is the likelihood that a person prefers the first with probability 1 / (1 + exp(-gap)),
    gap = s(better) - s(worse) (Bradley and Terry 1952; arXiv:2203.02155, eq. 1). Needs model.head.kind=score.
    """

    beta: float = Field(default=1.0, gt=0.0, allow_inf_nan=False)
    """Factor on the gap: how steep preference is in the score."""

    gamma: float = Field(default=0.0, ge=0.0, allow_inf_nan=False)
    """By how much beta times the gap must lead."""

    margin: bool = False
    """Let each pair lead by its own margin besides, where records say how much better an answer is (arXiv:2307.09288,
    eq. 2). Pairs without one have 0."""

    centre: float = Field(default=0.0, ge=0.0, allow_inf_nan=False)
    """Weight of (s(better) + s(worse))^2, which keeps scores around 0 (arXiv:2312.09244, section 2.1, takes 0.01):
    gaps alone leave the height of all scores open."""

    @property
    def compares(self) -> bool:
        return True

    @property
    def wants(self) -> tuple[str, ...]:
        return ("score",)

    @property
    def reads(self) -> tuple[str, ...]:
        return (MARGIN,) if self.margin else ()

    def terms(self, out: Outputs, batch: Batch) -> list[Term]:
        assert out.score_S is not None
        pairs = pairs_of(batch)
        better_P, worse_P = out.score_S[pairs.better_P], out.score_S[pairs.worse_P]
        gap_P = better_P - worse_P
        loss_P = -logsigmoid(self.beta * gap_P - self.gamma - self._margins(batch, pairs, gap_P))
        terms = [Term("loss/reward", loss_P.sum(), "pairs")]
        if self.centre:
            terms.append(Term("loss/centre", (better_P + worse_P).square().sum(), "pairs", self.centre))
        told = {
            "preference/accuracy": (gap_P > 0).to(gap_P.dtype), "preference/margin": gap_P,
            "reward/chosen": better_P, "reward/rejected": worse_P,
        }  # fmt: skip
        return terms + [Term(name, value_P.detach().sum(), "pairs", coef=0.0) for name, value_P in told.items()]

    def spread(self, out: Outputs, batch: Batch) -> Mapping[str, Tensor]:
        """`gap`: by how much the better answer of each pair leads, before beta."""
        assert out.score_S is not None
        pairs = pairs_of(batch)
        return {"gap": (out.score_S[pairs.better_P] - out.score_S[pairs.worse_P]).detach()}

    def _margins(self, batch: Batch, pairs: Pairs, like_P: Tensor) -> Tensor:
        """What each gap must exceed by its record."""
        if not self.margin:
            return like_P.new_zeros(())
        require_two(batch, "objective.margin")
        return batch.signals[MARGIN][pairs.better_P].to(like_P.dtype)
