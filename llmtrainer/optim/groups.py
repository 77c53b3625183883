"""Which parameters are updated together: by pattern, and without decay where there is nothing to decay."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from fnmatch import fnmatchcase
from typing import Any

from pydantic import Field
from torch import nn

from llmtrainer.base.config import Config
from llmtrainer.base.errors import UserError


class Group(Config):
    """Parameters chosen by name, and what is different for them. The first group that matches takes them."""

    match: str
    """Pattern on whole parameter names, `*` for any text: `*.embed_tokens.weight`, `model.layers.0.*`."""

    rate: float = Field(default=1.0, gt=0.0, allow_inf_nan=False)
    """Factor on the learning rate. What shall not learn at all is named in `model.freeze`."""

    decay: float | None = Field(default=None, ge=0.0, allow_inf_nan=False)
    """Factor on the rule's weight decay. Left out: 1 for matrices, 0 for norms and biases."""


def group(parameters: Iterable[tuple[str, nn.Parameter]], groups: Sequence[Group] = ()) -> list[dict[str, Any]]:
    """Sort the trainable parameters into what a `Rule` builds its optimizer from.

    Every dict holds `params`, their `param_names`, `rate_multiplier` and `decay_multiplier`. By default a
    tensor of two or more dimensions decays, a vector or a scalar does not. Frozen parameters are left out.
    The order is that of first appearance: a function of the model and the patterns alone.

    Raises UserError when a pattern takes no trainable parameter, or when nothing is trainable.
    """
    named = list(parameters)
    trainable = [(name, parameter) for name, parameter in named if parameter.requires_grad]
    if not trainable:
        raise UserError(
            "no parameter is trainable",
            where=f"all {len(named):,} tensors of the model are frozen",
            fix="shorten model.freeze",
        )
    gathered: dict[tuple[float, float], dict[str, Any]] = {}
    taken = [0] * len(groups)
    for name, parameter in trainable:
        index = next((i for i, item in enumerate(groups) if fnmatchcase(name, item.match)), None)
        rate, decay = 1.0, None
        if index is not None:
            taken[index] += 1
            rate, decay = groups[index].rate, groups[index].decay
        if decay is None:
            decay = 1.0 if parameter.ndim >= 2 else 0.0
        entry = gathered.setdefault(
            (rate, decay),
            {"params": [], "param_names": [], "rate_multiplier": rate, "decay_multiplier": decay},
        )
        entry["params"].append(parameter)
        entry["param_names"].append(name)
    for index, count in enumerate(taken):
        if not count:
            _refuse(index, groups, named)
    return list(gathered.values())


def _refuse(index: int, groups: Sequence[Group], named: Sequence[tuple[str, nn.Parameter]]) -> None:
    pattern = groups[index].match
    matched = [(name, parameter) for name, parameter in named if fnmatchcase(name, pattern)]
    if not matched:
        why = f"the names look like {', '.join(name for name, _ in named[:3])}"
    elif not any(parameter.requires_grad for _, parameter in matched):
        why = f"the {len(matched):,} parameters it matches are frozen"
    else:
        why = "an earlier group already takes every parameter it matches"
    raise UserError(
        f"the pattern `{pattern}` takes no trainable parameter",
        where=f"optim.groups[{index}].match",
        why=why,
        fix="correct the pattern, or remove the group",
    )
