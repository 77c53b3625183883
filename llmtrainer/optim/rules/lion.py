"""Steps of equal size along the sign of a momentum."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from pydantic import Field
from torch import Tensor, nn
from torch.optim import Optimizer

from llmtrainer.core.protocols import Rule
from llmtrainer.optim.rules.adamw import Beta

_TOGETHER = 2**24
"""Numbers that are updated at one time: their directions are all the memory that is needed beside the state."""


class Lion(Rule):
    """Chen 2023, arXiv:2302.06675, program 1. Every number moves by the learning rate, up or down: take a peak 3 to
    10 times below AdamW's, and a weight decay as many times above. Half of AdamW's state."""

    betas: tuple[Beta, Beta] = (0.9, 0.99)
    """How much of the momentum counts against the new gradient for the direction, and how much of it each step
    keeps."""

    weight_decay: float = Field(default=0.1, ge=0.0, allow_inf_nan=False)
    """Share of a matrix taken away per step, times the learning rate. Norms and biases are spared."""

    def build(self, groups: Sequence[Mapping[str, Any]]) -> SignOfMomentum:
        decayed = [{**group, "weight_decay": self.weight_decay * group["decay_multiplier"]} for group in groups]
        return SignOfMomentum(decayed, self.betas)


class SignOfMomentum(Optimizer):
    """Lion as a torch optimizer; keeps `exp_avg` for every parameter that ever had a gradient."""

    def __init__(self, groups: list[dict[str, Any]], betas: tuple[float, float]) -> None:
        super().__init__(groups, {"lr": 0.0})
        self._betas = betas

    @torch.no_grad()
    def step(self, closure: Any = None) -> Any:
        assert closure is None, "the engine runs forward and backward"
        towards, keep = self._betas
        for group in self.param_groups:
            for parameters in _together([parameter for parameter in group["params"] if parameter.grad is not None]):
                for parameter in parameters:
                    if not self.state[parameter]:
                        self.state[parameter]["exp_avg"] = torch.zeros_like(parameter)
                weights: list[Tensor] = list(parameters)
                gradients = [parameter.grad for parameter in parameters if parameter.grad is not None]
                momenta = [self.state[parameter]["exp_avg"] for parameter in parameters]
                directions = torch._foreach_lerp(momenta, gradients, 1.0 - towards)
                torch._foreach_sign_(directions)
                torch._foreach_mul_(weights, 1.0 - group["lr"] * group["weight_decay"])
                torch._foreach_add_(weights, directions, alpha=-group["lr"])
                torch._foreach_lerp_(momenta, gradients, 1.0 - keep)


def _together(parameters: list[nn.Parameter]) -> Iterator[list[nn.Parameter]]:
    """Lists of no more than `_TOGETHER` numbers, or of one parameter."""
    chosen: list[nn.Parameter] = []
    for parameter in parameters:
        if chosen and sum(map(torch.numel, chosen)) + parameter.numel() > _TOGETHER:
            yield chosen
            chosen = []
        chosen.append(parameter)
    if chosen:
        yield chosen
