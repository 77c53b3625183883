"""The model that a run trains: new, from a folder, or one that stays as it is with an adapter beside it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from llmtrainer.base.errors import UserError
from llmtrainer.core.protocols import Tokenizer
from llmtrainer.core.randomness import derive
from llmtrainer.models.adapters import lora
from llmtrainer.models.decoder import Decoder
from llmtrainer.models.foreign import Foreign
from llmtrainer.models.foreign_loading import ForeignModel
from llmtrainer.models.hugging_face import to_config
from llmtrainer.models.peft_format import is_adapter, read_config
from llmtrainer.models.stored import AdapterAlone, Form, Policy, WholeModel, WithCritic
from llmtrainer.models.weights import freeze
from llmtrainer.tokenizer.tokenizer import padded_vocabulary
from llmtrainer.training.base_weights import BASE_WEIGHTS, base_facts
from llmtrainer.training.models import base_of, insert_adapter, locate_model, model_folder, tokenizer_class
from llmtrainer.training.policy_heads import HEADS, add_head
from llmtrainer.training.recipe import Recipe
from llmtrainer.training.resume import Resumption

_BESIDE_START = {"start_from", "freeze", "adapter", "apart", "neftune", "head"}
"""Fields of a family that are no shape, so that they may stand beside `start_from`."""


def policy_of(recipe: Recipe, tokenizer: Tokenizer, compute: torch.dtype, continued: Path | None) -> Policy:
    """The model with its first values: drawn from the seed, or those of `start_from`.

    A continued run takes the shape from its own checkpoint, so `start_from` may be gone by then; but an adapter
    always needs its base.
    """
    if recipe.model.start_from is None:
        policy = _new(recipe, padded_vocabulary(tokenizer.vocabulary), compute, continued)
    else:
        _require_no_shape(recipe)
        policy = _started(recipe, compute, continued)
        if policy.vocabulary < tokenizer.vocabulary:
            raise UserError(
                f"the tokenizer has {tokenizer.vocabulary:,} ids and the model {policy.vocabulary:,} embedding rows",
                where=f"model.start_from {recipe.model.start_from}",
                fix="use the tokenizer that belongs to the model: tokenizer=" + recipe.model.start_from,
            )
    policy.ids = tokenizer.vocabulary
    policy.neftune = recipe.model.neftune
    add_head(recipe, policy, compute, continued)
    freeze(policy, recipe.model.freeze)
    _require_frozen_base(policy)
    return policy


def form_of(policy: Policy, tokenizer: Tokenizer, tokenizer_folder: Path, base: str | None) -> Form:
    """What this run's checkpoints hold. `base`: the model that its adapter stands beside."""
    def whole(decoder: Decoder) -> WholeModel:
        return WholeModel(decoder, to_config(
            decoder.family, decoder.vocabulary, end=tokenizer.end, pad=tokenizer.pad,
            tokenizer_class=tokenizer_class(tokenizer_folder),
        ))  # fmt: skip

    form: Form
    if policy.adapter is not None:
        assert base is not None
        form = AdapterAlone(policy, base)
    else:
        form = whole(policy) if isinstance(policy, Decoder) else ForeignModel(policy)
    return form if policy.critic is None else WithCritic(form, whole(policy.critic))


def base_name(recipe: Recipe, continued: Path | None) -> str | None:
    """The base as every checkpoint names it: a hub id with its commit, or a folder that means the same from
    everywhere. A continued run keeps the one it began with, whatever `start_from` has become."""
    if recipe.model.adapter is None or recipe.model.start_from is None:
        return None
    if continued is not None:
        return read_config(continued)[1]
    located = locate_model(recipe.model.start_from)
    # An origin that is a folder is known here; one that is not was fetched, and is named for everybody.
    return str(located.folder.resolve()) if Path(recipe.model.start_from).exists() else located.origin


def base_facts_of(recipe: Recipe, resumption: Resumption | None) -> dict[str, Any]:
    """What every checkpoint of an adapter says of its base's weights: what they were when the run began."""
    if recipe.model.adapter is None or recipe.model.start_from is None:
        return {}
    if resumption is not None:
        return {name: value for name, value in resumption.manifest.items() if name == BASE_WEIGHTS}
    return base_facts(locate_model(recipe.model.start_from).folder)


