"""Where a process's memory goes: parameters, gradients, optimizer state, and what a forward pass keeps for backward."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from llmtrainer.core.batch import Batch
from llmtrainer.core.objective import Objective
from llmtrainer.core.pieces import own
from llmtrainer.core.protocols import Annotator, Engine, Rule, annotated
from llmtrainer.optim.groups import group

MANY = 2**20
"""Elements of a tensor beyond which its state is worked out from two tensors of fewer rows."""


@dataclass(frozen=True)
class Memory:
    """Bytes of one process. What torch itself and other libraries take comes on top."""

    parameters: int
    """Masters, and what is frozen."""
    gradients: int
    optimizer: int
    activations: int = 0
    """What the forward pass of a micro-batch keeps for backward."""

    @property
    def total(self) -> int:
        return self.parameters + self.gradients + self.optimizer + self.activations

    def text(self) -> str:
        named = {"parameters": self.parameters, "gradients": self.gradients, "optimizer": self.optimizer}
        parts = ", ".join(f"{name} {_mib(size)}" for name, size in named.items())
        return f"{_mib(self.total)} MiB at least: {parts}, activations of a micro-batch {_mib(self.activations)}"

    def of_each(self, engine: str, processes: int) -> Memory:
        """What each of several processes has, by the kind of their engine. The optimizer's state of zero1 is dealt out
        by whole tensors: the fullest may have the largest of them more than this."""
        state = self.optimizer if engine == "ddp" else -(-self.optimizer // processes)
        if engine != "fsdp2":
            return replace(self, optimizer=state)
        return replace(
            self, parameters=-(-self.parameters // processes), gradients=-(-self.gradients // processes),
            optimizer=state,
        )  # fmt: skip


def measured(
    engine: Engine, policy: nn.Module, objective: Objective, batch: Batch, annotators: Sequence[Annotator]
) -> Memory:
    """The memory of a policy that has been trained for a step, on this process; and of one micro-batch."""
    state = engine.state()
    batch = annotated(batch.to(engine.device), annotators)
    activations = kept_for_backward(
        lambda: objective.terms(engine.forward(batch, objective.wants), batch), policy.parameters()
    )
    trained = [parameter for parameter in policy.parameters() if parameter.requires_grad]
    return Memory(_bytes(policy.parameters()), _bytes(trained), _bytes(state.values()), activations)


def planned(named: Iterable[tuple[str, nn.Parameter]], rule: Rule) -> Memory:
    """The same of parameters that may have shapes alone (torch's meta device), without activations."""
    parameters = list(named)
    trained = [(name, parameter) for name, parameter in parameters if parameter.requires_grad]
    return Memory(
        _bytes(parameter for _, parameter in parameters), _bytes(parameter for _, parameter in trained),
        sum(_state_bytes(name, parameter, rule) for name, parameter in trained),
    )  # fmt: skip


def kept_for_backward(forward: Callable[[], object], parameters: Iterable[Tensor]) -> int:
    """Bytes of all that `forward` keeps for backward beside the parameters themselves, each storage once."""
    known = {parameter.untyped_storage().data_ptr() for parameter in parameters}
    kept: dict[int, int] = {}

    def keep(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in known:
            kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.enable_grad(), torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        made = forward()    # held until all is counted: what is freed may lie where something else lay
    del made
    return sum(kept.values())


def _state_bytes(name: str, parameter: nn.Parameter, rule: Rule) -> int:
    """What the rule keeps of a parameter: found by one step of a tensor of its shape. A large one's bytes grow with its
    rows as those of two small ones do."""
    shape, dtype = tuple(parameter.shape), parameter.dtype
    if parameter.numel() <= MANY or len(shape) < 2:
        return _stepped(name, shape, dtype, rule)
    few = max(MANY // 2 * shape[0] // parameter.numel(), 1)
    one, two = (_stepped(name, (rows, *shape[1:]), dtype, rule) for rows in (few, 2 * few))
    each, rest = divmod((shape[0] - few) * (two - one), few)
    return one + each + (rest > 0)


def _stepped(name: str, shape: Sequence[int], dtype: torch.dtype, rule: Rule) -> int:
    parameter = nn.Parameter(torch.zeros(shape, dtype=dtype))
    parameter.grad = torch.zeros(shape, dtype=dtype)
    optimizer = rule.build(group([(name, parameter)]))
    for chosen in optimizer.param_groups:
        chosen["lr"] = 0.0
    optimizer.step()
    return sum(_bytes(_tensors(state)) for state in optimizer.state.values())


def _tensors(state: Mapping[str, Any]) -> list[Tensor]:
    return [value for value in state.values() if isinstance(value, Tensor)]


def _bytes(tensors: Iterable[Tensor]) -> int:
    """Of this process's piece, where a tensor lies in pieces."""
    return sum(own(tensor).numel() * tensor.element_size() for tensor in tensors)


def _mib(size: int) -> str:
    return f"{size / 2**20:,.1f}"
