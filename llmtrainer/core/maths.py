"""Formulas that objectives share: pure functions of tensors, each with where it was published."""

from __future__ import annotations

import math

import torch
from torch import Tensor

LOG_2 = math.log(2.0)


def log1mexp(x: Tensor) -> Tensor:
    """log(1 - exp(x)) for x <= 0, elementwise: the logarithm of the probability of the contrary."""
    # 1 - exp(x) loses its digits near 0, and exp(x) is lost beside 1 far below it. Each form is exact where the
    # other fails; log 2 is where their errors cross (Maechler 2012, "Accurately computing log(1 - exp(-|a|))", eq. 7).
    # Both are evaluated everywhere, so each is clamped to its own side: `where` picks the value, but a NaN gradient
    # of the side not picked would still get through it.
    tiny = torch.finfo(x.dtype).tiny
    near = torch.log(-torch.expm1(x.clamp(-LOG_2, -tiny)))
    far = torch.log1p(-torch.exp(x.clamp(max=-LOG_2)))
    return torch.where(x > -LOG_2, near, far)


def divergence(estimator: str, logp: Tensor, other_logp: Tensor) -> Tensor:
    """An estimate of KL(policy || other) from each drawn token, elementwise (Schulman 2020, "Approximating KL").

    With r = other(x) / policy(x): k1 = -log r, unbiased and often negative; k2 = (log r)^2 / 2, biased, and its
    gradient is that of the divergence where tokens are the policy's own; k3 = r - 1 - log r, unbiased and never
    negative (arXiv:2402.03300, eq. 4).
    """
    log_r = other_logp - logp
    match estimator:
        case "k1":
            return -log_r
        case "k2":
            return 0.5 * log_r.square()
        case _:
            return torch.expm1(log_r) - log_r


def clipped(ratio: Tensor, advantage: Tensor, low: float, high: float, delta: float | None = None) -> Tensor:
    """-min(r A, clip(r, 1 - low, 1 + high) A), arXiv:1707.06347 eq. 7; with delta, r of the first is at most that, so
    that a bad token which became far likelier cannot cost without bound (arXiv:2505.07291)."""
    bounded = ratio.clamp(1.0 - low, 1.0 + high)
    free = ratio if delta is None else ratio.clamp(max=delta)
    return -torch.minimum(free * advantage, bounded * advantage)


def capped(ratio: Tensor, advantage: Tensor, logp: Tensor, high: float) -> Tensor:
    """CISPO: REINFORCE under a weight of min(r, 1 + high) that is never differentiated, so that no token loses its
    gradient (arXiv:2506.13585, with no lower bound as there)."""
    return -ratio.detach().clamp(max=1.0 + high) * advantage * logp


def soft_gate(ratio: Tensor, advantage: Tensor, positive: float, negative: float) -> Tensor:
    """SAPO: a sigmoid of the ratio in place of the clip, steeper for bad tokens: 4 / t * s(t (r - 1)), whose slope at
    r = 1 is 1 (arXiv:2511.20347)."""
    t = _by_sign(advantage > 0, positive, negative, ratio)
    return -4.0 / t * torch.sigmoid(t * (ratio - 1.0)) * advantage


def gamma_weight(
    log_w: Tensor, advantage: Tensor, positive: tuple[float, float], negative: tuple[float, float]
) -> Tensor:
    """VESPO: phi(w) = exp(lambda + k log w - lambda w) of a whole answer's ratio w, 1 at w = 1 and small on both
    sides of it; (k, lambda) by the sign of the advantage. Never differentiated (arXiv:2602.10693)."""
    log_w = log_w.detach().clamp(math.log(1e-8), 20.0)
    k = _by_sign(advantage >= 0, positive[0], negative[0], log_w)
    rate = _by_sign(advantage >= 0, positive[1], negative[1], log_w)
    return torch.exp(rate + k * log_w - rate * log_w.exp())


def _by_sign(good: Tensor, positive: float, negative: float, like: Tensor) -> Tensor:
    # As tensors: `where` would take two Python numbers for float32 whatever they are used with.
    return torch.where(good, like.new_tensor(positive), like.new_tensor(negative))
