"""Momentum made orthogonal for hidden matrices, with AdamW beside it for everything else."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from fnmatch import fnmatchcase
from typing import Any, ClassVar, Literal

import torch
from pydantic import Field
from torch import Tensor
from torch.optim import Optimizer

from llmtrainer.base.errors import UserError
from llmtrainer.core.precision import DTYPES, resolve
from llmtrainer.core.protocols import Rule
from llmtrainer.optim.rules.adamw import AdamW

COEFFICIENTS = (3.4445, -4.7750, 2.0315)
"""Of the quintic that drives singular values towards 1, steepest at 0 (Jordan 2024,
https://kellerjordan.github.io/posts/muon): they end between 0.7 and 1.2, which is near enough."""

RMS = 0.2
"""Root mean square of a typical AdamW update, so that both rules share one learning rate (Liu 2025,
arXiv:2502.16982, section 2.2)."""


class Muon(Rule):
    """Jordan 2024. Hidden matrices move by their orthogonalised momentum; embeddings, head, norms and biases
    by AdamW. Updates are scaled to AdamW's size, so `optim.schedule.peak` means the same to both."""

    elementwise: ClassVar[bool] = False

    hidden: tuple[str, ...] = ("*.layers.*",)
    """Patterns of the parameters whose matrices are hidden: not those next to the vocabulary."""

    momentum: float = Field(default=0.95, ge=0.0, lt=1.0)
    """How much of the running mean of gradients each step keeps."""

    nesterov: bool = True
    """Look one step ahead along the momentum."""

    iterations: int = Field(default=5, ge=1, le=20)
    """Newton-Schulz steps of the orthogonalisation."""

    orthogonalise_in: Literal["auto", "bfloat16", "float32"] = "auto"
    """Type of those products; float64 weights use float64. auto: bfloat16 where the device multiplies it natively,
    else float32."""

    weight_decay: float = Field(default=0.1, ge=0.0, allow_inf_nan=False)
    """Share of a hidden matrix taken away per step, times the learning rate."""

    beside: AdamW = AdamW()
    """The rule of everything else."""

    def build(self, groups: Sequence[Mapping[str, Any]]) -> MuonBesideAdamW:
        hidden: list[dict[str, Any]] = []
        others: list[dict[str, Any]] = []
        for group in groups:
            of_each: tuple[list[int], list[int]] = ([], [])
            for index, name in enumerate(group["param_names"]):
                of_each[group["params"][index].ndim != 2 or not self._is_hidden(name)].append(index)
            for indices, chosen in zip(of_each, (hidden, others), strict=True):
                if indices:
                    lists = {key: [group[key][i] for i in indices] for key in ("params", "param_names")}
                    chosen.append({**group, **lists})
        return MuonBesideAdamW(self, hidden, others)

    def _is_hidden(self, name: str) -> bool:
        return any(fnmatchcase(name, pattern) for pattern in self.hidden)


class MuonBesideAdamW(Optimizer):
    """Both rules as one torch optimizer: one list of groups, one state."""

    def __init__(self, rule: Muon, hidden: list[dict[str, Any]], others: list[dict[str, Any]]) -> None:
        if not hidden:
            raise UserError(
                "no matrix is hidden, so Muon would have nothing to do",
                where="optim.rule.hidden",
                why=f"none of {', '.join(rule.hidden)} is the name of a trainable matrix",
                fix="correct the patterns, or optim.rule.kind=adamw",
            )
        for group in hidden:
            group["weight_decay"] = rule.weight_decay * group["decay_multiplier"]
        self._rule = rule
        self._hidden = hidden
        self._beside = rule.beside.build(others) if others else None
        super().__init__([*hidden, *(self._beside.param_groups if self._beside else [])], {"lr": 0.0})
        if self._beside:
            self._beside.state = self.state  # one state: whoever saves it need not know of two rules

    @torch.no_grad()
    def step(self, closure: Any = None) -> Any:
        assert closure is None, "the engine runs forward and backward"
        for group in self._hidden:
            self._update(group)
        if self._beside:
            self._beside.step()

    def _update(self, group: dict[str, Any]) -> None:
        rule, rate = self._rule, group["lr"]
        for parameter in group["params"]:
            if parameter.grad is None:
                continue
            state = self.state[parameter]
            if not state:
                state["momentum_buffer"] = torch.zeros_like(parameter)
            momentum = state["momentum_buffer"].lerp_(parameter.grad, 1.0 - rule.momentum)
            direction = parameter.grad.lerp(momentum, rule.momentum) if rule.nesterov else momentum
            dtype = DTYPES[resolve(rule.orthogonalise_in, parameter.device)]
            direction = orthogonalised(direction, rule.iterations, dtype)
            parameter.mul_(1.0 - rate * group["weight_decay"])
            parameter.add_(direction, alpha=-rate * RMS * math.sqrt(max(parameter.shape)))


def orthogonalised(matrix_RC: Tensor, iterations: int, dtype: torch.dtype) -> Tensor:
    """About the nearest matrix with orthogonal rows or columns: all singular values pushed towards 1.

    Newton-Schulz iteration of X -> aX + b(XX')X + c(XX')(XX')X, in `dtype`, or in float64 for float64. A zero
    matrix stays zero.
    """
    a, b, c = COEFFICIENTS
    # The shorter side first: the products are with X X', which is then the smaller of the two Gram matrices.
    x = matrix_RC.T if matrix_RC.shape[0] > matrix_RC.shape[1] else matrix_RC
    x = x / x.norm().clamp(min=1e-30)  # Frobenius: no singular value is above 1, as the quintic needs it
    x = x.to(torch.float64 if x.dtype == torch.float64 else dtype)
    for _ in range(iterations):
        gram = x @ x.T
        x = torch.addmm(x, torch.addmm(gram, gram, gram, beta=b, alpha=c), x, beta=a)
    return x.T if matrix_RC.shape[0] > matrix_RC.shape[1] else x
