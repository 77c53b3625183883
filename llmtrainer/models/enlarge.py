"""A model folder with rows for more tokens."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from safetensors import safe_open
from torch import Tensor

from llmtrainer.models.hugging_face import from_config
from llmtrainer.models.weights import CONFIG, read_config, stored_names

TABLES = ("model.embed_tokens.weight", "lm_head.weight")
"""What has one row for each token."""


def with_rows(folder: Path, new: range, rows: int) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Weights by their stored names and config.json, with `rows` rows for tokens where there were fewer.

    The rows `new`, those of the new tokens, and every row that is new besides are the mean of the rows before them
    (Hewitt 2021, "Initializing new word embeddings for pretrained language models"): such a token's logit is the mean
    of the others', so that it is never the likeliest before it is learned. Everything else is as it was, bit for bit.
    UserError for a model that no family here can hold.
    """
    config = read_config(folder)
    _, had = from_config(config, str(folder / CONFIG))
    rows = max(rows, had)
    weights: dict[str, Tensor] = {}
    for file, names in stored_names(folder).items():
        with safe_open(file, framework="pt") as opened:
            for stored, name in names.items():
                value = opened.get_tensor(stored)
                weights[stored] = _grown(value, new, rows) if name in TABLES else value
    return weights, {**config, "vocab_size": rows}


def _grown(table_VD: Tensor, new: range, rows: int) -> Tensor:
    if not new:
        return table_VD
    mean_D = table_VD[: new.start].double().mean(dim=0).to(table_VD.dtype)
    grown_VD = mean_D.expand(rows, -1).clone()
    grown_VD[: len(table_VD)] = table_VD
    grown_VD[new.start : new.stop] = mean_D
    return grown_VD
