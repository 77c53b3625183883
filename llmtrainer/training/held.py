"""A rollout that is being learned, those that wait, and their tensors in a checkpoint."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from llmtrainer.core.batch import ADVANTAGE, OLD, OLD_VALUE, REFERENCE, RETURN, ROLLOUT
from llmtrainer.core.credit import Moments, State
from llmtrainer.core.rollout import Rollout
from llmtrainer.generation.sampler import Kept, Sampled

Arrays = tuple[NDArray[Any], ...]


@dataclass(frozen=True)
class Held:
    """The answers of one rollout, with what each of their tokens earned."""

    number: int
    """Of the rollout, from 0."""
    rollout: Rollout
    written: tuple[Sampled, ...]
    """The answers as they were sampled; of a conversation, all turns of the policy as one."""
    advantages: Arrays | None = None
    """For each token of each answer; None where nothing is earned."""
    returns: Arrays | None = None
    figures: Mapping[str, float] = field(default_factory=dict)

    def signals(self, answer: int, several_steps: bool) -> dict[str, NDArray[Any]]:
        """By the name of the signal, what is known of each learned token of an answer.

        several_steps: whether the policy changes while the rollout is learned, so that what it said before must be
        known.
        """
        rollout = self.rollout
        known: dict[str, Arrays | None] = {
            ADVANTAGE: self.advantages, RETURN: self.returns, OLD_VALUE: rollout.values,
            OLD: rollout.trainer_logp if several_steps else None, ROLLOUT: rollout.old_logp,
            REFERENCE: rollout.reference_logp,
        }  # fmt: skip
        learned = rollout.weights[answer] > 0
        return {name: arrays[answer][learned] for name, arrays in known.items() if arrays is not None}


@dataclass(frozen=True)
class Gathered:
    """A rollout as it was written and scored, before the trainer has worked out anything of it."""

    held: Held
    drawn: range
    """The draws of prompts that went into it: all since the rollout before."""
    draws: tuple[int, ...]
    """Which of them each group answers."""
    left_out: Mapping[str, Sequence[int]] = field(default_factory=dict)
    """The others, by the reason why they are not learned."""
    samples: Sequence[Mapping[str, Any]] = ()
    """Some answers for people."""
    step: int = 0
    """The weights after so many steps wrote it."""


SECONDS, WAITED = "rollout/seconds", "rollout/waited"
"""Figures that say how long a rollout took to write, and how long the trainer waited for it."""
_AHEAD = "ahead."
_FLAT = ("prompts", "answers", "weights", "old_logp", "trainer_logp", "reference_logp", "values")
"""Fields of a rollout that are an array for each answer."""


def packed(held: Held | None, cursor: int, state: State) -> dict[str, Tensor]:
    """A source of rollouts as named tensors. cursor: prompts drawn so far."""
    found = {"cursor": torch.tensor(cursor), "state": _text(asdict(state))}
    return found if held is None else found | _packed(held)


def unpacked(state: Mapping[str, Tensor]) -> tuple[Held | None, int, State]:
    """What `packed` was given."""
    known = _json(state["state"])
    kept = State(Moments(**known["rewards"]), known["kl"])
    return _unpacked(state) if "number" in state else None, int(state["cursor"]), kept


def packed_ahead(waiting: Sequence[Gathered]) -> dict[str, Tensor]:
    """Rollouts that nobody has begun to learn, as named tensors."""
    found: dict[str, Tensor] = {}
    for place, one in enumerate(waiting):
        told = {
            "drawn": [one.drawn.start, one.drawn.stop], "draws": one.draws, "left_out": one.left_out,
            "samples": one.samples, "step": one.step,
        }  # fmt: skip
        tensors = {**_packed(one.held), "gathered": _text(told)}
        found |= {f"{_AHEAD}{place}.{name}": tensor for name, tensor in tensors.items()}
    return found


def unpacked_ahead(state: Mapping[str, Tensor]) -> list[Gathered]:
    """What `packed_ahead` was given."""
    found: list[Gathered] = []
    while f"{(prefix := f'{_AHEAD}{len(found)}.')}gathered" in state:
        mine = {name.removeprefix(prefix): tensor for name, tensor in state.items() if name.startswith(prefix)}
        told = _json(mine["gathered"])
        found.append(Gathered(
            _unpacked(mine), range(*told["drawn"]), tuple(told["draws"]), told["left_out"], told["samples"],
            told["step"],
        ))  # fmt: skip
    return found


def _packed(held: Held) -> dict[str, Tensor]:
    rollout = held.rollout
    found = {
        "number": torch.tensor(held.number), "group_R": torch.from_numpy(rollout.group_R),
        "reward_R": torch.from_numpy(rollout.reward_R), "ended_R": torch.from_numpy(rollout.ended_R),
        "told": _text({"version": rollout.version, "figures": _untimed(held.figures)}),
        **_written(held.written),
    }  # fmt: skip
    for name, arrays in (("advantages", held.advantages), ("returns", held.returns)):
        if arrays is not None:
            found |= _flat(name, arrays)
    for name in _FLAT:
        if (arrays := getattr(rollout, name)) is not None:
            found |= _flat(name, arrays)
    return found


def _unpacked(state: Mapping[str, Tensor]) -> Held:
    told = _json(state["told"])
    rollout = Rollout(
        **{name: _arrays(state, name) for name in _FLAT if f"{name}.lengths" in state},  # type: ignore[arg-type]
        group_R=state["group_R"].numpy(), reward_R=state["reward_R"].numpy(), ended_R=state["ended_R"].numpy(),
        version=told["version"],
    )  # fmt: skip
    advantages, returns = (
        _arrays(state, name) if f"{name}.lengths" in state else None for name in ("advantages", "returns")
    )
    written = _read_written(state, rollout)
    return Held(int(state["number"]), rollout, written, advantages, returns, told["figures"])


def _untimed(figures: Mapping[str, float]) -> dict[str, float]:
    """Without what differs from one time to the next: equal runs have equal checkpoints."""
    return {name: value for name, value in figures.items() if name not in (SECONDS, WAITED)}


def _written(written: Sequence[Sampled]) -> dict[str, Tensor]:
    """Temperatures, and the ids that tokens were drawn from where that was not all of them."""
    every = Kept(np.empty(0, dtype=np.int32), left_out=True)
    kept = [one or every for answer in written for one in answer.kept or [every] * len(answer.tokens)]
    told = {
        "never": written[0].never.tolist(), "temperature": [answer.temperature for answer in written],
        "finish": [answer.finish for answer in written],
        "filtered": [answer.kept is not None for answer in written],
    }  # fmt: skip
    return {
        "written": _text(told), **_flat("kept", [one.ids for one in kept]),
        "left_out": torch.tensor([one.left_out for one in kept]),
    }  # fmt: skip


def _read_written(state: Mapping[str, Tensor], rollout: Rollout) -> tuple[Sampled, ...]:
    told, ids, left_out = _json(state["written"]), _arrays(state, "kept"), state["left_out"].tolist()
    kept, no_ids = [Kept(*both) for both in zip(ids, left_out, strict=True)], np.array(told["never"], dtype=np.int64)
    found, at = [], 0
    for number, weight in enumerate(rollout.weights):
        drawn = weight > 0      # what an environment said between them was not
        tokens, logp = rollout.answers[number][drawn], rollout.old_logp[number][drawn]
        mine = tuple(kept[at : at + len(tokens)])
        at += len(tokens)
        found.append(Sampled(
            tuple(tokens.tolist()), told["finish"][number], logp, logp,
            told["temperature"][number], no_ids,
            mine if told["filtered"][number] else None, rollout.version,
        ))  # fmt: skip
    return tuple(found)


def _flat(name: str, arrays: Sequence[NDArray[Any]]) -> dict[str, Tensor]:
    lengths = torch.tensor([len(array) for array in arrays], dtype=torch.int64)
    return {name: torch.from_numpy(np.concatenate(arrays)), f"{name}.lengths": lengths}


def _arrays(state: Mapping[str, Tensor], name: str) -> Arrays:
    borders = np.cumsum(state[f"{name}.lengths"].numpy())[:-1]
    return tuple(np.split(state[name].numpy(), borders))


def _text(value: Any) -> Tensor:
    return torch.tensor(list(json.dumps(value).encode()), dtype=torch.uint8)


def _json(tensor: Tensor) -> Any:
    return json.loads(bytes(tensor.tolist()))
