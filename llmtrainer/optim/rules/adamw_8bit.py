"""AdamW whose means of large matrices are kept in eight bits: a quarter of the state."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from fnmatch import fnmatchcase
from typing import Any, ClassVar

import torch
from pydantic import Field
from torch import Tensor, nn
from torch.optim import Optimizer

from llmtrainer.core.protocols import Rule
from llmtrainer.optim.codes import BLOCK, blocks, decode, encode
from llmtrainer.optim.rules.adamw import Beta

SCALE = "_scale"
_SLICE = 1024 * BLOCK
"""Numbers decoded at one time: they fit a core's cache, and no parameter is ever decoded whole."""


class AdamW8bit(Rule):
    """Dettmers 2022, arXiv:2110.02861: block-wise codes of both means. Embeddings and small tensors keep float
    means, as in the paper: their gradients are uneven, or there is nothing to save."""

    elementwise: ClassVar[bool] = False
    """A code depends on the largest number of its block."""

    betas: tuple[Beta, Beta] = (0.9, 0.95)
    """How much of the running mean of gradients, and of their squares, each step keeps."""

    epsilon: float = Field(default=1e-8, gt=0.0, allow_inf_nan=False)
    """Added to the root of the mean square, so that a parameter that hardly ever has a gradient stays put."""

    weight_decay: float = Field(default=0.1, ge=0.0, allow_inf_nan=False)
    """Share of a matrix taken away per step, times the learning rate. Norms and biases are spared."""

    smallest: int = Field(default=4096, ge=1)
    """Tensors with fewer numbers keep float means."""

    keep_float: tuple[str, ...] = ("*embed*",)
    """Patterns of the parameters that keep float means whatever their size."""

    def build(self, groups: Sequence[Mapping[str, Any]]) -> BlockwiseAdamW:
        sorted_groups: list[dict[str, Any]] = []
        for group in groups:
            decayed = {**group, "weight_decay": self.weight_decay * group["decay_multiplier"]}
            if "coded" in group:  # built before: stand-ins of its parameters are coded where they are
                sorted_groups.append(decayed)
                continue
            named = list(zip(group["param_names"], group["params"], strict=True))
            for coded in (True, False):
                chosen = [item for item in named if self._is_coded(*item) == coded]
                if chosen:
                    names, parameters = (list(part) for part in zip(*chosen, strict=True))
                    sorted_groups.append({**decayed, "params": parameters, "param_names": names, "coded": coded})
        return BlockwiseAdamW(sorted_groups, self.betas, self.epsilon)

    def state_shape(self, what: str, shape: Sequence[int]) -> tuple[int, ...]:
        """Codes have the parameter's shape; there is one scale for each block of them."""
        return (blocks(math.prod(shape)),) if what.endswith(SCALE) else tuple(shape)

    def _is_coded(self, name: str, parameter: Tensor) -> bool:
        large = parameter.numel() >= self.smallest
        return large and not any(fnmatchcase(name, pattern) for pattern in self.keep_float)


class BlockwiseAdamW(Optimizer):
    """AdamW as torch has it, with `exp_avg` and `exp_avg_sq` as codes beside their scales in groups that are
    `coded`. Rounding is to the nearest code: the same gradients always give the same bits."""

    def __init__(self, groups: list[dict[str, Any]], betas: tuple[float, float], epsilon: float) -> None:
        super().__init__(groups, {"lr": 0.0})
        self._betas = betas
        self._epsilon = epsilon

    @torch.no_grad()
    def step(self, closure: Any = None) -> Any:
        assert closure is None, "the engine runs forward and backward"
        for group in self.param_groups:
            for parameter in group["params"]:
                if parameter.grad is None:
                    continue
                state = self.state[parameter]
                if not state:
                    state.update(_fresh(parameter, coded=group["coded"]))
                state["step"] += 1
                if group["coded"]:
                    self._update_coded(parameter, state, group)
                else:
                    self._update(parameter, parameter.grad, state["exp_avg"], state["exp_avg_sq"], state, group)

    def _update_coded(self, parameter: nn.Parameter, state: dict[str, Tensor], group: Mapping[str, Any]) -> None:
        assert parameter.grad is not None
        weights, gradient = parameter.view(-1), parameter.grad.reshape(-1)
        kept = {"exp_avg": True, "exp_avg_sq": False}
        for start in range(0, parameter.numel(), _SLICE):
            part, of_blocks = slice(start, start + _SLICE), slice(start // BLOCK, (start + _SLICE) // BLOCK)
            means = {
                name: decode(
                    state[name].view(-1)[part], state[name + SCALE][of_blocks], parameter.dtype, signed=signed
                )
                for name, signed in kept.items()
            }
            self._update(weights[part], gradient[part], means["exp_avg"], means["exp_avg_sq"], state, group)
            for name, signed in kept.items():
                state[name].view(-1)[part], state[name + SCALE][of_blocks] = encode(means[name], signed=signed)

    def _update(
        self, weights: Tensor, gradient: Tensor, mean: Tensor, square: Tensor, state: Mapping[str, Tensor],
        group: Mapping[str, Any],
    ) -> None:  # fmt: skip
        """arXiv:1711.05101, algorithm 2, in place."""
        (beta1, beta2), steps, rate = self._betas, float(state["step"]), group["lr"]
        weights.mul_(1.0 - rate * group["weight_decay"])
        mean.lerp_(gradient, 1.0 - beta1)
        square.mul_(beta2).addcmul_(gradient, gradient, value=1.0 - beta2)
        root = square.sqrt().div_(math.sqrt(1.0 - beta2**steps)).add_(self._epsilon)
        weights.addcdiv_(mean, root, value=-rate / (1.0 - beta1**steps))


def _fresh(parameter: nn.Parameter, *, coded: bool) -> dict[str, Tensor]:
    state = {"step": torch.zeros(())}  # on the CPU: it decides numbers, and reading it must not wait for a device
    for name, signed in (("exp_avg", True), ("exp_avg_sq", False)):
        if not coded:
            state[name] = torch.zeros_like(parameter)
            continue
        zeros = torch.zeros(1, device=parameter.device)
        (code,), scale = encode(zeros, signed=signed)
        state[name] = torch.full_like(parameter, int(code), dtype=torch.uint8)
        state[name + SCALE] = scale.repeat(blocks(parameter.numel()))
    return state
