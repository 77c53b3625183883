"""Where a number that is none came from: which rank's share of a step, and which parameter."""

from __future__ import annotations

from collections.abc import Callable, Iterable

import torch
from torch import Tensor, nn

from llmtrainer.base.errors import UserError
from llmtrainer.core.pieces import own
from llmtrainer.core.protocols import Engine


def culprit(
    engine: Engine, policy: nn.Module, own_loss_finite: bool, apart: Callable[[], object]
) -> tuple[str, str]:
    """(rank, first bad parameter) of a step whose loss or gradient is not finite, the same on every rank; each asks.

    A parameter whose own value is not finite is to blame; else the first in the order of the model whose gradient is
    not, of a rank whose share of the loss is not. Where all shares are finite, `apart` works the step's gradients out
    again, on every rank without those of the others. The gradients are of no use afterwards.
    """
    named = list(policy.named_parameters())
    value = _first_bad(parameter.detach() for _, parameter in named)
    gradient = _first_bad(engine.own_gradients(policy))
    told = [each.tolist() for each in engine.gather(torch.tensor([not own_loss_finite, value, gradient]))]
    places = {rank: place for rank, (_, place, _) in enumerate(told) if place >= 0}
    if not places:
        places = {rank: place for rank, (bad, _, place) in enumerate(told) if bad}
    if not places and engine.world_size > 1:
        apart()
        gradient = _first_bad(engine.own_gradients(policy))
        apart_by_rank = [int(each) for each in engine.gather(torch.tensor([gradient]))]
        places = {rank: place for rank, place in enumerate(apart_by_rank) if place >= 0}
    if not places:
        places = {rank: place for rank, (_, _, place) in enumerate(told)}
    found = [place for place in places.values() if place >= 0]
    name = named[found[0]][0] if found else "the loss itself; every gradient is finite"
    return ", ".join(map(str, places)), name


def too_late(what: str) -> UserError:
    """What is said where the weights were updated before anybody saw that the gradients were no numbers."""
    return UserError(
        f"{what}: not a number", where="engine.step_in_backward",
        why="the weights were updated while the gradients were made: nothing is saved of them",
        fix="run the same command again, which continues from the newest checkpoint, with a lower optim.schedule.peak, "
        "or with engine.step_in_backward=false to see which parameter is bad",
    )


def _first_bad(tensors: Iterable[Tensor | None]) -> int:
    """The first with a number in it that is none; -1: there is none. Of a tensor in pieces, this rank's."""
    for place, tensor in enumerate(tensors):
        if tensor is not None and not bool(torch.isfinite(own(tensor)).all()):
            return place
    return -1
