"""A rollout that is being learned, and its tensors in a checkpoint."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from llmtrainer.core.rollout import Rollout


@dataclass(frozen=True)
class Held:
    """The answers of one rollout, ready to be cut into steps."""

    number: int
    """Of the rollout, from 0."""
    rollout: Rollout
    advantages: tuple[NDArray[np.float64], ...]
    """For each token of each answer."""
    old_logp: tuple[tuple[NDArray[Any], ...], ...]
    """For each step of the rollout and each of its answers, what the policy that wrote it gives every learned token
    where it stands in that step; empty where a rollout is one step."""
    figures: Mapping[str, float]


_FLAT = ("prompts", "answers", "weights", "old_logp", "reference_logp", "values")
"""Fields of a rollout that are an array for each answer."""


def packed(held: Held) -> dict[str, Tensor]:
    """A rollout as named tensors."""
    rollout = held.rollout
    found: dict[str, Tensor] = {
        "number": torch.tensor(held.number),
        "group_R": torch.from_numpy(rollout.group_R), "reward_R": torch.from_numpy(rollout.reward_R),
        "ended_R": torch.from_numpy(rollout.ended_R), "version": _text(rollout.version),
        "figures": _text(json.dumps(dict(held.figures))), "steps": torch.tensor(len(held.old_logp)),
        **_flat("advantages", held.advantages),
    }  # fmt: skip
    for name in _FLAT:
        if (arrays := getattr(rollout, name)) is not None:
            found |= _flat(name, arrays)
    for step, arrays in enumerate(held.old_logp):
        found |= _flat(f"old_{step}", arrays)
    return found


def unpacked(state: Mapping[str, Tensor]) -> Held:
    """What `packed` was given."""
    fields = {name: _arrays(state, name) for name in _FLAT if f"{name}.lengths" in state}
    rollout = Rollout(
        **fields, group_R=state["group_R"].numpy(), reward_R=state["reward_R"].numpy(),
        ended_R=state["ended_R"].numpy(), version=_string(state["version"]),
    )  # fmt: skip
    return Held(
        int(state["number"]), rollout, _arrays(state, "advantages"),
        tuple(_arrays(state, f"old_{step}") for step in range(int(state["steps"]))),
        json.loads(_string(state["figures"])),
    )


def _flat(name: str, arrays: Sequence[NDArray[Any]]) -> dict[str, Tensor]:
    lengths = torch.tensor([len(array) for array in arrays], dtype=torch.int64)
    return {name: torch.from_numpy(np.concatenate(arrays)), f"{name}.lengths": lengths}


def _arrays(state: Mapping[str, Tensor], name: str) -> tuple[NDArray[Any], ...]:
    borders = np.cumsum(state[f"{name}.lengths"].numpy())[:-1]
    return tuple(np.split(state[name].numpy(), borders))


def _text(text: str) -> Tensor:
    return torch.tensor(list(text.encode()), dtype=torch.uint8)


def _string(tensor: Tensor) -> str:
    return bytes(tensor.tolist()).decode()
