"""Gradients and optimizer state that DeepSpeed has divided among processes, read and written as whole tensors."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from llmtrainer.core.protocols import Rule
from llmtrainer.parallel.optimizer_state import PREFIX, UNTOUCHED


class Divided:
    """DeepSpeed's optimizer of stage 1, 2 or 3, over the parameters of `groups` as they were before it took them."""

    def __init__(self, zero: Any, stage: int, groups: Sequence[Mapping[str, Any]]) -> None:
        self._zero, self._stage, self._groups = zero, stage, groups
        self._shapes = {name: _shape(parameter) for name, parameter in named_in(groups).items()}
        self._kept: set[str] = set()
        self._held: dict[str, Tensor] = {}
        # DeepSpeed's updates are of flat tensors: what is to stay in one of them is put back before it is sent.
        zero.optimizer.register_step_pre_hook(lambda *_: self._hold())
        zero.optimizer.register_step_post_hook(lambda *_: self._put_back())

    @property
    def scale(self) -> float:
        """Factor on the loss, which the update takes out again."""
        return float(self._zero.loss_scaler.cur_scale)

    @scale.setter
    def scale(self, value: float) -> None:
        self._zero.loss_scaler.cur_scale = value

    def norm(self) -> Tensor:
        """L2 norm of the whole gradient without the scale, float64; infinite where a part of it is not finite."""
        if self._stage == 3:
            parts = [float(part) for part in self._zero._get_norm_groups()]
        else:
            parts = [float(self._zero.scaled_global_norm())]
        found = torch.linalg.vector_norm(torch.tensor(parts, dtype=torch.float64)) / self.scale
        # DeepSpeed says -1 for what is not finite.
        return found if min(parts) >= 0.0 else torch.full_like(found, torch.inf)

    def limit(self, max_norm: float | None, norm: float) -> None:
        """Clip gradients of this norm in the next update."""
        if max_norm is None or norm == 0.0:
            self._zero.clip_grad = 0.0
        else:
            # DeepSpeed divides by (norm + 1e-6) / limit; no other engine adds anything.
            self._zero.clip_grad = max_norm * (norm + 1e-6) / norm

    def discard(self) -> None:
        """Clear the gradients by DeepSpeed's own way with an overflow: a norm that is none makes its step do just
        that."""
        name = "_get_norm_groups" if self._stage == 3 else "scaled_global_norm"
        answer = torch.tensor(-1.0)
        setattr(self._zero, name, lambda *_: [answer] if self._stage == 3 else answer)
        try:
            self._zero.step()
        finally:
            delattr(self._zero, name)
        assert self._zero.overflow, "DeepSpeed made a step that was to be left out"

    def keep(self, names: set[str]) -> None:
        """Leave these parameters as they are in the next update."""
        self._kept = names

    def _hold(self) -> None:
        named = named_in(self._groups)
        pieces = {name: self._piece(named[name]) for name in self._kept}
        self._held = {name: piece.clone() for name, piece in pieces.items() if piece is not None}

    def _put_back(self) -> None:
        named, held = named_in(self._groups), self._held
        self._held = {}
        for name, values in held.items():
            if self._stage == 3:
                from deepspeed.utils import safe_set_local_fp32_param

                safe_set_local_fp32_param(named[name], values)
            elif (piece := self._piece(named[name])) is not None:
                piece.copy_(values)

    def _piece(self, parameter: nn.Parameter) -> Tensor | None:
        """This process's share of a parameter's master; None if it has none."""
        if self._stage < 3:
            place = parameter._hp_mapping       # type: ignore[attr-defined]  # DeepSpeed's
            return None if place is None else place.get_hp_fragment().detach()
        from deepspeed.utils import safe_get_local_fp32_param

        return safe_get_local_fp32_param(parameter)

    def read(self, untouched: set[str]) -> dict[str, Tensor]:
        """`optimizer.<parameter>.<what>`, whole; `untouched`: of these there is none. Every rank asks."""
        from deepspeed.utils import safe_get_full_optimizer_state

        self._link()
        kept = next(iter(self._zero.optimizer.state.values()))
        found = {}
        for name, parameter in named_in(self._groups).items():
            if name in untouched:
                found[f"{PREFIX}{name}.{UNTOUCHED}"] = torch.ones((), dtype=torch.bool)
                continue
            for what, value in kept.items():
                whole = value.detach().clone() if not value.ndim else safe_get_full_optimizer_state(parameter, what)
                found[f"{PREFIX}{name}.{what}"] = whole.reshape(self._shapes[name]) if value.ndim else whole
        return found

    def stand_in(self, rule: Rule) -> Optimizer:
        """An optimizer of whole tensors on the CPU, for a state to be put into."""
        groups = []
        for group in self._groups:
            empty = [nn.Parameter(torch.zeros(self._shapes[name])) for name in group["param_names"]]
            groups.append({**group, "params": empty})
        return rule.build(groups)

    def clear(self) -> None:
        """Take the weights as they are now, and no state."""
        self._zero.refresh_fp32_params()
        self._zero.optimizer.state.clear()

    def write(self, whole: Optimizer) -> set[str]:
        """Take the weights as they are now, and the state from an optimizer of whole tensors. Returns the parameters
        that have none."""
        from deepspeed.utils import safe_set_full_optimizer_state

        self.clear()
        named = {name: dict(whole.state[parameter]) for name, parameter in named_in(whole.param_groups).items()}
        sample = next(state for state in named.values() if state)
        for flat in self._flats():
            self._zero.optimizer.state[flat] = {
                what: torch.zeros_like(flat) if value.ndim else value.clone() for what, value in sample.items()
            }
        self._link()
        for name, parameter in named_in(self._groups).items():
            for what, value in named[name].items():
                if value.ndim:
                    safe_set_full_optimizer_state(parameter, value.to(torch.float32), what)
        return {name for name, state in named.items() if not state}

    def _flats(self) -> list[Tensor]:
        """This process's share of the masters, a flat tensor a group."""
        flats = "fp32_partitioned_groups_flat" if self._stage == 3 else "single_partition_of_fp32_groups"
        return list(getattr(self._zero, flats))

    def _link(self) -> None:
        """Let DeepSpeed find each parameter's piece in the state as it is now."""
        if self._stage < 3:
            self._zero._hp_optimizer_states_linked = False
            self._zero._lazy_init_hp_params_optimizer_state()


def named_in(groups: Sequence[Mapping[str, Any]]) -> dict[str, nn.Parameter]:
    """The parameters of an optimizer's groups by name."""
    return {
        name: parameter for group in groups
        for name, parameter in zip(group["param_names"], group["params"], strict=True)
    }  # fmt: skip


def _shape(parameter: nn.Parameter) -> torch.Size:
    return torch.Size(getattr(parameter, "ds_shape", parameter.shape))
