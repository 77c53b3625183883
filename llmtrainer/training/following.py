"""A reference that follows the policy a little after every rollout."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from llmtrainer.base.errors import UserError
from llmtrainer.models.stored import Policy

_PREFIX = "reference."


@dataclass(frozen=True)
class Following:
    """reference = (1 - share) reference + share policy, weight by weight, in the masters' type."""

    reference: Policy
    policy: Policy
    share: float

    @torch.no_grad()
    def step(self) -> None:
        """Take in the policy as it is now."""
        now = dict(self.policy.named_parameters())
        for name, kept in _weights(self.reference).items():
            kept.lerp_(now[name].detach().to(kept.dtype), self.share)

    def state(self) -> dict[str, Tensor]:
        """What a checkpoint keeps: the reference has moved, and no other folder has it."""
        return {_PREFIX + name: value.detach() for name, value in _weights(self.reference).items()}

    @torch.no_grad()
    def load_state(self, state: Mapping[str, Tensor]) -> None:
        """Go on with the reference of a checkpoint."""
        for name, kept in _weights(self.reference).items():
            kept.copy_(state[_PREFIX + name])


def following(reference: Policy | None, policy: Policy, share: float) -> Following | None:
    """UserError where the reference has no weights of its own, or not the policy's shapes."""
    if not share:
        return None
    if reference is None:
        raise UserError(
            "the reference has no weights of its own that could follow the policy", where="rollout.mix_reference",
            why="there is none, or it is the policy's own model beneath an adapter",
            fix="objective.kl=0.05 and reference.start_from=FOLDER, or rollout.mix_reference=0",
        )
    shapes = [{name: value.shape for name, value in _weights(model).items()} for model in (reference, policy)]
    if any(shapes[1].get(name) != shape for name, shape in shapes[0].items()):
        raise UserError(
            "the reference has other shapes than the policy, and cannot follow it", where="rollout.mix_reference",
            fix="a reference of the same shape, or rollout.mix_reference=0",
        )
    return Following(reference, policy, share)


def _weights(model: nn.Module) -> dict[str, nn.Parameter]:
    return dict(model.named_parameters())
