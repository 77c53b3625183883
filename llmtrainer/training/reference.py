"""What a policy is compared with: a model that stays as it was, found once and named by its hash."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import Tensor

from llmtrainer.base.errors import UserError
from llmtrainer.core.at_rest import at_rest
from llmtrainer.core.batch import GATES, KEPT, NEVER, REFERENCE, TEMPERATURE, Batch, Outputs
from llmtrainer.core.pieces import fill, whole
from llmtrainer.core.protocols import Engine, Family
from llmtrainer.models.adapters.lora import adapters
from llmtrainer.models.peft_format import adapter_tensors, is_adapter, load_adapter
from llmtrainer.models.stored import Policy
from llmtrainer.training.exchange import exchanged
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


def require_same(who: str, before: object, sha256: str, where: Path) -> None:
    """Refuse to go on with another reference or teacher (`who`) than the run began with, whose hash was `before`."""
    if before != sha256:
        more = " reference.start_from=FOLDER" if who == "reference" else ""
        raise UserError(
            f"the {who} changed since this run's checkpoint was written", where=str(where),
            why=f"its SHA-256 was {str(before)[:16]} and is {sha256[:16]}: the loss would mean something else",
            fix=f"restore the model it was, or begin anew from these weights: run=runs/other model.start_from={where}"
            + more,
        )


def sha256_of(named: Mapping[str, Tensor]) -> str:
    """Over names, types, shapes and bytes of whole tensors: where they are divided, every process asks."""
    digest = hashlib.sha256()
    for name, value in sorted(named.items()):
        digest.update(f"{name} {value.dtype} {list(value.shape)}\n".encode())
        value = whole(value.detach())
        digest.update(value.cpu().contiguous().view(torch.uint8).numpy().data)
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
        tensors, others = untrained(policy)
        sha256 = sha256_of(base)
    else:
        named = adapter_tensors(policy)
        began = {name: value.clone() for name, value in named.items()}
        tensors, others = list(named.values()), list(began.values())
        with exchanged(tensors, others):     # what is loaded stays among the others, and its own values come back
            load_adapter(policy, folder)
        sha256 = sha256_of(base | began)
    read_policy = engine.reader(policy)

    def read(batch: Batch, wants: tuple[str, ...]) -> Outputs:
        with at_rest(policy), exchanged(tensors, others):
            return read_policy(batch, wants)

    return Frozen(read, sha256)


def untrained(policy: Policy) -> tuple[list[Tensor], list[Tensor]]:
    """Tensors of the adapters with other values for them that change nothing: B is 0, and magnitudes are the norms of
    the matrices themselves."""
    tensors, others = list[Tensor](), list[Tensor]()
    for layer in adapters(policy).values():
        assert layer.adapter is not None
        tensors.append(layer.adapter.lora_B)
        others.append(torch.zeros_like(layer.adapter.lora_B))
        if layer.adapter.lora_magnitude_vector is not None:
            assert isinstance(layer.adapter.base_norm_O, Tensor)
            tensors.append(layer.adapter.lora_magnitude_vector)
            norms = layer.adapter.lora_magnitude_vector.detach().clone()
            fill(norms, layer.adapter.base_norm_O)
            others.append(norms)
    return tensors, others
