"""Operations per token, utilisation and memory against hand arithmetic."""

from __future__ import annotations

import pytest
import torch

from llmtrainer.models.decoder import Decoder
from llmtrainer.models.families.llama import Llama
from llmtrainer.training.throughput import (
    flops_per_token,
    memory_report,
    multiplied_weights,
    palm_flops_per_token,
    peak_flops,
    peak_of,
    utilisation,
)

ANCHOR = Llama(
    hidden_size=2048,
    intermediate_size=5632,
    layers=32,
    heads=16,
    kv_heads=8,
    attention_bias=True,
    context_length=2048,
)


def on_meta(family: Llama, vocabulary: int) -> Decoder:
    with torch.device("meta"):
        return family.build(vocabulary)


def test_the_palm_convention_gives_the_published_figures() -> None:
    parameters = sum(parameter.numel() for parameter in on_meta(ANCHOR, 64_320).parameters())
    assert parameters == 1_773_668_352
    per_token = palm_flops_per_token(parameters, layers=32, heads=16, head_size=128, sequence_length=2048)
    assert per_token == 12_252_622_848
    used = utilisation(2_097_152 / 37.785, per_token, 4 * 312e12)
    assert used is not None and round(100 * used, 2) == 54.49


def test_a_token_costs_six_operations_per_multiplied_weight_and_half_of_full_attention() -> None:
    # Per layer: q and o 16 x 16, k and v 8 x 16, three of 32 x 16. Once: the head of 50 x 16.
    family = Llama(hidden_size=16, intermediate_size=32, layers=3, heads=4, kv_heads=2, attention_bias=True)
    weights = 3 * (2 * 16 * 16 + 2 * 8 * 16 + 3 * 32 * 16) + 50 * 16
    assert flops_per_token(on_meta(family, 50), 100) == 6 * weights + 6 * 3 * 16 * 100


def test_a_tied_head_counts_once_and_an_untied_input_table_not_at_all() -> None:
    untied = on_meta(Llama(hidden_size=16, intermediate_size=32, tied_head=False), 50)
    tied = on_meta(Llama(hidden_size=16, intermediate_size=32, tied_head=True), 50)
    assert flops_per_token(tied, 8) == flops_per_token(untied, 8)
    of_all = sum(parameter.numel() for parameter in tied.parameters() if parameter.ndim >= 2)
    assert multiplied_weights(tied.named_parameters(), tied_head=True) == of_all


def test_attention_is_counted_with_its_own_width_where_heads_are_wider_than_the_model() -> None:
    narrow, wide = (Llama(hidden_size=16, intermediate_size=32, layers=2, heads=2, head_size=size) for size in (8, 32))
    grown = flops_per_token(on_meta(wide, 50), 10) - flops_per_token(on_meta(narrow, 50), 10)
    assert grown == 6 * 2 * 4 * 16 * (64 - 16) + 6 * 2 * (64 - 16) * 10


def test_both_sequences_of_a_preference_pair_count_by_their_tokens() -> None:
    # 64 pairs of 2 x 512 tokens in 2 s use a device twice as much as 64 texts of 512: no other factor.
    texts, pairs = 64 * 512, 64 * 2 * 512
    assert utilisation(pairs / 2.0, 1e9, 1e15) == 2 * utilisation(texts / 2.0, 1e9, 1e15)


@pytest.mark.parametrize(
    ("name", "precision", "expected"),
    [
        ("NVIDIA A100-SXM4-80GB", "bfloat16", 312e12),
        ("NVIDIA A100-SXM4-80GB", "float32", 19.5e12),
        ("NVIDIA A800-SXM4-80GB", "bfloat16", 312e12),
        ("NVIDIA H100 80GB HBM3", "bfloat16", 989e12),
        ("NVIDIA H100 PCIe", "bfloat16", 756e12),
        ("NVIDIA H200", "float16", 989e12),
        ("Tesla V100-SXM2-32GB", "float16", 125e12),
        ("Tesla V100-SXM2-32GB", "bfloat16", None),
        ("NVIDIA RTX A1000", "bfloat16", None),
        ("NVIDIA A10G", "bfloat16", None),
        ("NVIDIA GH200 480GB", "bfloat16", None),
        ("NVIDIA H100 80GB HBM3 MIG 1g.10gb", "bfloat16", None),
        ("a card of next year", "bfloat16", None),
    ],
)
def test_a_device_has_its_own_peak_or_none(name: str, precision: str, expected: float | None) -> None:
    assert peak_of(name, precision) == expected


def test_an_unknown_device_has_no_utilisation_rather_than_a_wrong_one() -> None:
    cpu = torch.device("cpu")
    assert peak_flops(cpu, "bfloat16") is None
    assert utilisation(1000.0, 1e9, peak_flops(cpu, "bfloat16")) is None


def test_a_given_peak_wins_over_the_table() -> None:
    assert peak_flops(torch.device("cpu"), "bfloat16", 8e11) == 8e11
    assert utilisation(100.0, 4e9, 8e11) == 0.5


def test_memory_is_counted_in_bytes_of_each_kind() -> None:
    decoder = Llama(hidden_size=16, intermediate_size=32, layers=1, heads=2, tied_head=True).build(20)
    # Embedding 20 x 16, four of 16 x 16, three of 32 x 16, three norms of 16; float32.
    parameters = 4 * (20 * 16 + 4 * 256 + 3 * 512 + 3 * 16)
    decoder.model.embed_tokens.weight.requires_grad_(False)
    state = {"optimizer.a.exp_avg": torch.zeros(10), "optimizer.a.step": torch.zeros((), dtype=torch.float64)}
    report = memory_report(decoder, state, torch.device("cpu"))
    assert report["parameters"] == parameters
    assert report["gradients"] == parameters - 4 * 20 * 16
    assert report["optimizer"] == 4 * 10 + 8
    assert report["peak"] > 10_000_000  # a process with torch in it
