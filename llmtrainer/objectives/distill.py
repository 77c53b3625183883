"""Distillation: predict what a teacher predicts, not only what the text says."""

from __future__ import annotations

from typing import Literal

import torch
from pydantic import Field
from torch import Tensor

from llmtrainer.base.errors import UserError
from llmtrainer.core.batch import TEACHER_IDS, TEACHER_LOGP, TEACHER_TEMPERATURE, Batch, Outputs
from llmtrainer.core.objective import Objective, Term

NONE = float("-inf")


class Distill(Objective):
    """(1 - coefficient) * next token + coefficient * divergence from a teacher of the same vocabulary.

    Of the teacher the K likeliest ids are known at each place, and the exact mass of all the others, which is compared
    as one more id. With K the whole vocabulary nothing is left out.
    """

    coefficient: float = Field(default=0.5, ge=0.0, le=1.0)
    """How much of the loss is the teacher's; the rest is the text's own."""

    divergence: Literal["forward_kl", "reverse_kl", "jensen_shannon", "cross_entropy"] = "forward_kl"
    """forward_kl, KL(teacher || student): cover all that the teacher would say. reverse_kl: say nothing that it would
    not (arXiv:2306.08543). jensen_shannon: between the two (arXiv:2306.13649). cross_entropy: forward_kl plus the
    teacher's own entropy, with the same gradient."""

    mixture: float = Field(default=0.5, gt=0.0, lt=1.0)
    """The teacher's share in the mixture that `jensen_shannon` compares both with: near 0 it is like forward_kl, near 1
    like reverse_kl."""

    temperature: float = Field(default=1.0, gt=0.0)
    """Flattens both distributions, so that unlikely ids teach too; the divergence counts by its square, so that its
    gradient keeps its size (arXiv:1503.02531, section 2)."""

    @property
    def reads(self) -> tuple[str, ...]:
        return (TEACHER_IDS, TEACHER_LOGP, *((TEACHER_TEMPERATURE,) if self.temperature != 1.0 else ()))

    @property
    def wants(self) -> tuple[str, ...]:
        return (*(("logp",) if self.coefficient < 1.0 else ()), "listed_logp", "rest_logp")

    def terms(self, out: Outputs, batch: Batch) -> list[Term]:
        assert out.listed_logp_BTK is not None and out.rest_logp_BT is not None
        self._require_temperature(batch)
        dtype = out.rest_logp_BT.dtype
        weights_BT = batch.weights_BT.to(dtype)
        counting_BT = (batch.weights_BT > 0)[..., None]
        teacher_BTK, listed_BTK = batch.signals[TEACHER_LOGP].to(dtype), out.listed_logp_BTK
        left_BT = (1.0 - teacher_BTK.exp().sum(-1)).clamp(min=0.0)
        # One outcome more than K. A place that does not count says 0 of everything, and must stay finite.
        p = torch.cat([teacher_BTK, left_BT.log()[..., None]], -1).where(counting_BT, 0.0)
        q = torch.cat([listed_BTK, out.rest_logp_BT[..., None]], -1).where(counting_BT, 0.0)
        distance_BT = self._distance(p, q) * self.temperature**2
        agree_BT = (listed_BTK.argmax(-1) == teacher_BTK.argmax(-1)).to(dtype)
        terms = [
            Term("loss/distill", (weights_BT * distance_BT).sum(), "tokens", self.coefficient),
            Term("distill/agreement", (weights_BT * agree_BT).sum(), "tokens", coef=0.0),
            Term("distill/unlisted", (weights_BT * left_BT).sum(), "tokens", coef=0.0),
        ]
        if self.coefficient < 1.0:
            assert out.logp_BT is not None
            terms.append(Term("loss/lm", -(weights_BT * out.logp_BT).sum(), "tokens", 1.0 - self.coefficient))
        return terms

    def _distance(self, p: Tensor, q: Tensor) -> Tensor:
        """The divergence of log-probabilities p, the teacher's, and q of the same outcomes, over the last axis."""
        match self.divergence:
            case "forward_kl":
                return _expected(p, p, q)
            case "reverse_kl":
                return _expected(q, q, p)
            case "cross_entropy":
                return _expected(p, torch.zeros_like(p), q)
            case "jensen_shannon":
                share = q.new_tensor(self.mixture)
                m = torch.logaddexp(_finite(p) + share.log(), _finite(q) + torch.log1p(-share))
                m = m.where((p > NONE) | (q > NONE), NONE)
                return share * _expected(p, p, m) + (1.0 - share) * _expected(q, q, m)

    def _require_temperature(self, batch: Batch) -> None:
        found = float(batch.signals[TEACHER_TEMPERATURE]) if TEACHER_TEMPERATURE in batch.signals else 1.0
        if abs(found - self.temperature) > 1e-6 * self.temperature:
            raise UserError(
                f"the teacher's log-probabilities are of temperature {found:g}, and objective.temperature is"
                f" {self.temperature:g}",
                why="what a teacher gave at one temperature cannot be turned into another from K ids",
                fix=f"objective.temperature={found:g}, or ask the teacher again",
            )


def _expected(weight: Tensor, a: Tensor, b: Tensor) -> Tensor:
    """The sum of exp(weight) (a - b) over outcomes; those that either side holds for impossible are left out."""
    both = (weight > NONE) & (a > NONE) & (b > NONE)
    return (_finite(weight).exp() * (_finite(a) - _finite(b))).where(both, 0.0).sum(-1)


def _finite(logp: Tensor) -> Tensor:
    """-inf replaced, so that what is left out afterwards has a gradient of 0 and not of NaN."""
    return logp.where(logp > NONE, -80.0)
