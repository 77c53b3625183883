"""An objective of a test: stay where the reference is."""

from __future__ import annotations

from llmtrainer.core.batch import REFERENCE, Batch, Outputs
from llmtrainer.core.objective import Objective, Term


class Near(Objective):
    """Next token, and how far its log-probabilities are from the reference's."""

    @property
    def reads(self) -> tuple[str, ...]:
        return (REFERENCE,)

    def terms(self, out: Outputs, batch: Batch) -> list[Term]:
        assert out.logp_BT is not None
        away_BT = (out.logp_BT - batch.signals[REFERENCE]).abs() * (batch.weights_BT > 0)
        return [
            Term("loss/lm", -(batch.weights_BT * out.logp_BT).sum(), "tokens"),
            Term("away", away_BT.sum(), "tokens", coef=0.0),
            Term("reference", -(batch.weights_BT * batch.signals[REFERENCE]).sum(), "tokens", coef=0.0),
        ]
