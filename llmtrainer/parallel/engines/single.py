"""One process, one device."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import fields
from typing import Any

import torch
from pydantic import Field
from torch import Tensor, nn
from torch.optim import Optimizer

from llmtrainer.base import process
from llmtrainer.base.errors import UserError
from llmtrainer.core.arrangement import Arranged, Arrangement
from llmtrainer.core.batch import Batch, Outputs
from llmtrainer.core.graphs import Graphs, Record
from llmtrainer.core.memory import keep_freed_memory
from llmtrainer.core.pieces import Writers
from llmtrainer.core.protocols import EngineConfig, Made, Rule
from llmtrainer.core.share import Share
from llmtrainer.parallel.device import find_device, require_compiler, require_graphs
from llmtrainer.parallel.exact import ExactSums, require_exact
from llmtrainer.parallel.loss_scale import LossScale
from llmtrainer.parallel.norm import exact_norm, global_norm, rows_of
from llmtrainer.parallel.optimizer_state import PREFIX, read_state, write_state

UPDATES = "engine.updates"
HOOK = "engine.hook."
"""Tensors of a hook, which belong to engines of several processes."""
_UNASKED = Arrangement()


class Single(EngineConfig):
    """One process on one device: a CPU, one CUDA card, or Apple's MPS."""

    device: str = "auto"
    """auto takes cuda where there is one, else mps, else cpu; or cpu, cuda, cuda:1, mps."""

    compile: bool = False
    """Compile the model with torch.compile: faster after a pause at the first step, other last digits."""

    cuda_graphs: bool = False
    """Record forward and backward of the stack for every size of micro-batch that comes twice, and replay them: the
    cost of launching kernels is paid once. Takes as much memory as the gradients once more."""

    deterministic: bool = False
    """Take kernels that give the same bits every time, where others would be faster: for runs on CUDA that end with
    the same bits when they are continued. On a CPU all of ours do. What has no such kernel stops with an error."""

    threads: int | None = Field(default=None, ge=1)
    """Processor threads of torch; left out, torch decides. Sums may round differently with another number."""

    exact: bool = False
    """Learn the same to the last bit however many processes take part, and however often the run is stopped and goes on
    with another number of them: sums are taken in one fixed order, with one thread a process."""

    virtual_shards: int = Field(default=8, ge=1)
    """Into how many parts `exact` cuts every step: as many processes may take part at most. Other parts, other bits."""

    def start(self, precision: str) -> SingleEngine:
        if process.world_size() > 1:
            raise UserError(
                f"{process.world_size():,} processes were started, and each of them would train alone",
                where="engine.kind", why="kind `single` is one process, and all would write to one run directory",
                fix="engine.kind=ddp, or start one process: llmtrainer train RECIPE.yaml",
            )
        device, told = self._ready(precision)
        return SingleEngine(
            device, precision, compile=self.compile, cuda_graphs=self.cuda_graphs and not told, told=told,
            arrangement=self.arrangement(), exact=self.sums(),
        )

    def sums(self, rank: int = 0, ranks: int = 1) -> ExactSums | None:
        """How gradients are added up, where that is asked for."""
        return ExactSums(self.virtual_shards, rank, ranks) if self.exact else None

    def _ready(self, precision: str) -> tuple[torch.device, tuple[str, ...]]:
        """This process's device, with threads and arithmetic set, and fallbacks for people."""
        device = find_device(self.device, precision)
        if self.exact:
            require_exact(device, self.threads)
            torch.set_num_threads(1)
        elif self.threads is not None:
            torch.set_num_threads(self.threads)
        if device.type == "cpu":
            keep_freed_memory()
        if device.type == "cuda" and device.index is not None:
            torch.cuda.set_device(device)       # where libraries look that are not told
        if self.compile:
            require_compiler(device)
        if self.deterministic:
            process.ask_cublas_for_equal_bits()
            torch.use_deterministic_algorithms(True)
        if precision in ("float32", "float64"):
            torch.set_float32_matmul_precision("highest")  # float32 means float32, not TF32
        return device, require_graphs(device, self.fallback) if self.cuda_graphs else ()


