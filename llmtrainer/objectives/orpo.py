"""ORPO: imitate the better answer and push the odds of the worse one down, in one pass without a reference."""

from __future__ import annotations

from pydantic import Field
from torch.nn.functional import logsigmoid

from llmtrainer.core.batch import Batch, Outputs
from llmtrainer.core.maths import log1mexp
from llmtrainer.core.objective import Objective, Term
from llmtrainer.core.preferences import pairs_of, preference_metrics


class ORPO(Objective):
    """Fine-tuning on the best answer plus the odds ratio of every two (arXiv:2403.07691, eq. 6).

    Odds are p / (1 - p) of an answer's probability per token: the exponential of its mean log-probability.
    """

    beta: float = Field(default=0.1, ge=0.0)
    """Weight of the odds ratio beside imitation (lambda in the paper)."""

    @property
    def compares(self) -> bool:
        return True

    def terms(self, out: Outputs, batch: Batch) -> list[Term]:
        assert out.logp_BT is not None
        pairs = pairs_of(batch)
        mean_logp_S = batch.mean_by_sequence(out.logp_BT)
        log_odds_S = mean_logp_S - log1mexp(mean_logp_S)
        margin_P = log_odds_S[pairs.better_P] - log_odds_S[pairs.worse_P]
        return [
            Term("loss/nll", -mean_logp_S[pairs.best_P].sum(), "pairs"),
            Term("loss/odds_ratio", -logsigmoid(margin_P).sum(), "pairs", self.beta),
            *preference_metrics(pairs, self.beta * log_odds_S, batch.sum_by_sequence(out.logp_BT)),
        ]
