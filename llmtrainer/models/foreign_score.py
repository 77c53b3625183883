"""Models of transformers' classes for sequences with one label: their stack, and a scalar head of ours."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from llmtrainer.base.errors import UserError
from llmtrainer.core.protocols import Head
from llmtrainer.models.scalar import ScalarHead


def no_place_for(head: Head) -> UserError:
    return UserError(
        f"a class of transformers gets no head of the kind `{head.kind}` here", where="model.head",
        why="its folder would have no place for it", fix="model.head.kind=score, or model.kind=llama",
    )


def one_label(model: Any, master: torch.dtype) -> Any:
    """The same stack in its class for sequences with one label, with a head of ours. UserError where there is none."""
    from transformers import AutoModelForSequenceClassification

    config = model.config
    config.num_labels = 1
    try:
        with torch.device("meta"):
            other = AutoModelForSequenceClassification.from_config(config)
        assert isinstance(other.score, nn.Linear)
    except (ValueError, AttributeError, AssertionError):
        raise UserError(
            f"{type(model).__name__} has no class beside it that gives a score", where="model.head",
            why="transformers describes none with one number behind the last token", fix="another model",
        ) from None
    setattr(other, other.base_model_prefix, model.base_model)
    return with_own_head(other, None, master)


def with_own_head(model: Any, weight: Tensor | None, master: torch.dtype) -> Any:
    """A model for sequences with one label whose head is ours, with this weight or none yet."""
    device = next(model.base_model.parameters()).device
    model.score = ScalarHead(model.config.get_text_config().hidden_size, 0, master=master, device=device)
    if weight is not None:
        with torch.no_grad():
            model.score.weight.copy_(weight)
    return model
