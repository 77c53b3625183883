"""The decoder is the published function: parameter counts, logits, gradients, initial weights, dropout."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch

from llmtrainer.base.errors import UserError
from llmtrainer.core.batch import Batch
from llmtrainer.models.decoder import Decoder
from llmtrainer.models.families.llama import Llama
from tests.models.rows import reference_logits, rows, shared_prompt
from tests.tolerances import FLOAT64_LOGITS

TINY: dict[str, Any] = dict(hidden_size=32, layers=2, heads=4, kv_heads=2, intermediate_size=48, context_length=64)
SHAPES: dict[str, dict[str, Any]] = {
    "plain": {},
    "one key head": dict(kv_heads=1),
    "multi-head, tied": dict(kv_heads=None, tied_head=True),
    "all biases": dict(attention_bias=True, output_bias=True, mlp_bias=True),
    "wide heads, norms of queries and keys": dict(head_size=12, query_key_norm=True),
    "partial rotary": dict(rotary_share=0.5, rope_theta=500.0),
    "window": dict(sliding_window=5),
}


def decoder(seed: int = 1, compute: torch.dtype = torch.float64, vocabulary: int = 320, **fields: Any) -> Decoder:
    made = Llama(**{**TINY, **fields}).build(vocabulary, compute)
    made.initialise(seed)
    with torch.no_grad():
        for name, parameter in made.named_parameters():
            # Larger than at the start of a run, and biases and norms unlike 0 and 1, so that each one matters.
            random = torch.Generator().manual_seed(len(name))
            parameter.add_(torch.randn(parameter.shape, generator=random), alpha=0.2)
    return made


def logits(model: Decoder, batch: Batch) -> torch.Tensor:
    return model.hidden(batch) @ model.head_weight.to(model.compute).t()


@pytest.mark.parametrize(
    ("fields", "vocabulary", "parameters"),
    [
        # The published 1.7B run: 1,773,404,160 in matrices and 264,192 in norms and biases.
        (dict(hidden_size=2048, layers=32, heads=16, kv_heads=8, intermediate_size=5632, attention_bias=True),
         64_320, 1_773_668_352),
        (dict(hidden_size=2048, layers=32, heads=16, kv_heads=8, attention_bias=True), 64_320, 1_773_668_352),
        # SmolLM2-135M, as its model card counts it.
        (dict(hidden_size=576, layers=30, heads=9, kv_heads=3, intermediate_size=1536, tied_head=True),
         49_152, 134_515_008),
        # Llama 2 7B.
        (dict(hidden_size=4096, layers=32, heads=32, intermediate_size=11_008), 32_000, 6_738_415_616),
        # Qwen3-0.6B: heads wider than hidden_size / heads, norms of queries and keys.
        (dict(hidden_size=1024, layers=28, heads=16, kv_heads=8, head_size=128, intermediate_size=3072,
              query_key_norm=True, tied_head=True), 151_936, 596_049_920),
    ],
)
def test_number_of_parameters_is_the_published_one(
    fields: dict[str, Any], vocabulary: int, parameters: int
) -> None:
    with torch.device("meta"):
        made = Llama(**fields).build(vocabulary)
        made.initialise(0)
    assert sum(parameter.numel() for parameter in made.parameters()) == parameters


def test_matrices_and_vectors_of_the_published_run_have_their_counts() -> None:
    with torch.device("meta"):
        made = Llama(hidden_size=2048, layers=32, heads=16, kv_heads=8, attention_bias=True).build(64_320)
    counts = {True: 0, False: 0}
    for parameter in made.parameters():
        counts[parameter.ndim >= 2] += parameter.numel()
    assert counts == {True: 1_773_404_160, False: 264_192}


@pytest.mark.parametrize("fields", SHAPES.values(), ids=SHAPES.keys())
def test_logits_are_those_of_the_formulas(fields: dict[str, Any]) -> None:
    # Two documents in a row, one row with padding, one document of a single token.
    model, batch = decoder(**fields), rows([[7, 1, 4], [9]])
    expected = torch.from_numpy(reference_logits(model, batch))
    real = batch.document_BT >= 0
    torch.testing.assert_close(logits(model, batch)[real], expected[real], rtol=0, atol=FLOAT64_LOGITS)


def test_logits_of_a_shared_prompt_are_those_of_the_formulas() -> None:
    model, batch = decoder(sliding_window=6), shared_prompt(4, [3, 5, 2])
    expected = torch.from_numpy(reference_logits(model, batch))
    torch.testing.assert_close(logits(model, batch), expected, rtol=0, atol=FLOAT64_LOGITS)


def test_answers_that_share_a_prompt_score_as_in_rows_of_their_own() -> None:
    model, batch = decoder(), shared_prompt(4, [3, 5, 2])
    start = 4
    together = logits(model, batch)[0]
    for length in (3, 5, 2):
        own = [*range(4), *range(start, start + length)]
        alone = replace(rows([[4 + length]]), tokens_BT=batch.tokens_BT[:, own])
        torch.testing.assert_close(together[own], logits(model, alone)[0], rtol=0, atol=FLOAT64_LOGITS)
        start += length


def test_logp_is_the_log_softmax_of_the_logits_where_a_target_counts_and_zero_elsewhere() -> None:
    model, batch = decoder(), rows([[7, 1, 4], [9]])
    batch.weights_BT[0, 2:5] = 0.0
    out = model(batch, ("logp", "entropy", "log_partition"))
    every = logits(model, batch)
    logp = every.log_softmax(-1)
    counts = batch.weights_BT != 0
    expected = logp.gather(-1, batch.targets_BT[..., None]).squeeze(-1)
    torch.testing.assert_close(out.logp_BT, expected * counts, rtol=0, atol=FLOAT64_LOGITS)
    torch.testing.assert_close(out.entropy_BT, -(logp.exp() * logp).sum(-1) * counts, rtol=0, atol=FLOAT64_LOGITS)
    torch.testing.assert_close(out.log_partition_BT, every.logsumexp(-1) * counts, rtol=0, atol=FLOAT64_LOGITS)
    assert model(batch, ("entropy",)).logp_BT is None


def test_equal_numbers_of_heads_are_multi_head_attention() -> None:
    named, unnamed = decoder(kv_heads=4), decoder(kv_heads=None)
    batch = rows([[9, 3]])
    assert torch.equal(logits(named, batch), logits(unnamed, batch))


def test_shared_key_heads_are_repeated_key_heads() -> None:
    shared, whole = decoder(kv_heads=2), decoder(kv_heads=4)
    state = shared.state_dict()
    for name in state:
        if ".k_proj." in name or ".v_proj." in name:
            state[name] = state[name].view(2, 8, -1).repeat_interleave(2, dim=0).flatten(0, 1)
    whole.load_state_dict(state)
    batch = rows([[9, 3]])
    torch.testing.assert_close(logits(shared, batch), logits(whole, batch), rtol=0, atol=FLOAT64_LOGITS)


def test_initial_matrices_have_the_promised_spread() -> None:
    model = Llama(hidden_size=256, layers=8, heads=4, query_key_norm=True, mlp_bias=True).build(1024)
    model.initialise(7)
    for name, parameter in model.named_parameters():
        if parameter.ndim == 1:
            assert torch.all(parameter == (0.0 if name.endswith("bias") else 1.0)), name
            continue
        narrow = name.endswith(("o_proj.weight", "down_proj.weight"))
        assert float(parameter.detach().std()) == pytest.approx(0.02 / 4 if narrow else 0.02, rel=0.02), name
        # Five standard errors of the mean of the smallest matrix.
        assert abs(float(parameter.detach().mean())) < 5 * 0.02 / 256, name


def test_initial_weights_are_a_function_of_seed_and_name() -> None:
    one, deeper = (Llama(**{**TINY, "layers": layers}).build(320) for layers in (2, 2))
    one.initialise(3)
    torch.manual_seed(99)
    deeper.initialise(3)
    wide = Llama(**TINY).build(320, torch.float64)
    wide.initialise(3)
    for name, value in one.state_dict().items():
        assert torch.equal(value, deeper.state_dict()[name])
        assert torch.equal(value.double(), wide.state_dict()[name])
    deeper.initialise(4)
    assert not torch.equal(one.head_weight, deeper.head_weight)
    layers = one.model.layers
    assert not torch.equal(layers[0].mlp.up_proj.weight, layers[1].mlp.up_proj.weight)


def test_dropout_does_not_depend_on_how_a_step_is_cut_into_micro_batches() -> None:
    model, batch = decoder(dropout=0.3), rows([[9], [5, 4], [7]])
    batch = replace(batch, dropout_key=11)
    whole = model(batch, ("logp",)).logp_BT
    assert whole is not None
    for row in range(3):
        tensors = {n: getattr(batch, n)[row : row + 1] for n in
                   ("tokens_BT", "targets_BT", "weights_BT", "document_BT", "position_BT", "sequence_BT", "place_B")}
        alone = model(replace(batch, **tensors), ("logp",)).logp_BT
        torch.testing.assert_close(alone[0], whole[row], rtol=0, atol=FLOAT64_LOGITS)
    other_step = model(replace(batch, dropout_key=12), ("logp",)).logp_BT
    assert not torch.equal(other_step, whole)
    model.eval()
    assert not torch.equal(model(batch, ("logp",)).logp_BT, whole)


def test_every_place_of_dropout_draws_its_own_mask(monkeypatch: pytest.MonkeyPatch) -> None:
    sites: list[int] = []

    def spy(x: torch.Tensor, rate: float, key: int, place_B: torch.Tensor, site: int, *_: object) -> torch.Tensor:
        sites.append(site)
        return x

    monkeypatch.setattr("llmtrainer.models.decoder.dropout", spy)
    decoder(dropout=0.1)(rows([[5]]), ("logp",))
    assert sorted(set(sites)) == sorted(sites) and len(sites) == 5


@pytest.mark.parametrize("compute", [torch.bfloat16, torch.float16])
def test_a_float32_residual_stream_is_nearer_to_the_exact_one(compute: torch.dtype) -> None:
    def made(compute: torch.dtype, kept: bool) -> Decoder:
        # As a run begins. Weights as large as this file's others amplify whatever is rounded, until it is chance.
        model = Llama(**{**TINY, "layers": 8, "fp32_residual": kept}).build(320, compute)
        model.initialise(1)
        return model

    batch = rows([[40], [30]])
    exact = logits(made(torch.float64, False), batch)
    errors = {}
    for kept in (False, True):
        model = made(compute, kept)
        assert model.residual(batch).dtype == (torch.float32 if kept else compute)
        error = (logits(model, batch).double() - exact)[batch.document_BT >= 0]
        errors[kept] = float(error.detach().square().mean())
    assert 2.0 * errors[True] < errors[False]


def test_masters_are_float32_whatever_the_compute_type() -> None:
    for compute in (torch.bfloat16, torch.float16, torch.float32):
        assert {p.dtype for p in Llama(**TINY).build(64, compute).parameters()} == {torch.float32}
    assert {p.dtype for p in Llama(**TINY).build(64, torch.float64).parameters()} == {torch.float64}


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        (dict(heads=4, kv_heads=3), "share"),
        (dict(hidden_size=30, heads=4), "multiple"),
        (dict(hidden_size=64, heads=4, rotary_share=0.3), "rotary_share"),
    ],
)
def test_shapes_that_cannot_be_are_refused_with_a_fix(fields: dict[str, Any], words: str) -> None:
    with pytest.raises(ValueError, match=words) as caught:
        Llama(**fields)
    assert isinstance(caught.value, UserError) or "fix" in str(caught.value)


def test_only_pieces_without_data_dependent_shapes_are_compiled(monkeypatch: pytest.MonkeyPatch) -> None:
    compiled: list[str] = []

    def spy(part: Any, dynamic: bool) -> Any:
        assert dynamic, "kernels that depend on the history of shapes would make a resumed run differ"
        compiled.append(part.__name__)
        return part

    monkeypatch.setattr(torch, "compile", spy)
    plain, pieces, batch = decoder(), decoder(), rows([[7, 1, 4], [9]])
    pieces.compile_pieces()
    assert set(compiled) == {"project", "finish", "_reduce", "_differentiate_at_once"}
    found = [model(batch, ("logp",)).logp_BT for model in (plain, pieces)]
    torch.testing.assert_close(found[1], found[0], rtol=0, atol=FLOAT64_LOGITS)
    for logp in found:
        logp.sum().backward()
    for one, other in zip(plain.parameters(), pieces.parameters(), strict=True):
        torch.testing.assert_close(one.grad, other.grad, rtol=0, atol=FLOAT64_LOGITS)
