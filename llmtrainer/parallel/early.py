"""What happens to gradients while the backward pass still makes others: nothing until its end, or updates at once."""

from __future__ import annotations

import threading
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from llmtrainer.base.errors import UserError
from llmtrainer.core.protocols import Rule

if TYPE_CHECKING:
    from torch._C._distributed_c10d import GradBucket

Sum = torch.futures.Future[Tensor]
Reduce = Callable[["GradBucket"], Sum]


def require_early(precision: str) -> None:
    """Refuse what cannot be decided before all gradients are there."""
    if precision == "float16":
        raise UserError(
            "float16 cannot update during backward", where="engine.step_in_backward, precision",
            why="a step is given up where any gradient overflows, and the last one is known last",
            fix="precision=bfloat16, or engine.step_in_backward=false",
        )


class EarlySteps:
    """Runs a rule on some parameters at a time. An element's update depends on its own tensor's gradient, so that all
    together are the update of one step at the end."""

    def __init__(self, rule: Rule, groups: Sequence[Mapping[str, Any]]) -> None:
        # The optimizer sees stand-ins that share the parameters' memory: theirs are the gradients of now, and what
        # autograd has begun to gather for others is not looked at.
        self._stand_ins = {
            id(parameter): (place, nn.Parameter(parameter.detach()))
            for place, parameter in enumerate(each for group in groups for each in group["params"])
        }
        self.optimizer: Optimizer = rule.build([
            {**group, "params": [self._stand_ins[id(each)][1] for each in group["params"]]} for group in groups
        ])  # fmt: skip
        self._rate: float | None = None
        self._squares: dict[int, float] = {}
        # Gradients are added up by several threads of gloo.
        self._one_at_a_time = threading.Lock()

    def begin(self, learning_rate: float) -> None:
        """From here on, gradients are those of a step with this rate. Before and after, they change nothing."""
        self._rate = learning_rate
        self._squares.clear()
        for group in self.optimizer.param_groups:
            group["lr"] = learning_rate * group["rate_multiplier"]

    def end(self) -> None:
        self._rate = None

    @property
    def squares(self) -> float:
        """Sum of squares of all gradients of the step, in the parameters' order, whichever came first."""
        return sum(square for _, square in sorted(self._squares.items()))

    def update(self, gradients: Sequence[tuple[Tensor, Tensor]]) -> bool:
        """Update these parameters by their final gradients; False, and nothing done, outside a step."""
        if self._rate is None:
            return False
        with self._one_at_a_time:
            chosen = [(*self._stand_ins[id(parameter)], parameter, gradient) for parameter, gradient in gradients]
            for place, stand_in, parameter, gradient in chosen:
                stand_in.data, stand_in.grad = parameter.detach(), gradient     # torch may have moved the values
                self._squares[place] = float(torch.linalg.vector_norm(gradient, dtype=torch.float64)) ** 2
            self.optimizer.step()
            for _, stand_in, _, _ in chosen:
                stand_in.grad = None
        return True


class AtTheEnd:
    """Buckets of gradients that wait for the last one of the backward pass, and are then added up in their order."""

    def __init__(self, device: torch.device) -> None:
        self._devices: list[int | str | torch.device] = [device] if device.type == "cuda" else []
        self._waiting: list[tuple[GradBucket, Reduce, Sum]] = []

    def add(self, bucket: GradBucket, reduce: Reduce) -> Sum:
        """What the bucket will be once it is added up."""
        promised: Sum = torch.futures.Future(devices=self._devices)
        self._waiting.append((bucket, reduce, promised))
        if bucket.is_last():
            waiting, self._waiting = self._waiting, []
            for each, add_up, found in waiting:
                add_up(each).then(partial(_keep, found))
        return promised


def _keep(promised: Sum, done: Sum) -> None:
    promised.set_result(done.value())
