"""What FSDP2 divides: a policy's blocks, and rows of the optimizer's tensors."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule

from llmtrainer.base.errors import UserError
from llmtrainer.core.pieces import first_row, own
from llmtrainer.core.protocols import Rule
from llmtrainer.parallel.optimizer_state import PREFIX


class OwnRows(Mapping[str, Tensor]):
    """Of the optimizer's whole tensors, this process's rows: each is cut when it is asked for."""

    def __init__(self, state: Mapping[str, Tensor], sharded: Mapping[str, Tensor]) -> None:
        self._state, self._sharded = state, sharded

    def __getitem__(self, name: str) -> Tensor:
        value, parameter = self._state[name], self._sharded.get(parameter_of(name))
        if parameter is None or value.shape != parameter.shape:
            return value    # a scalar, or what is refused for its shape
        return value.narrow(0, first_row(parameter), own(parameter).shape[0])

    def __iter__(self) -> Iterator[str]:
        return iter(self._state)

    def __len__(self) -> int:
        return len(self._state)


def unsent(units: Sequence[FSDPModule]) -> dict[int, Tensor]:
    """Whole gradients that wait for the last micro-batch of their step, by the id of the parameter in pieces."""
    found = {}
    for each in divided(units):
        own_one = each.unsharded_param.grad if hasattr(each, "_unsharded_param") else None
        waiting = each.unsharded_accumulated_grad if own_one is None else own_one
        if waiting is not None:
            found[id(each.sharded_param)] = waiting
    return found


def forget_unsent(units: Sequence[FSDPModule]) -> None:
    """Drop gradients of micro-batches whose step ends without its last one. torch keeps them for the next step."""
    for each in divided(units):
        each.unsharded_accumulated_grad = None
        if hasattr(each, "_unsharded_param"):
            each.unsharded_param.grad = None


def divided(units: Sequence[FSDPModule]) -> Iterator[Any]:
    """Torch's own record of each parameter that it has divided."""
    for unit in units:
        for group in unit._get_fsdp_state()._fsdp_param_groups:
            yield from group.fsdp_params


def parameter_of(name: str) -> str:
    """`optimizer.<parameter>.<what>` -> <parameter>."""
    return name.removeprefix(PREFIX).rpartition(".")[0]


def blocks_of(policy: nn.Module) -> list[nn.Module]:
    """What the policy names as its blocks, in order, by a method `blocks` of one of its modules. Each must be called
    for all that is computed with its parameters. UserError where none are named."""
    found = [block for module in policy.modules() for block in getattr(module, "blocks", list)()]
    if not found:
        raise UserError(
            f"{type(policy).__name__} does not say what its blocks are", where="engine.kind=fsdp2",
            why="blocks are what is gathered and let go; models of transformers' own classes name none here",
            fix="engine.kind=zero1, which divides the optimizer's state of any model",
        )
    return found


def require_even(policy: nn.Module) -> None:
    """Refuse a policy whose parameters may take part on one process and not on another."""
    if getattr(getattr(policy, "adapter", None), "gated", False):
        raise UserError(
            "a gated mixture needs all gradients of a step", where="engine.step_in_backward, model.adapter.kind",
            why="which adapters a step leaves out on every process is known at its end",
            fix="engine.step_in_backward=false",
        )


def require_elementwise(rule: Rule) -> None:
    if not rule.elementwise:
        raise UserError(
            f"`{rule.kind}` looks at whole tensors, and each process has some rows of them",
            where="optim.rule.kind, engine.kind=fsdp2", why="its updates would depend on the number of processes",
            fix="engine.kind=zero1, which divides whole tensors; or optim.rule.kind=adamw",
        )
