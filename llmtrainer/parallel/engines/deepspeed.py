"""DeepSpeed's ZeRO: optimizer state, gradients and weights divided among processes, or kept outside the device."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import fields
from typing import Any, Literal

import torch
from pydantic import Field
from torch import Tensor, nn

from llmtrainer.base.errors import UserError
from llmtrainer.core.arrangement import Arranged
from llmtrainer.core.batch import Batch, Outputs
from llmtrainer.core.protocols import Rule
from llmtrainer.parallel.divided_state import Divided, named_in
from llmtrainer.parallel.engines.single import UPDATES
from llmtrainer.parallel.joined import Joined, JoinedEngine
from llmtrainer.parallel.zero_settings import Place, Zero, engine_settings, is_installed

NAME = "engine.kind=deepspeed"


class Deepspeed(Joined):
    """ZeRO by DeepSpeed (Rajbhandari 2020, arXiv:1910.02054), `pip install 'llmtrainer[deepspeed]'`. Each process has
    its share of every step, as with ddp, and of what the stage divides. Weights and gradients stay float32; what is
    computed narrower is the model's business."""

    stage: Literal[0, 1, 2, 3] = 2
    """0 divides nothing; 1 the optimizer's state; 2 gradients too; 3 weights too, which are gathered where they are
    used."""

    offload_optimizer: Place = "none"
    """Keep the optimizer's state in the host's memory (cpu) or in files (nvme), and update there. From stage 1 on."""

    offload_parameters: Place = "none"
    """Keep weights there too while they are not used. Stage 3."""

    nvme_path: str | None = None
    """Folder on a fast disk for what is kept in files."""

    pin_memory: bool = False
    """Page-locked memory for what waits in the host's: faster copies, and none of it for others."""

    bucket_mib: float = Field(default=25.0, gt=0.0)
    """Size of the messages."""

    whole_below: int = Field(default=100_000, ge=0)
    """At stage 3, weights with fewer numbers stay whole on every process: norms, and not worth a message."""

    hpz_partition_size: int = Field(default=1, ge=1)
    """ZeRO++ (Wang 2023, arXiv:2306.10209): so many processes of a machine keep a second copy of the weights among
    them, so that backward asks no other machine. 1: none. Stage 3."""

    quantized_weights: bool = False
    """ZeRO++: gather weights as 8-bit numbers. Stage 3, CUDA; other last digits."""

    quantized_gradients: bool = False
    """ZeRO++: add gradients up as 4-bit numbers. Stage 3, CUDA; other last digits."""

    def start(self, precision: str) -> DeepspeedEngine:
        self._require(precision)
        device, told = self._ready(precision)
        zero = Zero(
            self.stage, self.offload_optimizer, self.offload_parameters, self.nvme_path, self.pin_memory,
            int(self.bucket_mib * 2**20) // 4, self.whole_below, device.type == "cuda", self.hpz_partition_size,
            self.quantized_weights, self.quantized_gradients,
        )  # fmt: skip
        _require_device(zero, device)
        return DeepspeedEngine(
            device, precision, world=self._met(device), zero=zero, told=told, arrangement=self.arrangement()
        )

    def _require(self, precision: str) -> None:
        """What can be refused before anybody is met."""
        if precision == "float64":
            raise _refused(
                "it knows no float64", "its optimizers keep float32", "precision=float32, or engine.kind=ddp"
            )
        if self.compile or self.cuda_graphs:
            raise _refused(
                "it neither compiles nor records the model", "its hooks on modules would be part of what is made",
                "engine.compile=false engine.cuda_graphs=false, or engine.kind=ddp",
            )
        if self.offload_optimizer != "none" and self.stage == 0:
            raise _refused("stage 0 keeps every optimizer whole", "only a share can be offloaded", "engine.stage=1")
        of_three = (
            self.offload_parameters != "none" or self.hpz_partition_size > 1 or self.quantized_weights
            or self.quantized_gradients
        )
        if of_three and self.stage != 3:
            raise _refused("only stage 3 divides weights", "nothing else can be kept elsewhere", "engine.stage=3")
        if "nvme" in (self.offload_optimizer, self.offload_parameters) and self.nvme_path is None:
            raise _refused("no folder is named for what is kept in files", None, "engine.nvme_path=/mnt/nvme")
        if not is_installed():
            raise _refused("DeepSpeed is not installed", None, "DS_BUILD_OPS=0 pip install 'llmtrainer[deepspeed]'")


