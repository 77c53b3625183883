"""CPO: DPO with a reference that gives every answer the same, held in place by imitating the better one."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from llmtrainer.core.batch import Batch, Outputs
from llmtrainer.core.objective import Objective, Term
from llmtrainer.objectives.dpo import DPO


class CPO(Objective):
    """Prefer the better answer and imitate it, without a reference in memory (arXiv:2401.08417, eq. 3)."""

    loss: Literal["sigmoid", "hinge", "ipo"] = "sigmoid"
    """How a pair is punished, as of `dpo`. ipo reads means over an answer's tokens instead of sums."""

    beta: float = Field(default=0.1, gt=0.0)
    """Scale of the reward, beta * log p."""

    label_smoothing: float = Field(default=0.0, ge=0.0, lt=0.5)
    """Share of pairs whose order is taken to be wrong; read by sigmoid."""

    nll_weight: float = Field(default=1.0, ge=0.0)
    """Weight of imitating the best answer: the mean of its tokens' -log p. It stands for the reference."""

    @property
    def compares(self) -> bool:
        return True

    def terms(self, out: Outputs, batch: Batch) -> list[Term]:
        return DPO(
            loss=self.loss, beta=self.beta, nll_weight=self.nll_weight, reference_free=True,
            average="mean" if self.loss == "ipo" else "sum",
            label_smoothing=self.label_smoothing if self.loss == "sigmoid" else 0.0,
        ).terms(out, batch)  # fmt: skip
