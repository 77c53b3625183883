"""The model itself divided: each process keeps a piece of every tensor, and blocks are whole only while they compute
(PyTorch's FSDP2)."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any, Literal

import torch
from pydantic import Field
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard

from llmtrainer.base.errors import UserError
from llmtrainer.core.arrangement import Arranged
from llmtrainer.core.batch import Batch, Outputs
from llmtrainer.core.pieces import first_row, is_piece, own, whole
from llmtrainer.core.precision import DTYPES
from llmtrainer.core.protocols import Rule
from llmtrainer.parallel.early import EarlySteps, require_early
from llmtrainer.parallel.engines.single import arrange, detached
from llmtrainer.parallel.exact import ExactPieces, ExactSums, require_plain
from llmtrainer.parallel.joined import Joined, JoinedEngine
from llmtrainer.parallel.norm import exact_norm, global_norm, rows_of
from llmtrainer.parallel.optimizer_state import PREFIX
from llmtrainer.parallel.units import (
    OwnRows,
    blocks_of,
    forget_unsent,
    parameter_of,
    require_elementwise,
    require_even,
    unsent,
)
from llmtrainer.parallel.writing import Pieces, on_mesh


class Fsdp2(Joined):
    """Fully sharded data parallel (Zhao 2023, arXiv:2304.11277; ZeRO stage 3, arXiv:1910.02054): weights, gradients and
    optimizer state are divided, row by row. A block is gathered before it computes and let go afterwards. For models
    that do not fit a device; costs half again as many messages as ddp."""

    reshard_after_forward: bool = True
    """Let go of a block's weights after its forward pass, and gather them again for its backward. False keeps them in
    between: fewer messages, and the whole model in memory once a step."""

    gather: Literal["masters", "compute"] = "masters"
    """The type in which weights travel. masters: as they are kept, and numbers equal every other engine's. compute: in
    the type of `precision`, half the bytes in 16 bits; norms are rounded to it too."""

    prefetch: int = Field(default=0, ge=0)
    """So many blocks ahead are gathered while one still computes. 0: one ahead, and in backward only. Each costs a
    block's memory."""

    overlap_reduce: bool = True
    """Gradients are added up while backward goes on: this engine has no other way."""

    step_in_backward: bool = False
    """Update each parameter as soon as its gradient is added up, which is then let go: no two blocks' gradients are
    ever there together. Not with optim.clip, which needs all of them first, and not in float16."""

    def start(self, precision: str) -> Fsdp2Engine:
        if not all(hasattr(FSDPModule, name) for name in ("reset_iter_state", "set_reduce_scatter_unused_params")):
            raise UserError(
                f"torch {torch.__version__} is too old for this engine", where="engine.kind=fsdp2",
                why="parameters that only some processes use would be added up wrongly",
                fix="pip install 'torch>=2.13', or engine.kind=zero1",
            )
        if not self.overlap_reduce:
            raise UserError(
                "fsdp2 adds gradients up while backward goes on", where="engine.overlap_reduce",
                why="a block's gradients are let go with the block, so none can wait for the end",
                fix="engine.overlap_reduce=true, or engine.kind=ddp",
            )
        if self.compile:
            raise UserError(
                "fsdp2 does not compile the model", where="engine.compile",
                why="compiled pieces are proved on weights that are whole before the first step, and here none are",
                fix="engine.compile=false, or engine.kind=zero1",
            )
        if self.cuda_graphs:
            raise UserError(
                "fsdp2 cannot be recorded as CUDA graphs", where="engine.cuda_graphs",
                why="recorded kernels read weights where they were, and a gathered block lies elsewhere each time",
                fix="engine.cuda_graphs=false, or engine.kind=zero1",
            )
        if self.step_in_backward:
            require_early(precision)
            if self.exact:
                raise UserError(
                    "exact sums are ready when the last shard is", where="engine.step_in_backward, engine.exact",
                    why="fsdp2 adds up pieces shard by shard, and none of them is the step's gradient before",
                    fix="engine.step_in_backward=false, or engine.exact=false",
                )
        device, told = self._ready(precision)
        world = self._met(device)
        return Fsdp2Engine(
            device, precision, world=world, reshard=self.reshard_after_forward, prefetch=self.prefetch,
            travel=DTYPES[precision] if self.gather == "compute" else None, early=self.step_in_backward,
            told=told, arrangement=self.arrangement(),
            exact=self.sums(world.rank, world.size),
        )

    def sums(self, rank: int = 0, ranks: int = 1) -> ExactSums | None:
        # Alone, torch sends nothing, and the gradients of a shard are there as they are elsewhere.
        kind = ExactSums if ranks == 1 else ExactPieces
        return kind(self.virtual_shards, rank, ranks) if self.exact else None


