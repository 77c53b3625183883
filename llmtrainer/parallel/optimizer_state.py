"""The state of any torch optimizer as named tensors, `optimizer.<parameter>.<what>`: no pickle, no gap."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from llmtrainer.base.errors import UserError
from llmtrainer.core.protocols import Rule

PREFIX = "optimizer."
UNTOUCHED = "untouched"
"""Stands for the state of a parameter that never had a gradient, so that its absence is no gap."""


def every(name: str) -> bool:
    return True


def read_state(optimizer: Optimizer, owned: Callable[[str], bool] = every) -> dict[str, Tensor]:
    """Every tensor the optimizer keeps, by parameter name; the tensors themselves, not copies. `owned`: of which
    parameters."""
    state: dict[str, Tensor] = {}
    for group in optimizer.param_groups:
        for name, parameter in zip(group["param_names"], group["params"], strict=True):
            if not owned(name):
                continue
            kept = optimizer.state.get(parameter, {})
            for what, value in kept.items():
                assert isinstance(value, Tensor), f"{what} of {type(optimizer).__name__} is no tensor"
                state[f"{PREFIX}{name}.{what}"] = value.detach()
            if not kept:
                state[f"{PREFIX}{name}.{UNTOUCHED}"] = torch.ones((), dtype=torch.bool)
    return state


def write_state(
    optimizer: Optimizer, rule: Rule, state: Mapping[str, Tensor], owned: Callable[[str], bool] = every
) -> None:
    """Put back what `read_state` gave, dtypes kept, as copies on the parameters' devices. `owned`: of which parameters;
    what belongs to others must be there too, but is not read.

    Raises UserError, before anything is changed, when a tensor is missing, left over, or of the wrong shape
    or dtype.
    """
    given = {name for name in state if name.startswith(PREFIX)}
    samples = _sample_states(optimizer, rule)
    loaded: list[tuple[nn.Parameter, dict[str, Tensor]]] = []
    missing: list[str] = []
    wrong: list[str] = []
    for group in optimizer.param_groups:
        for name, parameter in zip(group["param_names"], group["params"], strict=True):
            prefix = f"{PREFIX}{name}."
            if prefix + UNTOUCHED in given:
                given.discard(prefix + UNTOUCHED)
                continue
            kept: dict[str, Tensor] = {}
            for what, sample in samples[name].items():
                if prefix + what not in given:
                    missing.append(prefix + what)
                    continue
                given.discard(prefix + what)
                if not owned(name):
                    continue
                value = state[prefix + what]
                shape = rule.state_shape(what, parameter.shape) if sample.ndim else ()
                if value.shape != shape or value.dtype != sample.dtype:
                    found, needed = _form(value.dtype, value.shape), _form(sample.dtype, shape)
                    wrong.append(f"{prefix}{what} is {found}, not {needed}")
                    continue
                kept[what] = value.detach().to(sample.device, copy=True)
            if owned(name):
                loaded.append((parameter, kept))
    _require_fit(missing, sorted(given), wrong)
    optimizer.state.clear()
    for parameter, kept in loaded:
        optimizer.state[parameter] = kept


def _sample_states(optimizer: Optimizer, rule: Rule) -> dict[str, dict[str, Tensor]]:
    """What the rule keeps for each parameter: found by one update of small stand-ins, so that any rule can be
    asked and no weight is touched."""
    stand_ins: dict[str, nn.Parameter] = {}
    for group in optimizer.param_groups:
        for name, parameter in zip(group["param_names"], group["params"], strict=True):
            small = torch.zeros([2] * parameter.ndim, dtype=parameter.dtype, device=parameter.device)
            stand_ins[name] = nn.Parameter(small)
            stand_ins[name].grad = torch.zeros_like(small)
    groups = optimizer.param_groups
    sample = rule.build([{**group, "params": [stand_ins[name] for name in group["param_names"]]} for group in groups])
    sample.step()
    return {name: dict(sample.state[parameter]) for name, parameter in stand_ins.items()}


def _require_fit(missing: Sequence[str], left_over: Sequence[str], wrong: Sequence[str]) -> None:
    for names, what in (
        (missing, "lacks"),
        (left_over, "holds, but this run has no place for,"),
        (wrong, "holds in another form"),
    ):
        if names:
            shown = ", ".join(names[:3]) + (", ..." if len(names) > 3 else "")
            raise UserError(
                f"the optimizer's state {what} {len(names):,} tensor{'s' if len(names) > 1 else ''}",
                where=shown,
                why="a run continued with part of its state is another run",
                fix="continue with the model and optim settings of the checkpoint, or begin anew from its weights, "
                "with an optimizer that remembers nothing: run=runs/other model.start_from=CHECKPOINT",
            )


def _form(dtype: torch.dtype, shape: Sequence[int]) -> str:
    return f"{str(dtype).removeprefix('torch.')}{list(shape)}"
