"""Next token, weighted."""

from __future__ import annotations

from pydantic import Field

from llmtrainer.core.batch import Batch, Outputs
from llmtrainer.core.objective import Objective, Term


class CausalLM(Objective):
    """Predict every target from what stands before it in its document; each target counts by its weight."""

    label_smoothing: float = Field(default=0.0, ge=0.0, lt=1.0)
    """Share of each target's probability that is spread evenly over all ids of the vocabulary, so that the model
    is never asked to be certain (arXiv:1512.00567, section 7). `loss/lm` stays the loss without it."""

    z_loss: float = Field(default=0.0, ge=0.0)
    """Weight of the squared log-partition, which keeps logits from drifting (arXiv:2204.02311, section 5, takes
    1e-4)."""

    @property
    def wants(self) -> tuple[str, ...]:
        smoothed = ("mean_logp",) if self.label_smoothing else ()
        return ("logp", *(("log_partition",) if self.z_loss else ()), *smoothed)

    def terms(self, out: Outputs, batch: Batch) -> list[Term]:
        assert out.logp_BT is not None
        weights_BT = batch.weights_BT.to(out.logp_BT.dtype)
        # Both parts of the smoothed loss are Terms of their own: the first is what other runs are compared by.
        terms = [Term("loss/lm", -(weights_BT * out.logp_BT).sum(), "tokens", 1.0 - self.label_smoothing)]
        if self.label_smoothing:
            assert out.mean_logp_BT is not None
            terms.append(
                Term("loss/smoothing", -(weights_BT * out.mean_logp_BT).sum(), "tokens", self.label_smoothing)
            )
        if self.z_loss:
            assert out.log_partition_BT is not None
            squared_BT = weights_BT * out.log_partition_BT.square()
            terms.append(Term("loss/z", squared_BT.sum(), "tokens", self.z_loss))
        return terms
