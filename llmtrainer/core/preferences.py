"""What objectives on ranked answers share: which sequences make a pair, and what a log tells of them."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from llmtrainer.base.errors import UserError
from llmtrainer.core.batch import GROUP, REFERENCE, Batch
from llmtrainer.core.objective import Term
from llmtrainer.core.randomness import derive, token_bits


@dataclass(frozen=True)
class Pairs:
    """Every two answers to one prompt, as numbers of sequences. P is what `count` calls pairs."""

    better_P: Tensor
    worse_P: Tensor
    best_P: Tensor
    """The best answer to the prompt of each pair: the better one itself where there are two answers."""


def pairs_of(batch: Batch) -> Pairs:
    """All pairs of each comparison. Its sequences stand side by side, the best first; without the signal
    `group_S`, each two sequences are a comparison."""
    S, device = batch.sequences, batch.tokens_BT.device
    if GROUP not in batch.signals:
        assert S % 2 == 0, f"{S} sequences are not pairs"
        better_P = torch.arange(0, S, 2, device=device)
        return Pairs(better_P, better_P + 1, better_P)
    group_S = batch.signals[GROUP][:S]
    place_S = torch.arange(S, device=device)
    same_SS = group_S[:, None] == group_S[None, :]
    better_P, worse_P = (same_SS & (place_S[:, None] < place_S[None, :])).nonzero(as_tuple=True)
    return Pairs(better_P, worse_P, torch.searchsorted(group_S, group_S[better_P]))


def require_two(batch: Batch, method: str) -> None:
    """Raises UserError where a prompt has another number of answers than two."""
    n_G = torch.bincount(batch.signals[GROUP]) if GROUP in batch.signals else torch.full((1,), 2)
    odd_G = n_G[n_G != 2]
    if odd_G.numel():
        raise UserError(
            f"{method} compares two answers, and a prompt here has {int(odd_G[0])}",
            why="its formula knows one better and one worse answer",
            fix="objective.loss=sigmoid, which compares every two of several ranked answers, or records of two answers",
        )


def preference_metrics(pairs: Pairs, reward_S: Tensor, logp_S: Tensor) -> list[Term]:
    """What is logged of each pair, in means over pairs: by how much the better answer leads, and both sides.

    reward_S: what the objective takes for the worth of each sequence. logp_S: summed log-probability.
    """
    reward_S, logp_S = reward_S.detach(), logp_S.detach()
    margin_P = reward_S[pairs.better_P] - reward_S[pairs.worse_P]
    figures = {
        "preference/accuracy": (margin_P > 0).to(margin_P.dtype),
        "preference/margin": margin_P,
        "reward/chosen": reward_S[pairs.better_P],
        "reward/rejected": reward_S[pairs.worse_P],
        "logp/chosen": logp_S[pairs.better_P],
        "logp/rejected": logp_S[pairs.worse_P],
    }
    return [Term(name, value_P.sum(), "pairs", coef=0.0) for name, value_P in figures.items()]


def log_ratio(logp_BT: Tensor, batch: Batch) -> Tensor:
    """How much more likely the policy makes each target than the reference does, as a logarithm."""
    return logp_BT - batch.signals[REFERENCE].to(logp_BT.dtype)


def thinned(batch: Batch, key: int) -> Batch:
    """The batch with as many counting targets in every answer as the shortest of its comparison has, drawn at
    random: a function of (key, place of the sequence in the step, position). SamPO, arXiv:2406.10957."""
    S = batch.sequences
    counts_BT = (batch.weights_BT > 0) & (batch.sequence_BT >= 0)
    owner_N = batch.sequence_BT[counts_BT].long()
    bits_N = token_bits(derive(key, "sampo"), *_places(batch))[counts_BT]
    length_S = torch.bincount(owner_N, minlength=S)
    order_N = (owner_N * 2**32 + bits_N).argsort(stable=True)
    place_N = torch.arange(len(owner_N), device=owner_N.device)
    rank_N = torch.empty_like(place_N)
    rank_N[order_N] = place_N - (length_S.cumsum(0) - length_S)[owner_N[order_N]]
    group_S = batch.signals[GROUP][:S] if GROUP in batch.signals else torch.arange(S, device=owner_N.device) // 2
    shortest_S = length_S.scatter_reduce(0, group_S, length_S, "amin", include_self=False)[group_S]
    kept_BT = torch.zeros_like(counts_BT)
    kept_BT[counts_BT] = rank_N < shortest_S[owner_N]
    return replace(batch, weights_BT=batch.weights_BT * kept_BT)


def _places(batch: Batch) -> tuple[Tensor, Tensor]:
    place, position_BT = batch.places
    return place, batch.position_BT if position_BT is None else position_BT
