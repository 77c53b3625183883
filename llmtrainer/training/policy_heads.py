"""The scalar head of the model that a run trains: new, from its folder, or on a critic of its own."""

from __future__ import annotations

from pathlib import Path

import torch

from llmtrainer.base.errors import UserError
from llmtrainer.core.protocols import Head
from llmtrainer.core.randomness import derive
from llmtrainer.models import scalar
from llmtrainer.models.decoder import Decoder
from llmtrainer.models.heads.score import Score
from llmtrainer.models.heads.value import Value
from llmtrainer.models.stored import CRITIC, Policy
from llmtrainer.models.weights import load_policy
from llmtrainer.training.models import model_folder
from llmtrainer.training.recipe import Recipe

HEADS = ("score.", "critic.")
"""What the names of parameters begin with that are no part of the model that writes."""


def add_head(recipe: Recipe, policy: Policy, compute: torch.dtype, continued: Path | None) -> None:
    """Give the policy the head of the recipe, unless its folder had it, and its first values where the run begins.

    UserError where the objective asks for what the policy does not have, or for nothing of what was asked for.
    """
    head = recipe.model.head
    _require_use(recipe, head)
    if isinstance(head, Value) and head.apart:
        assert isinstance(policy, Decoder), "the recipe was checked"
        policy.critic = _critic(recipe, head, policy, compute, continued)
    elif head is not None and policy.score is None:
        policy.attach(head)
        if continued is None and policy.score is not None:
            policy.score.initialise(derive(recipe.seed, "initialise"), head)
    elif head is not None:
        _require_same(head, policy)
    if policy.score is not None:
        policy.score.requires_grad_(True)    # beside an adapter, the head is trained all the same
    _require_wanted(recipe, policy)


def _critic(recipe: Recipe, head: Value, policy: Decoder, compute: torch.dtype, continued: Path | None) -> Decoder:
    """A model of the value of what the policy writes, with its first values or those of the checkpoint."""
    first = Score(**{name: getattr(head, name) for name in sorted(head.model_fields_set & Score.model_fields.keys())})
    seed = derive(recipe.seed, "critic")
    source = recipe.model.start_from if head.start_from is None else head.start_from
    if continued is not None:
        return load_policy(continued / CRITIC, compute)
    if source is None:
        critic = policy.family.model_copy(update={"head": first}).build(policy.vocabulary, compute)
        critic.initialise(seed)
        return critic
    critic = load_policy(model_folder(source), compute)
    if critic.vocabulary != policy.vocabulary:
        raise UserError(
            f"the critic has {critic.vocabulary:,} embedding rows and the policy {policy.vocabulary:,}",
            where=f"model.head.start_from {source}", why="both read the same ids",
            fix="start both from models of one tokenizer",
        )
    if critic.score is None:
        critic.attach(first)
        assert critic.score is not None
        critic.score.initialise(seed, first)
    return critic


def _require_use(recipe: Recipe, head: Head | None) -> None:
    if head is not None and not set(recipe.objective.wants) & set(scalar.WANTS):
        raise UserError(
            f"objective `{recipe.objective.kind}` asks a head of the kind `{head.kind}` for nothing",
            where="model.head", why="it would never be trained",
            fix=f"remove model.head, or objective.kind={'ppo' if isinstance(head, Value) else 'reward'}",
        )
    if isinstance(head, Value) and head.apart and recipe.model.kind == "hf":
        raise UserError(
            "a critic of its own stands beside our own families", where="model.head.trunk", fix="model.kind=llama",
        )


def _require_same(head: Head, policy: Policy) -> None:
    """Refuse another head than the one that the folder holds."""
    found = policy.family.head if isinstance(policy, Decoder) else None
    if found is not None and (found.kind, found.cuts) != (head.kind, head.cuts):
        raise UserError(
            f"the model has a head of the kind `{found.kind}` already, and model.head.kind is `{head.kind}`",
            where="model.head", why="what it learned would be lost",
            fix="leave model.head out, or start from a model without a head",
        )


def _require_wanted(recipe: Recipe, policy: Policy) -> None:
    """Before anything is read: a policy without a head that the objective needs, or without the vocabulary's."""
    wants = set(recipe.objective.wants)
    cuts = policy.score is not None and policy.score.cuts is not None
    has = {"score": policy.score is not None, "cut_points": cuts}
    has["value"] = policy.score is not None or policy.critic is not None
    for name, kind in (("cut_points", "ordinal"), ("value", "value"), ("score", "score")):
        if name in wants and not has[name]:
            raise UserError(
                f"objective `{recipe.objective.kind}` needs a model with a head of the kind `{kind}`",
                where="model.head", fix=f"model.head.kind={kind}",
            )
    if wants - set(scalar.WANTS) and not policy.worded:
        raise UserError(
            f"objective `{recipe.objective.kind}` asks which token follows, and the model gives a score alone",
            where="model.start_from" if recipe.model.start_from else "model.head",
            fix="start from the model that the reward model was trained from; or model.head.kind=value",
        )
