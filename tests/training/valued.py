"""An objective that asks for values and next tokens: what a policy with a critic is tried with."""

from __future__ import annotations

from llmtrainer.core.batch import Batch, Outputs
from llmtrainer.core.objective import Objective, Term


class Valued(Objective):
    """Imitate, and expect 1 everywhere."""

    @property
    def wants(self) -> tuple[str, ...]:
        return ("logp", "value")

    def terms(self, out: Outputs, batch: Batch) -> list[Term]:
        assert out.logp_BT is not None and out.value_BT is not None
        weights_BT = batch.weights_BT
        return [
            Term("loss/lm", -(out.logp_BT * weights_BT).sum(), "tokens"),
            Term("loss/value", ((out.value_BT - 1.0).square() * weights_BT).sum(), "tokens"),
        ]
