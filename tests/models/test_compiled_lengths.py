"""engine.compile: rows of many lengths share what was compiled for the first ones."""

from __future__ import annotations

import random
from typing import Any

import pytest
import torch
from torch._dynamo.utils import counters

from llmtrainer.core.arrangement import Arrangement
from tests.models.recorder import Recorder
from tests.worlds import ragged_documents, row_batch, tiny_model


@pytest.mark.filterwarnings("ignore")     # what torch says of its own tracing
def test_conversations_of_many_lengths_are_computed_by_the_pieces_of_the_first(monkeypatch: pytest.MonkeyPatch) -> None:
    real = torch.compile
    # Which pieces are compiled again is decided before any backend: without C++, a count takes seconds.
    monkeypatch.setattr(torch, "compile", lambda what, **settings: real(what, **{**settings, "backend": "eager"}))
    torch._dynamo.reset()
    counters.clear()
    policy = tiny_model(layers=1, context_length=256)
    policy.arrange(Arrangement())
    policy.compile_pieces()
    draw = random.Random(0)
    graphs = []
    for step in range(12):
        # Multiples of 64 and others; a row below 64 tokens has two pieces of its own.
        # All are learned whole and in part, by a sum and by weights.
        length = draw.choice([128, 192, draw.randrange(65, 250)]) if step else 200
        batch = row_batch(ragged_documents([length], step))
        if step % 3:
            batch.weights_BT[:, : batch.weights_BT.shape[1] // 2] = 0.0
        logp_BT: Any = policy(batch, ("logp",)).logp_BT
        (logp_BT.sum() if step % 2 else (logp_BT * batch.weights_BT).sum()).backward()
        graphs.append(counters["stats"]["unique_graphs"])
    # What precedes attention, what follows it, and the head in both directions.
    assert graphs == [4] * 12
    # A compiler must not wake up while a stack is recorded, which is computed with other leaves over the same memory.
    policy.path = "sdpa"
    policy.record(Recorder())
    for _ in range(3):
        policy(row_batch(ragged_documents([192], 1)), ("logp",)).logp_BT.sum().backward()
    assert counters["stats"]["unique_graphs"] == 4
    torch._dynamo.reset()