class Fsdp2Engine(JoinedEngine):
    """A JoinedEngine on pieces: the rule updates this process's rows of every tensor as if they were all, so that it
    must be one that looks at each number alone."""

    def __init__(
        self, device: torch.device, precision: str, *, reshard: bool, prefetch: int, travel: torch.dtype | None,
        **settings: Any,    # those of JoinedEngine
    ) -> None:
        super().__init__(device, precision, **settings)
        self._reshard, self._prefetch, self._travel = reshard, prefetch, travel
        self._whole = False
        """Whether every process has the whole policy just now."""
        self._unsent = False
        """Whether gradients wait for the last micro-batch of their step."""

    def prepare(self, policy: nn.Module, rule: Rule, groups: Sequence[Mapping[str, Any]]) -> Arranged:
        require_elementwise(rule)
        if self.updates_in_backward:
            require_even(policy)
        if self._exact is not None:
            require_plain(rule)
        masters = {parameter.dtype for group in groups for parameter in group["params"]}
        assert masters in ({torch.float32}, {torch.float64}), f"{masters} are no masters of one type"
        self._rule, self._policy, self._forward = rule, policy, policy
        self._units = self._divide(policy, masters.pop())
        arranged = arrange(policy, self._arrangement)
        arranged = arranged._replace(fallbacks=self._told + arranged.fallbacks)
        self.writers = Pieces(self.world)
        names = [name for group in groups for name in group["param_names"]]
        named = dict(policy.named_parameters())
        self._sharded = {name: named[name] for name in names}
        # The rule's own tensors: torch's operators on DTensors know few of what rules call.
        self._pieces = {name: nn.Parameter(own(each.detach())) for name, each in self._sharded.items()}
        self._parameters = list(self._pieces.values())
        of_pieces = [{**group, "params": [self._pieces[name] for name in group["param_names"]]} for group in groups]
        self._early = EarlySteps(rule, of_pieces) if self.updates_in_backward else None
        self._optimizer = rule.build(of_pieces) if self._early is None else self._early.optimizer
        for name, parameter in self._sharded.items() if self._early is not None else ():
            parameter.register_post_accumulate_grad_hook(self._stepping(name))
        self._watched: set[nn.Module] = set()
        return arranged

    def _divide(self, policy: nn.Module, master: torch.dtype) -> list[FSDPModule]:
        """Leave this process its rows of every tensor. Each block becomes a unit that is gathered by itself; the rest,
        embeddings and head, is one more."""
        blocks = blocks_of(policy)
        mesh = init_device_mesh(self.device.type, (self.world_size,))
        types = MixedPrecisionPolicy(
            param_dtype=None if self._travel == master else self._travel, reduce_dtype=master, cast_forward_inputs=False
        )
        for block in blocks:
            fully_shard(block, mesh=mesh, mp_policy=types, reshard_after_forward=self._reshard)
        fully_shard(policy, mesh=mesh, mp_policy=types, reshard_after_forward=False)
        units: list[FSDPModule] = [unit for unit in (*blocks, policy) if isinstance(unit, FSDPModule)]
        for unit in units:
            # Sums and not means: the loss is divided by what all ranks counted together. gloo knows no others.
            unit.set_gradient_divide_factor(1.0)
            unit.set_force_sum_reduction_for_comms(True)
            if isinstance(self._exact, ExactPieces):
                unit.set_custom_reduce_scatter(self._exact.reducer())    # type: ignore[arg-type]  # whose base is private
            if not self.updates_in_backward:
                # Processes may leave out different parameters, and must send the same sizes all the same.
                unit.set_reduce_scatter_unused_params(True)
                assert isinstance(unit, nn.Module)
                unit.register_forward_pre_hook(self._watch)
        self._prefetch_from(units)
        # Which unit is the root is else found out at the first forward, and a block may be read before that.
        units[-1]._get_fsdp_state()._lazy_init()
        return units

    def _prefetch_from(self, units: Sequence[FSDPModule]) -> None:
        """Which units are gathered while one computes: the next ones in forward, those before it in backward."""
        if not self._prefetch:
            return
        *blocks, root = units
        order = [root, *blocks]
        for index, unit in enumerate(order):
            unit.set_modules_to_forward_prefetch(order[index + 1 : index + 1 + self._prefetch])
            behind = blocks[::-1] if unit is root else blocks[: index - 1][::-1]
            unit.set_modules_to_backward_prefetch(behind[: self._prefetch])

    def reader(self, policy: nn.Module) -> Callable[[Batch, tuple[str, ...]], Outputs]:
        if policy is not self._policy:
            return super().reader(policy)       # another model is whole on every process

        @torch.no_grad()
        def read(batch: Batch, wants: tuple[str, ...]) -> Outputs:
            return detached(self.forward(batch, wants))

        return read

    def micro(self, last: bool) -> AbstractContextManager[None]:
        apart = not last and self._exact is None      # exact sums are of every micro-batch by itself
        self._units[-1].set_requires_gradient_sync(not apart)
        self._unsent = apart
        if isinstance(self._exact, ExactPieces):
            self._exact.ends = last
        return nullcontext()

    def forward(self, batch: Batch, wants: tuple[str, ...]) -> Outputs:
        with warnings.catch_warnings():
            # That outputs are views would matter if somebody wrote into them.
            warnings.filterwarnings("ignore", "FSDP2-wrapped module", UserWarning)
            out = super().forward(batch, wants)
        if not torch.is_grad_enabled() and not self._whole:
            # Nothing whole is left behind: whoever writes other values into the pieces must be read with them.
            for unit in self._units:
                unit.reshard()
        return out

    def discard(self) -> None:
        super().discard()
        self._took_part.clear()
        if self._unsent:
            forget_unsent(self._units)
            self._unsent = False
        for parameter in self._sharded.values():
            parameter.grad = None
        if self._early is not None:
            self._early.end()

    def own_gradients(self, policy: nn.Module) -> list[Tensor | None]:
        kept = unsent(self._units)
        return [kept.get(id(parameter), parameter.grad) for parameter in policy.parameters()]

    def weights(self, policy: nn.Module) -> dict[str, Tensor]:
        return {name: whole(parameter.detach()) for name, parameter in policy.named_parameters()}

    @contextmanager
    def whole(self, policy: nn.Module) -> Iterator[None]:
        """Memory for the whole model on every process."""
        assert policy is self._policy, "another model is whole already"
        *blocks, root = self._units
        for unit in (root, *blocks):
            unit.unshard()
            unit.set_reshard_after_forward(False, recurse=False)
        self._whole = True
        try:
            yield
        finally:
            self._whole = False
            # Blocks that one process has called alone would else be gathered by it alone in the next backward.
            root.reset_iter_state()
            for unit in self._units:
                unit.reshard()
                unit.set_reshard_after_forward(self._reshard and unit is not root, recurse=False)

    def state(self) -> dict[str, Tensor]:
        """As SingleEngine's; of what has a parameter's shape, this process's piece of the whole."""
        found = super().state()
        for name, value in found.items():
            if name.startswith(PREFIX) and value.ndim:
                like: Any = self._sharded[parameter_of(name)]      # a DTensor
                found[name] = on_mesh(value, like, like.device_mesh)
        return found

    def _gradients(self) -> list[Tensor]:
        # FSDP2 has made them gradients of zeros, by which a rule would still decay them.
        unused = self._unused(self._sharded)
        for name, parameter in self._sharded.items():
            piece, gradient = self._pieces[name], parameter.grad
            piece.data = own(parameter.detach())    # torch may have moved it
            piece.grad = None if gradient is None or name in unused else own(gradient)
        return [piece.grad for piece in self._parameters if piece.grad is not None]

    def _entered(self, batch: Batch) -> Batch:
        if self._exact is None or not torch.is_grad_enabled():
            return batch
        return self._exact.enter(batch, list(self._sharded.values()))

    def _finish(self, exact: ExactSums) -> None:
        exact.finish(list(self._sharded.values()))

    def _rows(self, dtype: torch.dtype | None) -> Tensor:
        """The norms of all rows of all gradients, whoever has them: each has one owner, and elsewhere counts 0."""
        found = []
        for name, parameter in self._sharded.items():
            gradient = self._pieces[name].grad
            if gradient is not None:
                each = 1 if parameter.ndim < 3 else parameter.shape[1:-1].numel()
                rows = torch.zeros(parameter.shape[0] * each, dtype=torch.float64, device=self.device)
                mine = rows_of([gradient], dtype)
                rows[first_row(parameter) * each :][: len(mine)] = mine
                found.append(rows)
        return self.world.sum_of(torch.cat(found)) if found else torch.zeros(0, dtype=torch.float64)

    def _norm_of(self, gradients: Sequence[Tensor]) -> Tensor:
        if self._exact is not None:
            return exact_norm(self._rows)
        mine = global_norm([gradient for gradient in gradients if gradient.numel()], self.device)
        return self._root(float(mine) ** 2)

    def _root(self, squares: float) -> Tensor:
        """As JoinedEngine's, of squares that every rank has a part of."""
        return super()._root(self.world.sum({"squares": squares})["squares"])

    def _pieces_of(self, state: Mapping[str, Tensor]) -> Mapping[str, Tensor]:
        return OwnRows(state, self._sharded)

    def _stepping(self, name: str) -> Callable[[Tensor], None]:
        early, piece = self._early, self._pieces[name]
        assert early is not None

        def step(parameter: Tensor) -> None:
            assert parameter.grad is not None
            piece.data = own(parameter.detach())
            if early.update([(piece, own(parameter.grad))]):
                parameter.grad = None

        return step

    def _watch(self, unit: nn.Module, inputs: Any) -> None:
        """Note, for each of a unit's parameters, when backward comes to it. Called while the unit is whole: the tensors
        that it is whole in are made once, and filled again and again."""
        if unit in self._watched:
            return
        self._watched.add(unit)
        own_ones = {id(parameter) for parameter in unit.parameters() if not is_piece(parameter)}
        for name, parameter in self._policy.named_parameters():
            if id(parameter) in own_ones and parameter.requires_grad:
                parameter.register_post_accumulate_grad_hook(self._noting(name))