def _new(recipe: Recipe, rows: int, compute: torch.dtype, continued: Path | None) -> Policy:
    if recipe.model.adapter is not None:
        raise UserError(
            "an adapter without a model to stand beside", where="model.adapter",
            why="a new model has learned nothing yet, and a checkpoint holds the adapter alone",
            fix="model.start_from=FOLDER, or remove model.adapter",
        )
    policy = recipe.model.build(rows, compute)
    assert isinstance(policy, Decoder)
    if recipe.data.sequence_length > policy.context_length:
        raise UserError(
            f"data.sequence_length is {recipe.data.sequence_length:,}, beyond the model's context of "
            f"{policy.context_length:,}",
            fix=f"model.context_length={recipe.data.sequence_length}",
        )
    if continued is None:
        policy.initialise(derive(recipe.seed, "initialise"))
    return policy


def _started(recipe: Recipe, compute: torch.dtype, continued: Path | None) -> Policy:
    assert recipe.model.start_from is not None
    adapter = recipe.model.adapter
    if adapter is None:
        folder = continued or model_folder(recipe.model.start_from)
        _require_model(folder, recipe.model.start_from)
        return _loaded(recipe, folder, compute, frozen=False)
    assert isinstance(adapter, lora.Lora)
    folder = base_of(continued) if continued is not None else model_folder(recipe.model.start_from)
    _require_model(folder, recipe.model.start_from)
    policy = _loaded(recipe, folder, compute, frozen=True)
    if adapter.start_from is None:
        adapter.insert(policy)
        lora.initialise(policy, recipe.seed)
        return policy
    _require_no_adapter_shape(adapter)
    # Its dropout is this run's own: nothing of what was learned depends on it.
    insert_adapter(policy, continued or model_folder(adapter.start_from), adapter.dropout)
    assert policy.adapter is not None
    # The kind that is taken where none is named contradicts nothing.
    if adapter.kind not in (adapter.default_kind, policy.adapter.kind):
        raise UserError(
            f"`model.adapter.kind` is {adapter.kind}, and the adapter that it starts from is {policy.adapter.kind}",
            where=f"model.adapter.start_from {adapter.start_from}", why="the kind comes from that folder",
            fix=f"model.adapter.kind={policy.adapter.kind}, or leave the kind out",
        )
    return policy


def _loaded(recipe: Recipe, folder: Path, compute: torch.dtype, *, frozen: bool) -> Policy:
    policy = recipe.model.load(folder, compute, frozen=frozen)
    assert isinstance(policy, Decoder | Foreign)
    return policy


def _require_model(folder: Path, named: str) -> None:
    if is_adapter(folder):
        raise UserError(
            "this is an adapter, not a model", where=f"model.start_from {named}",
            fix=f"to train the adapter on: model.start_from=BASE model.adapter.start_from={named}; to train on from "
            f"both as one: llmtrainer merge {named} out=merged, and model.start_from=merged",
        )


def _require_frozen_base(policy: Policy) -> None:
    trained = [
        name for name, value in policy.named_parameters()
        if value.requires_grad and ".adapter." not in name and not name.startswith(HEADS)
    ]  # fmt: skip
    if policy.adapter is not None and trained:
        raise UserError(
            f"model.freeze has {trained[0]} trained beside an adapter", where="model.freeze",
            why="a checkpoint holds the adapter alone, so what the model itself learned would be lost",
            fix="remove the pattern with `!`, or train without model.adapter",
        )


def _require_no_adapter_shape(adapter: lora.Lora) -> None:
    named = sorted(adapter.model_fields_set - {"start_from", "dropout", "kind"})
    if named:
        raise UserError(
            f"`model.adapter.{named[0]}` is given beside `model.adapter.start_from`",
            where=f"model.adapter.start_from {adapter.start_from}",
            why="the shape comes from that folder; naming it again would be a second truth",
            fix=f"remove {', '.join(f'model.adapter.{name}' for name in named)}",
        )


def _require_no_shape(recipe: Recipe) -> None:
    fields = type(recipe.model).model_fields
    named = sorted(
        name for name in fields.keys() - _BESIDE_START if getattr(recipe.model, name) != fields[name].default
    )
    if named:
        raise UserError(
            f"`model.{named[0]}` is given beside `model.start_from`",
            where=f"model.start_from {recipe.model.start_from}",
            why="the shape comes from that folder; naming it again would be a second truth",
            fix=f"remove {', '.join(f'model.{name}' for name in named)}",
        )
