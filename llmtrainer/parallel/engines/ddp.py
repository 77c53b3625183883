"""One model on every process: gradients are added up while the backward pass still runs (PyTorch's DDP)."""

from __future__ import annotations

import warnings
import weakref
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from functools import partial
from typing import TYPE_CHECKING, Any, cast

import torch
import torch.distributed as dist
from pydantic import Field
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from llmtrainer.base.errors import UserError
from llmtrainer.core.arrangement import Arranged
from llmtrainer.core.batch import Batch, Outputs
from llmtrainer.core.protocols import Rule
from llmtrainer.parallel.courier import Courier
from llmtrainer.parallel.early import AtTheEnd, EarlySteps, require_early
from llmtrainer.parallel.exact import ExactSums
from llmtrainer.parallel.hook import Bucket, Hook
from llmtrainer.parallel.hooks.none import NoHook
from llmtrainer.parallel.joined import Joined, JoinedEngine

if TYPE_CHECKING:
    from torch._C._distributed_c10d import GradBucket

_NONE = NoHook()


class Ddp(Joined):
    """Data parallel (Li 2020, arXiv:2006.15704): each process has the whole model and its share of every step. What a
    step learns is what one process would learn from all of it; start one process a device with `llmtrainer launch`."""

    bucket_mib: float = Field(default=25.0, gt=0.0)
    """Gradients are added up in pieces of this size, each as soon as backward has made it. Smaller pieces overlap
    more and cost more messages."""

    find_unused_parameters: bool = False
    """Look in every step for parameters that took no part: needed where a step may leave some out, as a gated mixture
    of adapters does; costs a walk over the graph."""

    hook: Hook = _NONE
    """What gradients go through on their way to the other processes: `{kind: bf16}` halves what is sent, `{kind:
    powersgd}` sends a small part of it."""

    overlap_reduce: bool = True
    """Add gradients up while backward goes on. False: all of them when it has ended, in the same pieces and with the
    same numbers; for measuring what the overlap saves."""

    step_in_backward: bool = False
    """Update a bucket's parameters as soon as its gradients are added up, while backward goes on. Not with optim.clip,
    which needs all gradients first, and not in float16."""

    def start(self, precision: str) -> DdpEngine:
        return DdpEngine(**self._settings(precision))

    def _settings(self, precision: str) -> dict[str, Any]:
        """What the engine is made of; meets the other processes."""
        if self.step_in_backward:
            require_early(precision)
        if self.exact and not isinstance(self.hook, NoHook):
            raise UserError(
                f"the hook `{self.hook.kind}` adds gradients up in an order of its own",
                where="engine.hook, engine.exact", why="what it rounds depends on the number of processes",
                fix="engine.hook={kind: none}, or engine.exact=false",
            )
        device, told = self._ready(precision)
        self.hook.require(precision, self.step_in_backward)
        world = self._met(device)
        return {
            "device": device, "precision": precision, "world": world, "bucket_mib": self.bucket_mib,
            "find_unused": self.find_unused_parameters, "overlap": self.overlap_reduce,
            "hook": self.hook, "early": self.step_in_backward, "compile": self.compile,
            "cuda_graphs": self.cuda_graphs and not told, "told": told, "arrangement": self.arrangement(),
            "exact": self.sums(world.rank, world.size),
        }


