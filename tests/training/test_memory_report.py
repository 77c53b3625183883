"""Bytes of parameters, gradients, optimizer state and activations against counts by hand."""

from __future__ import annotations

import pytest
import torch

from llmtrainer.core.objective import count, loss_of
from llmtrainer.core.protocols import Rule
from llmtrainer.models.families.llama import Llama
from llmtrainer.objectives.causal_lm import CausalLM
from llmtrainer.optim.groups import group
from llmtrainer.parallel.engines.single import SingleEngine
from llmtrainer.training.memory_report import Memory, measured, planned
from tests.worlds import ragged_documents, row_batch, tiny_model

WEIGHTS = 2 * 320 * 64 + 64 + 2 * (64 * 64 + 2 * 32 * 64 + 64 * 64 + 3 * 176 * 64 + 2 * 64)
"""Two layers of width 64, four heads on two key heads of 16, MLPs of 176, a table and a head of 320 ids."""
TENSORS = 3 + 2 * 9


def kept_by_hand(B: int, T: int) -> int:
    """float32 numbers that backward needs of B rows of T tokens, layer by layer."""
    N, D, K, F = B * T, 64, 32, 176
    norm = N * D + N                                                  # what it read, and 1 / its size
    read, joined = N * D, (D + 2 * K) * D                             # by q, k and v: the matrices lie side by side
    attention = read + joined + N * D + 2 * N * K + B * 4 * T * T + N * D     # q, k and v, probabilities, output
    mlp = N * D + 2 * N * F                                           # input, gate and up
    angles, head = 2 * N * 8, 3 * N                                   # cosines, sines; log-sums, weights, 1 / size
    ids = 2 * N * 2                                                   # read and wanted, of 8 bytes each
    return 4 * (2 * (2 * norm + attention + mlp) + angles + ids + 2 * N * D + head)


@pytest.mark.parametrize(("B", "T"), [(4, 32), (3, 20)])
def test_the_memory_of_a_trained_model_is_what_a_count_by_hand_says(B: int, T: int) -> None:
    policy, engine, objective = tiny_model(), SingleEngine(torch.device("cpu"), "float32"), CausalLM()
    engine.prepare(policy, Rule.model_validate({"kind": "adamw"}), group(policy.named_parameters()))
    batch = row_batch(ragged_documents([T] * B))
    terms = objective.terms(engine.forward(batch, objective.wants), batch)
    engine.backward(loss_of(terms, count([batch])))
    engine.clip(None)
    engine.step(1e-3)
    found = measured(engine, policy, objective, batch, ())
    assert found.parameters == found.gradients == 4 * WEIGHTS
    assert found.optimizer == 2 * 4 * WEIGHTS + 4 * TENSORS + UPDATES, "two moments, and a count for each tensor"
    assert found.activations == kept_by_hand(B, T)
    assert found.total == found.parameters + found.gradients + found.optimizer + found.activations


UPDATES = 8
"""The engine's own count of updates."""


def test_the_published_model_with_adam_is_planned_at_16_bytes_a_parameter() -> None:
    with torch.device("meta"):
        policy = Llama(
            hidden_size=2048, layers=32, heads=16, kv_heads=8, intermediate_size=5632, attention_bias=True
        ).build(64_320)
    plan = planned(policy.named_parameters(), Rule.model_validate({"kind": "adamw"}))
    tensors = len(list(policy.parameters()))
    assert plan.parameters == plan.gradients == 4 * 1_773_668_352
    assert plan.total == 16 * 1_773_668_352 + 4 * tensors, "28.4 GB, and a count for each tensor"


@pytest.mark.parametrize(("kind", "of_matrices"), [("adamw", 8), ("lion", 4), ("muon", 4)])
def test_a_rule_is_planned_by_what_it_keeps_of_each_kind_of_tensor(kind: str, of_matrices: int) -> None:
    large = torch.nn.Parameter(torch.empty(3001, 1024, device="meta"))
    plan = planned([("model.layers.0.mlp.up_proj.weight", large)], Rule.model_validate({"kind": kind}))
    assert abs(plan.optimizer - of_matrices * large.numel()) <= 4


def test_processes_share_what_their_engine_shares() -> None:
    whole = Memory(parameters=400, gradients=400, optimizer=800, activations=50)
    assert whole.of_each("ddp", 4).total == 1650
    assert whole.of_each("zero1", 4).total == 400 + 400 + 200 + 50
    assert whole.of_each("fsdp2", 4).total == 100 + 100 + 200 + 50
