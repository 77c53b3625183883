"""Adam with decoupled weight decay."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Annotated, Any, Literal

import torch
from pydantic import Field

from llmtrainer.core.protocols import Rule

Beta = Annotated[float, Field(ge=0.0, lt=1.0)]


class AdamW(Rule):
    """Loshchilov and Hutter 2019, arXiv:1711.05101, algorithm 2; computed by torch."""

    betas: tuple[Beta, Beta] = (0.9, 0.95)
    """How much of the running mean of gradients, and of their squares, each step keeps."""

    epsilon: float = Field(default=1e-8, gt=0.0, allow_inf_nan=False)
    """Added to the root of the mean square, so that a parameter that hardly ever has a gradient stays put."""

    weight_decay: float = Field(default=0.1, ge=0.0, allow_inf_nan=False)
    """Share of a matrix taken away per step, times the learning rate. Norms and biases are spared."""

    implementation: Literal["fused", "foreach", "plain"] = "fused"
    """One kernel, lists of tensors, or a loop. foreach equals plain bit for bit; fused rounds differently."""

    def build(self, groups: Sequence[Mapping[str, Any]]) -> torch.optim.AdamW:
        return torch.optim.AdamW(
            [{**group, "weight_decay": self.weight_decay * group["decay_multiplier"]} for group in groups],
            lr=0.0,  # every step brings its own
            betas=self.betas,
            eps=self.epsilon,
            fused=self.implementation == "fused",
            foreach=self.implementation == "foreach",
        )
