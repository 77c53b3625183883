"""What a policy is compared with: a model that stays as it was, found once and named by its hash."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from llmtrainer.base.errors import UserError
from llmtrainer.core.batch import GATES, KEPT, NEVER, REFERENCE, TEMPERATURE, Batch, Outputs
from llmtrainer.core.protocols import Engine, Family
from llmtrainer.models.adapters.lora import adapters
from llmtrainer.models.peft_format import adapter_tensors, is_adapter, load_adapter
from llmtrainer.models.stored import Policy
from llmtrainer.training.models import load_base, load_whole, model_folder
from llmtrainer.training.recipe import Reference

FACT = "reference_sha256"
Read = Callable[[Batch, tuple[str, ...]], Outputs]


@dataclass(frozen=True)
class Frozen:
    """A reference that is ready to be asked."""

    read: Read
    """Its forward pass, without a way back."""
    sha256: str
    """Over every weight by name: two references with the same hash say the same."""
    model: Policy | None = None
    """Its own model; None where it is the policy's, beneath an adapter."""

    def say(self, batch: Batch, wants: tuple[str, ...]) -> Outputs:
        """What it makes of a batch, over the same ids at the same temperature as the policy."""
        known = {name: batch.signals[name] for name in (GATES, KEPT, NEVER, TEMPERATURE) if name in batch.signals}
        return self.read(replace(batch, signals=known), wants)


@dataclass(frozen=True)
class LiveReference:
    """Annotator: the reference reads every batch just before the policy does."""

    frozen: Frozen
    adds: tuple[str, ...] = (REFERENCE,)

    def __call__(self, batch: Batch) -> Batch:
        logp_BT = self.frozen.say(batch, ("logp",)).logp_BT
        assert logp_BT is not None
        return batch.with_signals({REFERENCE: logp_BT})


def reference_of(
    chosen: Reference, family: Family, policy: Policy, engine: Engine, compute: torch.dtype, *, moves: bool = False
) -> Frozen:
    """The reference of a run that trains `policy`, a model of `family`. moves: it will follow the policy, so that its
    weights are kept as wide as the policy's.

    Raises UserError where the policy began with random weights and no other reference is named: what it would be held
    to says nothing.
    """
    if chosen.start_from is not None:
        folder = model_folder(chosen.start_from)
        whole = load_whole(folder, compute) if is_adapter(folder) else load_base(folder, compute, frozen=not moves)
        return _read_by(engine, whole, policy)
    if policy.adapter is not None:
        assert family.adapter is not None
        from_ = family.adapter.start_from
        return _beside_its_model(policy, engine, None if from_ is None else model_folder(from_))
    if family.start_from is None:
        raise UserError(
            "the objective compares with a reference, and there is none", where="reference.start_from",
            why="the policy begins with random weights: a random reference would hold the model to noise",
            fix="model.start_from=FOLDER begins with a trained model, which is then the reference too",
        )
    folder = model_folder(family.start_from)
    if not folder.is_dir():
        raise UserError(
            f"the model that this run began with is not there any more: {family.start_from}", where="model.start_from",
            why="it is the reference, and only there is it whole; a checkpoint holds what became of it",
            fix="put it back, or name a copy: reference.start_from=FOLDER",
        )
    began = family.load(folder, compute, frozen=not moves)
    assert isinstance(began, Policy)
    return _read_by(engine, began, policy)


def require_same_reference(manifest: Mapping[str, Any], sha256: str, where: Path) -> None:
    """Refuse to go on with another reference than the run began with."""
    if (before := manifest.get(FACT)) != sha256:
        raise UserError(
            "the reference changed since this run's checkpoint was written", where=str(where),
            why=f"its SHA-256 was {str(before)[:16]} and is {sha256[:16]}: the loss would mean something else",
            fix="restore the model it was, or begin anew from these weights: "
            f"run=runs/other model.start_from={where} reference.start_from=FOLDER",
        )


def sha256_of(named: Mapping[str, Tensor]) -> str:
    """Over names, types, shapes and bytes."""
    digest = hashlib.sha256()
    for name, value in sorted(named.items()):
        digest.update(f"{name} {value.dtype} {list(value.shape)}\n".encode())
        digest.update(value.detach().cpu().contiguous().view(torch.uint8).numpy().data)
    return digest.hexdigest()


def _read_by(engine: Engine, frozen: Policy, policy: Policy) -> Frozen:
    if frozen.vocabulary != policy.vocabulary:
        raise UserError(
            f"the reference has {frozen.vocabulary:,} embedding rows and the policy {policy.vocabulary:,}",
            where="reference", why="both must speak of the same ids", fix="name a reference with the same tokenizer",
        )
    frozen.eval()
    frozen.ids = policy.ids
    return Frozen(engine.reader(frozen), sha256_of(frozen.state_dict()), frozen)


def _beside_its_model(policy: Policy, engine: Engine, folder: Path | None) -> Frozen:
    """The model with the adapter as it was when the run began: that of a folder, or a new one, which changes nothing.

    The adapter is not taken away but given other values, so that the very same products are computed.
    """
    base = {name: value for name, value in policy.state_dict().items() if ".adapter." not in name}
    if folder is None:
        began = untrained(policy)
        sha256 = sha256_of(base)
    else:
        now = {name: value.clone() for name, value in adapter_tensors(policy).items()}
        load_adapter(policy, folder)
        began = {name: value.clone() for name, value in adapter_tensors(policy).items()}
        with torch.no_grad():
            for name, value in adapter_tensors(policy).items():
                value.copy_(now[name])
        sha256 = sha256_of(base | began)
    swapped, read_policy = _Swapped(policy, began), engine.reader(policy)

    def read(batch: Batch, wants: tuple[str, ...]) -> Outputs:
        with at_rest(policy), swapped.in_place():
            return read_policy(batch, wants)

    return Frozen(read, sha256)


def untrained(policy: Policy) -> dict[str, Tensor]:
    """Values of adapters that change nothing: B is 0, and magnitudes are the norms of the matrices themselves."""
    found = {}
    for name, value in adapter_tensors(policy).items():
        if ".lora_B" in name:
            found[name] = torch.zeros_like(value)
    for layer in adapters(policy).values():
        assert layer.adapter is not None
        if layer.adapter.lora_magnitude_vector is not None:
            (name,) = (
                name for name, value in adapter_tensors(policy).items()
                if value.data_ptr() == layer.adapter.lora_magnitude_vector.data_ptr()
            )  # fmt: skip
            norm_O = layer.adapter.base_norm_O
            assert isinstance(norm_O, Tensor)
            found[name] = norm_O.clone()
    return found


@dataclass(frozen=True)
class _Swapped:
    """Other values for some tensors of a policy's adapters, of the same shapes."""

    policy: Policy
    values: Mapping[str, Tensor] = field(repr=False)

    @contextmanager
    def in_place(self) -> Iterator[None]:
        """Let the policy have these values; its own come back afterwards."""
        held = {name: value for name, value in adapter_tensors(self.policy).items() if name in self.values}
        kept = {name: value.clone() for name, value in held.items()}
        with torch.no_grad():
            for name, value in held.items():
                value.copy_(self.values[name])
        try:
            yield
        finally:
            with torch.no_grad():
                for name, value in held.items():
                    value.copy_(kept[name])


@contextmanager
def at_rest(policy: nn.Module) -> Iterator[None]:
    """Without dropout and noise."""
    training = policy.training
    policy.eval()
    try:
        yield
    finally:
        policy.train(training)
