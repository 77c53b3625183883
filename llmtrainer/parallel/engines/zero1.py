"""One model on every process, and the optimizer's state divided among them (PyTorch's ZeroRedundancyOptimizer)."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import TYPE_CHECKING, Any

from torch import Tensor, nn
from torch.optim import Optimizer

from llmtrainer.base.errors import UserError
from llmtrainer.core.arrangement import Arranged
from llmtrainer.core.protocols import Rule
from llmtrainer.parallel.engines.ddp import Ddp, DdpEngine
from llmtrainer.parallel.writing import WholeTensors

if TYPE_CHECKING:
    from torch.distributed.optim import ZeroRedundancyOptimizer


class Zero1(Ddp):
    """As ddp, with the optimizer's state divided: each process keeps it for some of the parameters, updates those, and
    sends them to the others (ZeRO stage 1, Rajbhandari 2020, arXiv:1910.02054, section 5.1). Whole parameters are
    divided, so that every rule works. For models that fit a device, but not with two moments beside them."""

    def start(self, precision: str) -> Zero1Engine:
        if self.step_in_backward:
            raise UserError(
                "zero1 cannot update during backward", where="engine.step_in_backward",
                why="what is updated has to be sent to the others, and backward may still need it there",
                fix="engine.kind=fsdp2 divides the optimizer's state too, and can; or engine.kind=ddp",
            )
        return Zero1Engine(**self._settings(precision))


class Zero1Engine(DdpEngine):
    """A DdpEngine that updates its own share of the parameters. Gradients are whole on every rank, so the norm and
    what is done to them are ddp's, bit for bit."""

    def prepare(self, policy: nn.Module, rule: Rule, groups: Sequence[Mapping[str, Any]]) -> Arranged:
        arranged = super().prepare(policy, rule, groups)
        self.writers = WholeTensors(self.world)
        # A rule makes groups of its own, and ZeroRedundancyOptimizer would write over their lists of names. So it gets
        # all parameters as one group: it divides and sends them, and the rule's own optimizer updates in between.
        self._zero = _divided(self._parameters, self._optimizer.step)
        self._mine = {id(parameter) for group in self._zero.optim.param_groups for parameter in group["params"]}
        named = policy.named_parameters()
        self._names = {name for name, parameter in named if id(parameter) in self._mine}
        return arranged

    def state(self) -> dict[str, Tensor]:
        state = super().state()
        # What all ranks know alike is told by one.
        return {name: value for name, value in state.items() if not self.rank or not name.startswith("engine.")}

    def _update(self) -> None:
        for parameter in self._parameters:
            if id(parameter) not in self._mine:
                parameter.grad = None     # a rule keeps state for what it updates, and for nothing else
        self._zero.step()

    def _owns(self, name: str) -> bool:
        return name in self._names


def _divided(parameters: Sequence[nn.Parameter], update: Callable[[], Any]) -> ZeroRedundancyOptimizer:
    """Who updates which of the parameters, and how the others hear of it; `update` is what this process does."""
    with warnings.catch_warnings():
        # What lies beside it in torch is made with torch.jit, and says at import that this is of old.
        warnings.simplefilter("ignore", DeprecationWarning)
        from torch.distributed.optim import ZeroRedundancyOptimizer
    return ZeroRedundancyOptimizer(
        parameters, optimizer_class=partial(_Share, update=update),  # type: ignore[arg-type]  # torch takes any maker
        parameters_as_bucket_view=True,
    )  # fmt: skip


class _Share(Optimizer):
    """What ZeroRedundancyOptimizer takes for the optimizer of a rank's parameters."""

    def __init__(self, groups: list[dict[str, Any]], *, update: Callable[[], Any]) -> None:
        super().__init__(groups, {})
        self._run = update

    def step(self, closure: Any = None) -> Any:
        return self._run()