class DdpEngine(JoinedEngine):
    """A JoinedEngine whose gradients are those of all ranks: what follows backward is the same arithmetic on every
    rank, on the same numbers, so weights and optimizer stay equal without being exchanged."""

    def __init__(
        self, device: torch.device, precision: str, *, bucket_mib: float, find_unused: bool, hook: Hook = _NONE,
        overlap: bool = True,
        **settings: Any,    # those of JoinedEngine
    ) -> None:
        super().__init__(device, precision, **settings)
        self._bucket_mib, self._find_unused = bucket_mib, find_unused
        self._at_the_end = None if overlap else AtTheEnd(device)
        # Gradients as they are need nobody who carries them: sums in any order, one a bucket, cannot cross.
        self._courier = None if isinstance(hook, NoHook) else Courier(hook, device, self.rank, self.world_size)
        self.collectives = 0
        """Buckets of gradients sent so far."""

    def prepare(self, policy: nn.Module, rule: Rule, groups: Sequence[Mapping[str, Any]]) -> Arranged:
        arranged = super().prepare(policy, rule, groups)
        self._named = dict(policy.named_parameters())
        self._name_of: dict[Tensor, str] = {parameter: name for name, parameter in self._named.items()}
        module = cast(nn.Module, self._forward)
        self._places = {id(parameter): place for place, parameter in enumerate(self._parameters)}
        # Its new name is not known to the oldest torch that we run on.
        warnings.filterwarnings("ignore", "`broadcast_buffers` is deprecated", FutureWarning)
        self._replica = DistributedDataParallel(
            module, broadcast_buffers=False, bucket_cap_mb=self._bucket_mib,
            find_unused_parameters=self._find_unused, gradient_as_bucket_view=True,
        )
        self._early = EarlySteps(rule, groups) if self.updates_in_backward else None
        if self._early is not None:
            self._optimizer = self._early.optimizer
        # What DDP holds in C++ no garbage collection sees: an engine that it held would never be freed, nor its model.
        engine = weakref.proxy(self)
        # Unannotated: torch compares annotations with types, and here they are text.
        self._replica.register_comm_hook(None, lambda state, bucket: engine._take(bucket))
        if self._courier is None:
            return arranged
        return arranged._replace(fallbacks=arranged.fallbacks + self._courier.exchange.fallbacks)

    def micro(self, last: bool) -> AbstractContextManager[None]:
        return nullcontext() if last else self._replica.no_sync()

    def forward(self, batch: Batch, wants: tuple[str, ...]) -> Outputs:
        if not torch.is_grad_enabled():
            return super().forward(batch, wants)
        try:
            out: Outputs = self._replica(self._entered(batch).to(self.device), wants)
        except RuntimeError as error:
            raise _explained(error) from error
        return out

    def backward(self, loss: Tensor) -> None:
        super().backward(loss)
        if self._courier is not None:
            self._courier.require_delivered()

    def clip(self, max_norm: float | None) -> Tensor:
        if self._courier is not None:
            self._courier.exchange.collect(self._named)
        return super().clip(max_norm)

    def discard(self) -> None:
        super().discard()
        if self._early is not None:
            self._early.end()
            for parameter in self._parameters:
                parameter.grad = None
        if self._courier is not None:
            self._courier.exchange.release(self._named)

    def told(self) -> dict[str, float]:
        return {} if self._courier is None else self._courier.told()

    def state(self) -> dict[str, Tensor]:
        return super().state() | ({} if self._courier is None else self._courier.state())

    def load_state(self, state: Mapping[str, Tensor]) -> None:
        super().load_state(state)
        if self._courier is not None:
            self._courier.load_state(state)
            self._courier.exchange.release(self._named)

    def close(self) -> None:
        if self._courier is not None:
            self._courier.close()
        super().close()

    def _finish(self, exact: ExactSums) -> None:
        exact.require_shards()
        exact.forget()      # what backward's last buckets left in the parameters is the sum

    def _take(self, bucket: GradBucket) -> torch.futures.Future[Tensor]:
        """Have a bucket of gradients added up, now or at the end of backward, and what follows from it done."""
        added = self._reduce(bucket) if self._at_the_end is None else self._at_the_end.add(bucket, self._reduce)
        if self._early is None:
            return added
        return added.then(partial(self._early_update, bucket.parameters(), bucket.gradients()))

    def _early_update(
        self, parameters: list[Tensor], gradients: list[Tensor], added: torch.futures.Future[Tensor]
    ) -> Tensor:
        assert self._early is not None
        buffer = added.value()
        self._early.update(list(zip(parameters, gradients, strict=True)))
        return buffer

    def _reduce(self, bucket: GradBucket) -> torch.futures.Future[Tensor]:
        # A sum and not DDP's mean: the loss is divided by what all ranks counted together.
        self.collectives += 1
        if self._courier is not None:
            names = tuple(self._name_of[parameter] for parameter in bucket.parameters())
            scale = 1.0 if self._loss_scale is None else self._loss_scale.scale
            tensors = tuple(bucket.gradients())
            return self._courier.carry(Bucket(bucket.buffer(), names, tensors, self._updates, scale))
        if self._exact is not None:
            places = [self._places[id(parameter)] for parameter in bucket.parameters()]
            self._exact.reduce(bucket.buffer(), bucket.gradients(), places)
            done: torch.futures.Future[Tensor] = torch.futures.Future()
            done.set_result(bucket.buffer())
            return done
        work = dist.all_reduce(bucket.buffer(), async_op=True)
        return work.get_future().then(lambda done: done.value()[0])


def _explained(error: RuntimeError) -> Exception:
    """DDP's complaint about parameters without a gradient, for people; any other error as it is."""
    if "finished reduction" not in str(error):
        return error
    return UserError(
        "some parameters took no part in a step", where="engine.kind=ddp",
        why="their gradients were waited for and never came",
        fix="engine.find_unused_parameters=true, or freeze them: model.freeze=['PATTERN']",
    )