class SingleEngine:
    """Forward, backward, clip and update where nobody else takes part. Gradients and masters stay float32 or
    wider; what is computed narrower is the model's business, except for float16's loss scale."""

    rank: int = 0
    world_size: int = 1
    writers: Writers | None = None
    updates_in_backward: bool = False

    def __init__(
        self, device: torch.device, precision: str, *, compile: bool = False, cuda_graphs: bool = False,
        told: tuple[str, ...] = (), arrangement: Arrangement = _UNASKED, exact: ExactSums | None = None,
    ) -> None:
        self.device = device
        self._exact = exact
        self._arrangement = arrangement
        self._compile, self._graphs = compile, cuda_graphs
        self._told = told
        """Fallbacks of the engine's own choices, for people."""
        self._loss_scale = LossScale() if precision == "float16" else None
        self._updates = 0
        self._norm: Tensor | None = None
        """Norm of the gradients as they stand; None as long as a backward may still add to them."""

    @property
    def rescales(self) -> bool:
        return self._loss_scale is not None

    @property
    def share(self) -> Share:
        return Share((self.rank,), self.world_size) if self._exact is None else self._exact.share

    def prepare(self, policy: nn.Module, rule: Rule, groups: Sequence[Mapping[str, Any]]) -> Arranged:
        """Move the policy to the device, arrange how it computes there, and build the optimizer over `groups` (see
        optim/groups.py)."""
        policy.to(self.device)
        arranged = arrange(policy, self._arrangement, self._compile)
        arranged = arranged._replace(fallbacks=self._told + arranged.fallbacks)
        parameters = [parameter for group in groups for parameter in group["params"]]
        dtypes = {parameter.dtype for parameter in parameters}
        assert dtypes in ({torch.float32}, {torch.float64}), f"{dtypes} are no masters of one type"
        assert {id(parameter) for parameter in parameters} <= {id(parameter) for parameter in policy.parameters()}
        self._rule, self._policy = rule, policy
        self._parameters: list[nn.Parameter] = parameters
        self._forward: Callable[..., Outputs] = compiled(policy) if self._compile else policy
        self._optimizer: Optimizer = rule.build(groups)
        if not self._graphs:
            return arranged
        return arranged._replace(fallbacks=arranged.fallbacks + record(policy))

    def reader(self, policy: nn.Module) -> Callable[[Batch, tuple[str, ...]], Outputs]:
        """The forward pass of a policy that is only read, on the device and arranged as the trained one's: for equal
        weights it gives equal bits. It may be the trained policy itself."""
        forward = self._forward if policy is self._policy else self._arranged(policy)

        def read(batch: Batch, wants: tuple[str, ...]) -> Outputs:
            # A compiler fuses other kernels where no gradient is asked for, and those round differently.
            with torch.set_grad_enabled(self._compile):
                return detached(forward(batch.to(self.device), wants))

        return read

    def _arranged(self, policy: nn.Module) -> Callable[..., Outputs]:
        policy.to(self.device)
        arrange(policy, self._arrangement, self._compile)
        if not self._compile:
            policy.requires_grad_(False)
            return policy
        trained = {name: parameter.requires_grad for name, parameter in self._policy.named_parameters()}
        for name, parameter in policy.named_parameters():
            parameter.requires_grad_(trained.get(name, True))
        return compiled(policy)

    def begin(self, learning_rate: float) -> None:
        """Before the first micro-batch of a step: its rate, for engines that update during backward."""

    def micro(self, last: bool) -> AbstractContextManager[None]:
        return nullcontext()

    def forward(self, batch: Batch, wants: tuple[str, ...]) -> Outputs:
        return self._forward(self._entered(batch).to(self.device), wants)

    def _entered(self, batch: Batch) -> Batch:
        """The micro-batch, whose shard has begun if it is trained."""
        exact = self._exact if torch.is_grad_enabled() else None
        return batch if exact is None else exact.enter(batch, self._parameters)

    def backward(self, loss: Tensor) -> None:
        self._norm = None
        (loss if self._loss_scale is None else loss * self._loss_scale.scale).backward()

    def clip(self, max_norm: float | None) -> Tensor:
        """Global L2 norm before clipping, float64 and scalar; the gradients are clipped in place.

        A norm that is not finite is returned as it is and clips nothing: scaling by it would spread a single
        bad gradient over all parameters.
        """
        assert self._norm is None, "these gradients are already clipped"
        assert max_norm is None or max_norm > 0.0, max_norm
        if self._exact is not None:
            self._finish(self._exact)
        gradients = self._gradients()
        if self._loss_scale is not None and gradients:
            torch._foreach_mul_(gradients, 1.0 / self._loss_scale.scale)
        norm = self._norm = self._norm_of(gradients)
        if max_norm is not None and gradients:
            factor = torch.where(norm.isfinite(), (max_norm / norm).clamp(max=1.0), 1.0)
            torch._foreach_mul_(gradients, factor.to(gradients[0].dtype))
        return norm

    def step(self, learning_rate: float) -> bool:
        """Update with `learning_rate` times each group's own multiplier, and clear the gradients.

        False, with weights and optimizer untouched, if float16 gradients overflowed: the loss scale is then
        halved.
        """
        assert self._norm is not None, "clip comes first, with max_norm=None if nothing is to be clipped"
        if self._loss_scale is not None:
            if not bool(self._norm.isfinite()):
                self.discard()
                self._loss_scale.overflowed()
                return False
            self._loss_scale.updated()
        for group in self._optimizer.param_groups:
            group["lr"] = learning_rate * group["rate_multiplier"]
        self._update()
        self._updates += 1
        self._updated()
        return True

    def discard(self) -> None:
        self._optimizer.zero_grad(set_to_none=True)
        self._norm = None
        if self._exact is not None:
            self._exact.forget()

    def own_gradients(self, policy: nn.Module) -> list[Tensor | None]:
        return [parameter.grad for parameter in policy.parameters()]

    def _finish(self, exact: ExactSums) -> None:
        """The step's gradients over all shards, in the parameters."""
        exact.finish(self._parameters)

    def sum(self, numbers: Mapping[str, float]) -> dict[str, float]:
        return {name: float(number) for name, number in numbers.items()}

    def gather(self, values: Tensor) -> list[Tensor]:
        assert self.world_size == 1, "an engine of several processes gathers from all of them"
        return [values]

    def in_turn(self, work: Callable[[], Made]) -> Made:
        return work()

    def told(self) -> dict[str, float]:
        return {}

    def weights(self, policy: nn.Module) -> dict[str, Tensor]:
        return {name: parameter.detach() for name, parameter in policy.named_parameters()}

    def whole(self, policy: nn.Module) -> AbstractContextManager[None]:
        return nullcontext()

    def readable(self, policy: nn.Module) -> AbstractContextManager[None]:
        return nullcontext()

    def state(self) -> dict[str, Tensor]:
        """`optimizer.<parameter>.<what>` and `engine.<what>`. The optimizer's own tensors: the next step
        changes them, so whoever writes them in the background copies them first."""
        state = {UPDATES: torch.tensor(self._updates, dtype=torch.int64)}
        if self._loss_scale is not None:
            state |= self._loss_scale.state()
        return state | (read_state(self._optimizer, self._owns) if self._updates else {})

    def load_state(self, state: Mapping[str, Tensor]) -> None:
        """Continue from what `state` gave. Raises UserError, with nothing changed, if it is not all of it."""
        expected = {UPDATES} | (set() if self._loss_scale is None else set(self._loss_scale.state()))
        # A hook's tensors are its own: without one, or with another number of ranks, a run goes on without them.
        given = {name for name in state if not name.startswith((PREFIX, HOOK))}
        if given != expected:
            raise UserError(
                "the checkpoint's engine state is not this engine's",
                where=f"missing: {sorted(expected - given)}, left over: {sorted(given - expected)}",
                why="float16 keeps a loss scale, other precisions keep none",
                fix="continue with the precision and the engine that the checkpoint was made with",
            )
        updates = int(state[UPDATES])
        if updates:
            write_state(self._optimizer, self._rule, self._pieces_of(state), self._owns)
        elif any(name.startswith(PREFIX) for name in state):
            raise UserError(
                "the checkpoint's engine state says that it holds none of the optimizer's, and does",
                where=f"{UPDATES} is 0, beside tensors {PREFIX}*",
                fix="continue from another checkpoint",
            )
        else:
            self._optimizer.state.clear()
        self._updates = updates
        if self._loss_scale is not None:
            self._loss_scale.load_state(state)

    def close(self) -> None:
        torch.use_deterministic_algorithms(False)

    def _gradients(self) -> list[Tensor]:
        return [parameter.grad for parameter in self._parameters if parameter.grad is not None]

    def _norm_of(self, gradients: Sequence[Tensor]) -> Tensor:
        if self._exact is None:
            return global_norm(gradients, self.device)
        return exact_norm(lambda dtype: rows_of(gradients, dtype))

    def _update(self) -> None:
        self._optimizer.step()

    def _updated(self) -> None:
        """Clear the gradients that an update has used."""
        self.discard()

    def _owns(self, name: str) -> bool:
        """Whether this process keeps the optimizer's state of a parameter."""
        return True

    def _pieces_of(self, state: Mapping[str, Tensor]) -> Mapping[str, Tensor]:
        """Of whole tensors, what this process keeps."""
        return state


