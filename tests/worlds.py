"""Tiny models and ragged rows for tests: small enough for milliseconds, uneven enough to prove something."""

from __future__ import annotations

import random
from collections.abc import Sequence

import torch

from llmtrainer.core.batch import Batch
from llmtrainer.models.decoder import Decoder
from llmtrainer.models.families.llama import Llama

VOCABULARY = 320


def tiny_model(compute: torch.dtype = torch.float32, seed: int = 0, **shape: object) -> Decoder:
    """2 layers, 64 wide, 4 heads on 2 key heads, 320 ids, in training mode."""
    fields: dict[str, object] = {
        "hidden_size": 64, "layers": 2, "heads": 4, "kv_heads": 2, "intermediate_size": 176, "context_length": 128,
        **shape,
    }  # fmt: skip
    policy = Llama.model_validate(fields).build(VOCABULARY, compute)
    policy.initialise(seed)
    return policy


def ragged_documents(lengths: Sequence[int], seed: int = 0) -> list[list[int]]:
    """One list of ids per length, a document of n + 1 ids for n targets."""
    draw = random.Random(seed)
    return [[draw.randrange(256) for _ in range(length + 1)] for length in lengths]


def row_batch(documents: Sequence[Sequence[int]], weights: Sequence[float] | None = None, first: int = 0) -> Batch:
    """One document a row, padded to the longest; row i is at place `first + i` of the step."""
    longest = max(len(document) - 1 for document in documents)
    shape = (len(documents), longest)
    tokens, targets = torch.zeros(shape, dtype=torch.int64), torch.zeros(shape, dtype=torch.int64)
    weight, place = torch.zeros(shape), torch.zeros(shape, dtype=torch.int32)
    owner, sequence = torch.full(shape, -1, dtype=torch.int32), torch.full(shape, -1, dtype=torch.int32)
    for row, document in enumerate(documents):
        length = len(document) - 1
        tokens[row, :length] = torch.tensor(document[:-1])
        targets[row, :length] = torch.tensor(document[1:])
        weight[row, :length] = 1.0 if weights is None else weights[row]
        place[row, :length] = torch.arange(length)
        owner[row, :length], sequence[row, :length] = 0, row
    places = torch.arange(first, first + len(documents))
    return Batch(tokens, targets, weight, owner, place, sequence, places, dropout_key=7)