class DeepspeedEngine(JoinedEngine):
    """A JoinedEngine whose gradients, state and weights lie where DeepSpeed has put them. Its state has the form of
    every other engine's: whole tensors by parameter, so that a run goes on with any number of processes."""

    def __init__(
        self, device: torch.device, precision: str, *, zero: Zero,
        **settings: Any,    # those of JoinedEngine
    ) -> None:
        super().__init__(device, precision, **settings)
        self._zero = zero
        self._idle: set[str] | None = None
        """Parameters that no step has changed, from stage 1 on; None before the first."""

    def prepare(self, policy: nn.Module, rule: Rule, groups: Sequence[Mapping[str, Any]]) -> Arranged:
        if self._zero.stage and not rule.elementwise:
            raise UserError(
                f"`{rule.kind}` looks at whole tensors, and each process has a part of them",
                where=f"optim.rule.kind, {NAME}", why="its updates would depend on the number of processes",
                fix="engine.kind=ddp, engine.stage=0, or optim.rule.kind=adamw",
            )
        library = _library()
        arranged = super().prepare(policy, rule, groups)
        self._groups = [dict(group) for group in groups]
        model = _Outside(policy, library.zero.register_external_parameter) if self._zero.stage == 3 else policy
        self._runtime, *_ = library.initialize(
            model=model, optimizer=self._optimizer, config=engine_settings(self._zero), dist_init_required=False
        )
        self._forward = self._runtime if model is policy else lambda *given: Outputs(**self._runtime(*given))
        self._divided = Divided(self._runtime.optimizer, self._zero.stage, self._groups) if self._zero.stage else None
        self._named = named_in(groups)
        for name, parameter in self._named.items():
            parameter.register_post_accumulate_grad_hook(self._noting(name))
        return arranged

    @contextmanager
    def micro(self, last: bool) -> Iterator[None]:
        self._runtime.set_gradient_accumulation_boundary(last)
        yield
        if not last:
            self._runtime.step()    # counts it, and adds its gradients to those before

    def backward(self, loss: Tensor) -> None:
        self._norm = None
        # DeepSpeed takes the mean over ranks, and the loss is already divided by what all of them counted.
        factor = float(self.world_size)
        if self._loss_scale is not None and self._divided is not None:
            self._divided.scale = self._loss_scale.scale
        elif self._loss_scale is not None:
            factor *= self._loss_scale.scale
        self._runtime.backward(loss * factor)

    def clip(self, max_norm: float | None) -> Tensor:
        """As every engine's; from stage 1 on by DeepSpeed, in the update itself."""
        assert self._norm is None, "these gradients are already clipped"
        # DeepSpeed has made them gradients of zeros, by which a rule would still decay them.
        unused = self._unused(self._named)
        if self._divided is None:
            for name in unused:
                self._named[name].grad = None
            return super().clip(max_norm)
        self._require_idle(unused)
        self._divided.keep(unused)
        self._norm = self._divided.norm()
        self._divided.limit(max_norm, float(self._norm))
        return self._norm

    def _require_idle(self, unused: set[str]) -> None:
        """Refuse parameters that take part in some steps only: each of them would have a number of updates of its own,
        and DeepSpeed counts one for all."""
        changed = set() if self._idle is None else self._idle ^ unused
        if changed:
            raise UserError(
                f"{len(changed):,} parameters take part in some steps and not in others", where=NAME,
                why=f"DeepSpeed counts one number of updates for all; for example {min(changed)}",
                fix="engine.kind=fsdp2, engine.stage=0, or freeze them: model.freeze=['PATTERN']",
            )
        self._idle = unused

    def _update(self) -> None:
        if self._divided is None:
            super()._update()
        else:
            self._runtime.step()

    def _updated(self) -> None:
        if self._divided is None:
            super()._updated()
        else:
            self._norm = None       # its step has cleared the gradients itself
            self._took_part.clear()

    def discard(self) -> None:
        self._took_part.clear()
        if self._divided is None:
            super().discard()
        else:
            self._divided.discard()
            self._norm = None

    def weights(self, policy: nn.Module) -> dict[str, Tensor]:
        with self.whole(policy):
            found = super().weights(policy)
            return {name: value.clone() for name, value in found.items()} if self._zero.stage == 3 else found

    @contextmanager
    def whole(self, policy: nn.Module) -> Iterator[None]:
        """Every process has all weights, and what rank 0 writes into them stays."""
        if self._zero.stage < 3 or policy is not self._policy:
            yield
            return
        with _library().zero.GatheredParameters(list(policy.parameters()), modifier_rank=0):
            yield

    def readable(self, policy: nn.Module) -> AbstractContextManager[None]:
        return self.whole(policy)

    def state(self) -> dict[str, Tensor]:
        if self._divided is None:
            return super().state()
        state = {UPDATES: torch.tensor(self._updates, dtype=torch.int64)}
        if self._loss_scale is not None:
            state |= self._loss_scale.state()
        return state | (self._divided.read(self._idle or set()) if self._updates else {})

    def load_state(self, state: Mapping[str, Tensor]) -> None:
        if self._divided is None:
            super().load_state(state)
            return
        # Put into an optimizer of whole tensors first, which refuses what does not fit before anything is changed.
        divided, self._optimizer = self._optimizer, self._divided.stand_in(self._rule)
        try:
            super().load_state(state)
            whole = self._optimizer
        finally:
            self._optimizer = divided
        if self._updates:
            self._idle = self._divided.write(whole)
        else:
            self._idle = None
            self._divided.clear()

    def close(self) -> None:
        self._runtime.destroy()     # whose hooks and lists keep the model else
        super().close()


