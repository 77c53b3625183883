"""Next token, weighted."""

from __future__ import annotations

from pydantic import Field

from llmtrainer.core.batch import Batch, Outputs
from llmtrainer.core.objective import Objective, Term


class CausalLM(Objective):
    """Predict every target from what stands before it in its document; each target counts by its weight."""

    z_loss: float = Field(default=0.0, ge=0.0)
    """Weight of the squared log-partition, which keeps logits from drifting (arXiv:2204.02311, section 5)."""

    @property
    def wants(self) -> tuple[str, ...]:
        return ("logp", "log_partition") if self.z_loss else ("logp",)

    def terms(self, out: Outputs, batch: Batch) -> list[Term]:
        assert out.logp_BT is not None
        weights_BT = batch.weights_BT.to(out.logp_BT.dtype)
        terms = [Term("loss/lm", -(weights_BT * out.logp_BT).sum(), "tokens")]
        if self.z_loss:
            assert out.log_partition_BT is not None
            squared_BT = weights_BT * out.log_partition_BT.square()
            terms.append(Term("loss/z", squared_BT.sum(), "tokens", self.z_loss))
        return terms
