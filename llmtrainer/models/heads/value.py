"""A critic: one number for each token, beside a policy that goes on predicting tokens."""

from __future__ import annotations

from typing import ClassVar, Literal

from llmtrainer.core.protocols import Head


class Value(Head):
    """What is expected from each position on, for PPO."""

    instead: ClassVar[bool] = False

    trunk: Literal["own", "shared"] = "own"
    """own: the critic is a model of its own, with parameters `critic.*`, saved in the folder `critic` of a checkpoint;
    shared: a head on the policy's own hidden states, half the memory, and each changes the other."""

    start_from: str | None = None
    """With a trunk of its own: the model or reward model whose weights it begins with. Left out: the policy's."""

    @property
    def apart(self) -> bool:
        return self.trunk == "own"