class _Outside(nn.Module):
    """A policy whose outputs DeepSpeed can look into: from them it learns when backward begins, and so when the
    weights have to be there that are used outside of modules' own calls, such as a tied head's."""

    def __init__(self, policy: nn.Module, register: Callable[[nn.Module, nn.Parameter], None]) -> None:
        super().__init__()
        self.policy = policy
        self._register = register
        self._registered = False

    def forward(self, batch: Batch, wants: tuple[str, ...]) -> dict[str, Any]:
        if not self._registered:
            self._registered = True
            for parameter in self.policy.parameters():
                self._register(self, parameter)
        out = self.policy(batch, wants)
        return {item.name: getattr(out, item.name) for item in fields(out)}


def _library() -> Any:
    """DeepSpeed, quiet, on the process group that is already there."""
    import deepspeed
    import deepspeed.ops
    from deepspeed.utils import groups

    logging.getLogger("DeepSpeed").setLevel(logging.ERROR)
    # On a CPU it would compile an operator in C++ now, and wait for ever for a lock that a killed process left.
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    groups._WORLD_GROUP = None      # of an engine before this one in this process
    deepspeed.init_distributed(verbose=False, dist_init_required=False)
    return deepspeed


def _require_device(zero: Zero, device: torch.device) -> None:
    if device.type != "cuda" and (zero.quantized_weights or zero.quantized_gradients):
        raise _refused("quantized messages need CUDA", f"the device is {device}", "engine.quantized_weights=false")
    if "nvme" in (zero.optimizer, zero.parameters):
        from deepspeed.ops.op_builder import AsyncIOBuilder

        if not AsyncIOBuilder().is_compatible(verbose=False):
            raise _refused(
                "files cannot be read and written beside the computation here",
                "DeepSpeed's async_io operator needs libaio and a compiler",
                "apt-get install libaio-dev, or engine.offload_optimizer=cpu",
            )


def _refused(what: str, why: str | None, fix: str) -> UserError:
    return UserError(what, where=NAME, why=why, fix=fix)
