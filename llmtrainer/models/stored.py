"""What a checkpoint holds of a policy: the whole model, or what was trained beside one."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from torch import Tensor

from llmtrainer.models.decoder import Decoder
from llmtrainer.models.foreign import Foreign
from llmtrainer.models.foreign_loading import read_foreign
from llmtrainer.models.peft_format import adapter_config, adapter_tensors, load_adapter, write_adapter
from llmtrainer.models.weights import load_weights, save_tensors, tensors, write_config

Policy = Decoder | Foreign
"""A model that can be trained: of our own families, or of transformers' classes."""


class Form(Protocol):
    """How a policy becomes a folder."""

    def tensors(self) -> dict[str, Tensor]:
        """What to keep, under the names of the folder's files; detached, not copied."""
        ...

    def write(self, named: Mapping[str, Tensor], folder: Path) -> None:
        """Write the folder's files from `tensors()`, or from a copy of them taken earlier."""
        ...


@dataclass(frozen=True)
class WholeModel:
    """A Hugging Face folder: config.json and every weight."""

    policy: Decoder
    config: Mapping[str, Any]

    def tensors(self) -> dict[str, Tensor]:
        return tensors(self.policy)

    def write(self, named: Mapping[str, Tensor], folder: Path) -> None:
        save_tensors(named, self.config, folder)

    def describe(self, folder: Path) -> None:
        """Write what the folder says of the model, beside weights that lie there in pieces."""
        write_config(self.config, folder)


@dataclass(frozen=True)
class AdapterAlone:
    """A PEFT folder: what the adapters have learned, and the name of the model that they stand beside."""

    policy: Policy
    base: str

    def tensors(self) -> dict[str, Tensor]:
        return adapter_tensors(self.policy)

    def write(self, named: Mapping[str, Tensor], folder: Path) -> None:
        write_adapter(named, adapter_config(self.policy, self.base), folder)


CRITIC = "critic"
"""Of a checkpoint: the folder of a critic that is a model of its own."""


@dataclass(frozen=True)
class WithCritic:
    """A folder of whatever the policy is, and in it another of its critic."""

    policy: Form
    critic: WholeModel

    def tensors(self) -> dict[str, Tensor]:
        own = {f"{CRITIC}.{name}": value for name, value in self.critic.tensors().items()}
        return {**self.policy.tensors(), **own}

    def write(self, named: Mapping[str, Tensor], folder: Path) -> None:
        before = f"{CRITIC}."
        self.policy.write({name: value for name, value in named.items() if not name.startswith(before)}, folder)
        own = {name.removeprefix(before): value for name, value in named.items() if name.startswith(before)}
        self.critic.write(own, folder / CRITIC)


def read_into(policy: Policy, folder: Path) -> None:
    """Fill a policy with what its own checkpoint holds. Raises UserError, with nothing changed, if it is another's."""
    if policy.critic is not None:
        load_weights(policy.critic, folder / CRITIC)
    if policy.adapter is not None:
        load_adapter(policy, folder)
    elif isinstance(policy, Decoder):
        load_weights(policy, folder)
    else:
        read_foreign(policy, folder)