def detached(out: Outputs) -> Outputs:
    """What was computed, without the way there."""
    found: dict[str, Any] = {item.name: getattr(out, item.name) for item in fields(out)}
    for name, value in found.items():
        found[name] = value.detach() if isinstance(value, Tensor) else value
    return Outputs(**found)


def arrange(policy: nn.Module, asked: Arrangement, compile: bool = False) -> Arranged:
    """Have the policy compute as asked. Raises UserError if it cannot, and if it has no choice where one is asked."""
    seam: Callable[[Arrangement], Arranged] | None = getattr(policy, "arrange", None)
    if seam is not None:
        # A compiler fuses torch's norms and rotations with what is around them, and cannot look into Liger's.
        return seam(asked._replace(kernels="torch") if compile and asked.kernels == "auto" else asked)
    for name, value in asked._asdict().items():
        if value != getattr(_UNASKED, name):
            raise UserError(
                f"{type(policy).__name__} does not choose how it computes, and engine.{name} is {value}",
                where=f"engine.{name}",
                why="only a policy with a method `arrange` can do as it says",
                fix=f"remove engine.{name} from the recipe",
            )
    return Arranged()


def compiled(policy: nn.Module) -> Callable[..., Outputs]:
    """The policy, compiled: in the pieces it names itself, where it does, else as a whole."""
    pieces = getattr(policy, "compile_pieces", None)
    if pieces is None:
        return torch.compile(policy)
    pieces()
    return policy


def record(policy: nn.Module) -> tuple[str, ...]:
    """Have the policy recorded as CUDA graphs. Raises UserError if it cannot be."""
    seam: Callable[[Record], tuple[str, ...]] | None = getattr(policy, "record", None)
    if seam is None:
        raise UserError(
            f"{type(policy).__name__} cannot be recorded as CUDA graphs", where="engine.cuda_graphs",
            why="only a policy with a method `record` says which part of it waits for no tensor",
            fix="engine.cuda_graphs=false",
        )
    return seam(Graphs())
