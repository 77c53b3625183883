"""SimPO: DPO on the mean log-probability itself, with a target margin and without a reference."""

from __future__ import annotations

from pydantic import Field

from llmtrainer.core.batch import Batch, Outputs
from llmtrainer.core.objective import Objective, Term
from llmtrainer.objectives.dpo import DPO


class SimPO(Objective):
    """Make the mean log-probability of the better answer's tokens lead by gamma / beta (arXiv:2405.14734, eq. 6).

    The reward is what generation maximises, so no reference is needed, and an answer earns nothing by its length.
    """

    beta: float = Field(default=2.0, gt=0.0)
    """Scale of the reward, beta * mean log p; the paper takes 2 to 10, far more than DPO."""

    gamma: float = Field(default=1.0, ge=0.0)
    """By how much of reward the better answer must lead; the paper takes about half of beta."""

    label_smoothing: float = Field(default=0.0, ge=0.0, lt=0.5)
    """Share of pairs whose order is taken to be wrong."""

    nll_weight: float = Field(default=0.0, ge=0.0)
    """Weight of imitating the best answer beside: the mean of its tokens' -log p."""

    @property
    def compares(self) -> bool:
        return True

    def terms(self, out: Outputs, batch: Batch) -> list[Term]:
        return DPO(
            beta=self.beta, gamma=self.gamma, label_smoothing=self.label_smoothing, nll_weight=self.nll_weight,
            average="mean", reference_free=True,
        ).terms(out, batch)  # fmt: skip
