"""A moving average of the weights, kept beside them: often a better model than the last step's."""

from __future__ import annotations

from contextlib import AbstractContextManager
from pathlib import Path

import torch
from torch import nn

from llmtrainer.base.errors import UserError
from llmtrainer.core.pieces import own
from llmtrainer.models.stored import Policy, read_into
from llmtrainer.training.exchange import exchanged
from llmtrainer.training.recipe import Ema

FOLDER = "ema"
"""Of a checkpoint: a model folder of its own."""


class MovingAverage:
    """One more copy of the trainable weights, in their own type (float32 or wider), on their device: of those that are
    divided among processes, this one's pieces."""

    def __init__(self, policy: nn.Module, settings: Ema) -> None:
        self._parameters = [parameter for parameter in policy.parameters() if parameter.requires_grad]
        if any(hasattr(parameter, "ds_tensor") for parameter in self._parameters):
            raise UserError(
                "no average is kept of weights that DeepSpeed has divided", where="optim.ema, engine.stage=3",
                fix="engine.stage=2, or engine.kind=fsdp2",
            )
        self._means = [parameter.detach().clone() for parameter in self._parameters]
        self._decay, self._every, self._warmup = settings.decay, settings.every, settings.warmup

    def kept(self, step: int) -> float:
        """How much of the mean the update after `step` keeps: a function of the step, with nothing to save."""
        each = min(self._decay, (1.0 + step) / (10.0 + step)) if self._warmup else self._decay
        return each**self._every

    @torch.no_grad()
    def update(self, step: int) -> None:
        """Take in the weights after `step`, if it is one of every so many."""
        if step % self._every == 0:
            now = [own(parameter.detach()) for parameter in self._parameters]
            torch._foreach_lerp_([own(mean) for mean in self._means], now, 1.0 - self.kept(step))

    def in_place(self) -> AbstractContextManager[None]:
        """Until the block ends, the policy has the mean's values, and the mean the policy's."""
        return exchanged(self._parameters, self._means)

    def load(self, policy: Policy, folder: Path) -> None:
        """Continue from what a checkpoint holds, every tensor by name. Raises UserError, as loading weights does."""
        with self.in_place():
            read_into(policy, folder)
