"""How well a reward model tells better answers from worse: accuracy and gaps on a file of comparisons."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from llmtrainer.base.errors import UserError
from llmtrainer.core.batch import Batch
from llmtrainer.data.comparison_source import ComparisonSource
from llmtrainer.models.stored import Policy
from llmtrainer.training.datasets.preferences import Preferences
from llmtrainer.training.models import Opened, tokenizer_folder
from llmtrainer.training.scoring import TOKENS_PER_BATCH, require_scores
from llmtrainer.training.spread import statistics


@dataclass(frozen=True)
class Judged:
    """Scores of comparisons, and what follows from them."""

    scores: tuple[tuple[float, ...], ...]
    """Of the answers of each comparison, the better before the worse, as they should be."""
    tokens: int
    """Tokens read."""

    @property
    def gaps(self) -> NDArray[np.float64]:
        """Score of the better less that of the worse, of every two answers to a prompt."""
        return np.array([
            scores[better] - scores[worse]
            for scores in self.scores for worse in range(len(scores)) for better in range(worse)
        ])  # fmt: skip

    def figures(self) -> dict[str, float]:
        """accuracy (share of pairs whose better answer scores higher), loss, pairs, and the statistics of gaps."""
        gaps = self.gaps
        told = {f"gap/{name}": value for name, value in statistics(gaps).items()}
        loss = float(np.logaddexp(0.0, -gaps).mean())
        return {"accuracy": float((gaps > 0).mean()), "loss": loss, "pairs": float(len(gaps)), **told}


def judged(
    opened: Opened, data: str, *, template: str = "auto", tokens_per_batch: int | None = None,
    comparisons: int | None = None, allow_truncated: bool = False,
) -> Judged:
    """Score the answers of a file of comparisons in any form that training reads. UserError where the model gives no
    score, or an answer is beyond its context."""
    policy = opened.policy
    require_scores(policy, str(opened.folder))
    budget = tokens_per_batch or max(TOKENS_PER_BATCH, 2 * policy.context_length)
    dataset = Preferences(
        train=(data,), template=template, too_long="keep", sequence_length=policy.context_length,
        tokens_per_batch=budget, max_dropped_share=1.0, allow_truncated=allow_truncated,
    )
    with tempfile.TemporaryDirectory() as cache:
        store, _ = dataset.prepared(tokenizer_folder(opened.folder), Path(cache))
        wanted = min(comparisons or store.comparisons, store.comparisons)
        source = ComparisonSource(
            store, pairs_per_step=wanted, tokens_per_batch=budget, seed=0, shuffle=False, prefetch=False
        )
        batches = source.batches(0)
        _require_context(policy, batches)
        scores = dict(pair for batch in batches for pair in _scores(policy, batch))
    return Judged(tuple(scores[first] for first in sorted(scores)), sum(batch.input_tokens for batch in batches))


@torch.no_grad()
def _scores(policy: Policy, batch: Batch) -> Iterator[tuple[int, tuple[float, ...]]]:
    """(first document, scores) of each comparison of a batch."""
    if not batch.sequences:
        return
    score_S = policy(batch.to(next(policy.parameters()).device), ("score",)).score_S
    assert score_S is not None
    scores, rows, groups = score_S.double().cpu().tolist(), batch.signals["row_S"].tolist(), batch.signals["group_S"]
    for group in range(int(groups.max()) + 1):
        places = (groups == group).nonzero().squeeze(1).tolist()
        yield rows[places[0]], tuple(scores[place] for place in places)


def _require_context(policy: Policy, batches: list[Batch]) -> None:
    longest = max((int(batch.position_BT.max()) + 1 for batch in batches), default=0)
    if longest > policy.context_length:
        raise UserError(
            f"an answer with its prompt has {longest:,} tokens, and the reward model reads {policy.context_length:,}",
            why="positions it was never trained on would spoil the figure", fix="leave such answers out",
        )


def in_words(figures: dict[str, Any]) -> list[str]:
    """The figures, a line each."""
    return [
        f"  accuracy       {figures['accuracy']:.4f}   of {figures['pairs']:,.0f} pairs: the better answer has more",
        f"  gap            {figures['gap/mean']:.4f}   on average, with deviation {figures['gap/std']:.4f}",
        f"  quantiles      {figures['gap/p5']:.3g} | {figures['gap/p25']:.3g} | {figures['gap/median']:.3g} | "
        f"{figures['gap/p75']:.3g} | {figures['gap/p95']:.3g}   of the gap: 5, 25, 50, 75 and 95 %",
        f"  loss           {figures['loss']:.4f}   -log of the probability that the better answer is preferred",
    ]
