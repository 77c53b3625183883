"""Whether a policy may read a prompt once for several answers: only where that changes no number."""

from __future__ import annotations

from torch import nn

from llmtrainer.base.errors import UserError
from llmtrainer.data.comparison_source import ComparisonSource
from llmtrainer.models.decoder import Decoder
from llmtrainer.models.stored import Policy
from llmtrainer.training.dataset import Rows


def require_exact_sharing(rows: Rows | None, policy: Policy) -> None:
    """Raise UserError where the rows share prompts and this policy would not read each answer as it reads it alone.

    Attention sees the same keys either way. What depends on a token's row or document besides does not.
    """
    if isinstance(rows, ComparisonSource) and rows.branches:
        require_exact("data.share_prompt", policy, rows.longest)


def require_exact(key: str, policy: Policy, longest: int) -> None:
    """Raise UserError, which names the recipe's key, where shared prompts change a number. longest: tokens of the
    longest prompt with an answer."""
    why = _objection(policy, longest)
    if why is not None:
        raise UserError(
            "answers cannot share the prompt in front of them here", where=key, why=why, fix=f"{key}=false"
        )


def _objection(policy: Policy, longest: int) -> str | None:
    if policy.path == "varlen":
        return "varlen attention sees one unbroken range of keys for each query (engine.attention)"
    if policy.neftune:
        return "noise on the embeddings depends on the length of the row (model.neftune)"
    adapter = policy.adapter
    if adapter is not None and getattr(adapter, "dropout", None):
        return "dropout of the adapter would be drawn once for all answers (model.adapter.dropout)"
    if isinstance(policy, Decoder):
        if policy.family.dropout:
            return "dropout would be drawn once for all answers (model.dropout)"
        scaling = policy.family.rope_scaling
        beyond = None if scaling is None else scaling.grows_beyond
        if beyond is not None and longest > beyond:
            return f"positions depend on the length of each row beyond {beyond:,} tokens (model.rope_scaling)"
        return None
    if policy.apart:
        return "this class of transformers reads each document as a row of its own (model.apart)"
    if any(isinstance(module, nn.Dropout) and module.p > 0.0 for module in policy.modules()):
        return "dropout inside this class of transformers would be drawn once for all answers"
    return None
