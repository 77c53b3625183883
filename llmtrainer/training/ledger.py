"""What the first step changed, and what it had to show: every trainable tensor with a gradient moved, every frozen one
is bit-equal, and a policy that begins as its reference says the same."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch
from torch import Tensor, nn

from llmtrainer.base.errors import UserError
from llmtrainer.core.pieces import own

FARTHEST_START = 2e-3
"""How far a Term may be from what it must be at the start: compiled products in 16 bits have other last digits."""


class Ledger:
    """Takes the model's fingerprints before the first step and settles them after it."""

    def __init__(self, policy: nn.Module) -> None:
        self._policy = policy
        self._before = {name: fingerprint(parameter) for name, parameter in policy.named_parameters()}
        self._had_gradient: set[str] = set()
        self._handles = [
            parameter.register_post_accumulate_grad_hook(self._noting(name))
            for name, parameter in policy.named_parameters()
            if parameter.requires_grad
        ]

    def _noting(self, name: str) -> Callable[[Tensor], None]:
        def note(parameter: Tensor) -> None:
            if parameter.grad is not None and bool(own(parameter.grad).any()):
                self._had_gradient.add(name)

        return note

    def settle(self, learning_rate: float, warn: Callable[[str], None]) -> None:
        """Compare with the state now. A frozen parameter that moved is an error; so is a trainable one with a
        gradient that did not, unless the update is below the resolution of its type, which is said."""
        for handle in self._handles:
            handle.remove()
        moved = {
            name for name, parameter in self._policy.named_parameters() if fingerprint(parameter) != self._before[name]
        }
        frozen = {name for name, parameter in self._policy.named_parameters() if not parameter.requires_grad}
        if strayed := sorted(frozen & moved):
            raise UserError(
                f"{len(strayed)} frozen parameters changed in the first step",
                where=", ".join(strayed[:5]),
                why="something writes to them behind the optimizer's back",
                fix="unfreeze them, or find what writes to them",
            )
        still = [
            (name, parameter)
            for name, parameter in self._policy.named_parameters()
            if name in self._had_gradient and name not in moved
        ]
        if stuck := [name for name, parameter in still if not _too_small(parameter, learning_rate)]:
            raise UserError(
                f"{len(stuck)} trainable parameters have a gradient and did not move in the first step",
                where=", ".join(stuck[:5]),
                why="the optimizer does not hold them, or its rate for them is 0",
                fix="look at optim.groups: a rate of 0 means freeze, and is written model.freeze",
            )
        if still:
            warn(f"{len(still)} parameters, first {still[0][0]}, move less than their type can hold at this rate")


def fingerprint(tensor: Tensor) -> int:
    """A position-dependent 64-bit sum over the bits of a tensor, or of this process's piece of it: on the tensor's own
    device, no copy of it kept."""
    bits = own(tensor).detach().contiguous().view(torch.uint8).flatten()
    words = bits.view(torch.int32) if bits.numel() % 4 == 0 else bits
    total, piece = 0, 1 << 22  # in pieces, so that a large embedding needs no eightfold copy of itself
    for start in range(0, words.numel(), piece):
        part = words[start : start + piece].to(torch.int64)
        place = torch.arange(start + 1, start + 1 + part.numel(), device=words.device)
        total += int(((part ^ (place * 0x9E3779B1)) * (2 * place + 1)).sum())
    return total


def _too_small(parameter: Tensor, learning_rate: float) -> bool:
    """Whether a step of this rate vanishes beside the smallest weight of the tensor."""
    piece = own(parameter.detach())
    if not piece.numel():
        return True
    smallest = float(piece.abs().min())
    return learning_rate <= torch.finfo(parameter.dtype).eps * smallest


def require_start(metrics: Mapping[str, float], expected: Mapping[str, float]) -> None:
    """Refuse a run whose first step shows that the policy is not the reference it is held to."""
    for name, value in expected.items():
        if abs(metrics[name] - value) > FARTHEST_START * max(abs(value), 1.0):
            raise UserError(
                f"{name} is {metrics[name]:.6f} at the first step and has to be {value:.6f}",
                why="the policy still is its reference then, so that both must say the same of every answer",
                fix="nothing was saved; llmtrainer doctor shows versions and fallbacks, and a report of this helps",
            )
