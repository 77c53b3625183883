"""Every attention path is the same function, and documents of one row do not exist for each other."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from llmtrainer.core.batch import Batch
from llmtrainer.models.attention import PATHS
from llmtrainer.models.families.llama import Llama
from llmtrainer.models.visible import BLOCK, Visible
from tests.models.rows import rows, shared_prompt
from tests.tolerances import BFLOAT16_RELATIVE, FLOAT32_HIDDEN, FLOAT64_LOGITS

H, K, C = 4, 2, 8
FAST = [name for name in PATHS if name != "reference"]
BATCHES: dict[str, Batch] = {
    "one token": rows([[1]]),
    "one block exactly": rows([[BLOCK], [BLOCK - 1]]),
    "one more than a block": rows([[BLOCK + 1], [5]]),
    "three blocks, padded": rows([[300], [140], [1]]),
    "packed": rows([[130, 1, 90, 60], [20, 20], [257]]),
    "packed alike": rows([[150, 150], [150, 150]]),
    "a row of padding": rows([[140], []]),
    "shared prompt": shared_prompt(60, [50, 100, 30]),
}
WINDOWS = [None, 1, 17, 1000]


def heads(batch: Batch, dtype: torch.dtype = torch.float64) -> list[Tensor]:
    random = torch.Generator().manual_seed(3)
    B, T = batch.tokens_BT.shape
    return [
        torch.randn(B, T, n, C, generator=random, dtype=torch.float64).to(dtype).requires_grad_() for n in (H, K, K)
    ]


def run(path: str, batch: Batch, window: int | None, dtype: torch.dtype = torch.float64) -> list[Tensor]:
    """The output at real tokens, and the gradients of queries, keys and values."""
    inputs = heads(batch, dtype)
    out = PATHS[path](*inputs, Visible.of(batch, window))
    assert bool(torch.isfinite(out).all()), "padding must stay finite"
    real = batch.document_BT >= 0
    random = torch.Generator().manual_seed(4)
    gradient = torch.randn(out.shape, generator=random, dtype=torch.float64).to(dtype) * real[..., None, None]
    return [out.detach()[real], *torch.autograd.grad(out, inputs, gradient)]


@pytest.mark.parametrize("window", WINDOWS, ids=str)
@pytest.mark.parametrize("batch", BATCHES.values(), ids=BATCHES.keys())
@pytest.mark.parametrize("path", FAST)
def test_every_path_equals_the_definition_forward_and_backward(
    path: str, batch: Batch, window: int | None
) -> None:
    for ours, reference in zip(run(path, batch, window), run("reference", batch, window), strict=True):
        torch.testing.assert_close(ours, reference, rtol=0, atol=FLOAT64_LOGITS)


@pytest.mark.parametrize(("dtype", "relative"), [(torch.float32, FLOAT32_HIDDEN), (torch.bfloat16, BFLOAT16_RELATIVE),
                                                 (torch.float16, BFLOAT16_RELATIVE)], ids=str)
@pytest.mark.parametrize("path", PATHS)
def test_narrow_types_stay_near_the_exact_result(path: str, dtype: torch.dtype, relative: float) -> None:
    batch = BATCHES["packed"]
    for ours, exact in zip(run(path, batch, 40, dtype), run("reference", batch, 40), strict=True):
        assert ours.dtype == dtype
        assert float((ours.double() - exact).norm() / exact.norm()) < relative


def test_probabilities_computed_again_are_those_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    kept = run("blocks", BATCHES["packed"], None, torch.float32)
    monkeypatch.setattr("llmtrainer.models.attention._KEPT_BYTES", 0)
    for one, other in zip(kept, run("blocks", BATCHES["packed"], None, torch.float32), strict=True):
        assert torch.equal(one, other)


def test_blocks_skip_the_keys_that_no_row_needs() -> None:
    lengths = [(b.start, b.earliest) for b in Visible.of(rows([[200, 100], [210, 90]]), None).blocks]
    assert lengths == [(0, 0), (128, 0), (256, 192)], "the first key is rounded down to a multiple of 32"
    windowed = [(b.start, b.earliest) for b in Visible.of(rows([[300]]), 20).blocks]
    assert windowed == [(0, 0), (128, 96), (256, 224)]
    borders = [(b.start, b.stop, b.earliest) for b in Visible.of(rows([[200, 15, 45, 300]]), None).blocks]
    assert borders == [(0, 128, 0), (128, 224, 0), (224, 288, 192), (288, 384, 256), (384, 480, 256), (480, 560, 256)]
    plain = Visible.of(rows([[300], [140]]), None)
    assert all(block.hidden_B11QK is None for block in plain.blocks), "padding alone needs no mask"


@pytest.mark.parametrize("window", [None, 30], ids=str)
@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_perturbing_one_document_leaves_the_others_bitwise_equal(
    path: str, dtype: torch.dtype, window: int | None
) -> None:
    model = Llama(hidden_size=32, layers=2, heads=4, kv_heads=2, sliding_window=window).build(320, dtype)
    model.initialise(0)
    model.path = path
    batch = rows([[60, 90, 50], [200]])
    tokens = batch.tokens_BT.clone()
    tokens[0, 60:150] = (tokens[0, 60:150] + 7) % 320
    untouched = torch.ones(2, 200, dtype=torch.bool)
    untouched[0, 60:150] = False
    assert_same_outside(model, batch, replace(batch, tokens_BT=tokens), untouched)


def assert_same_outside(model: Any, before: Batch, after: Batch, untouched: Tensor) -> None:
    found = []
    for batch in (before, after):
        model.zero_grad()
        out = model(batch, ("logp",)).logp_BT
        # The loss of the untouched documents alone: their gradient must not know of the others either.
        (out * untouched).sum().backward()
        found.append((out.detach(), {name: p.grad.clone() for name, p in model.named_parameters()}))
    (first, first_gradients), (second, second_gradients) = found
    assert torch.equal(first[untouched], second[untouched])
    assert not torch.equal(first[~untouched], second[~untouched])
    for name, gradient in first_gradients.items():
        if name != "model.embed_tokens.weight":
            assert torch.equal(gradient, second_gradients[name]), name


@pytest.mark.parametrize("path", PATHS)
def test_a_packed_document_has_the_hidden_states_and_gradients_it_has_alone(path: str) -> None:
    model = Llama(hidden_size=32, layers=2, heads=4, kv_heads=2).build(320, torch.float64)
    model.initialise(0)
    model.path = path
    packed = rows([[130, 1, 70], [80, 121]])
    hidden = model.hidden(packed)
    whole = torch.autograd.grad(model(packed, ("logp",)).logp_BT.sum(), list(model.parameters()))
    parts = [torch.zeros_like(p) for p in model.parameters()]
    for b, row in enumerate(([130, 1, 70], [80, 121])):
        start = 0
        for length in row:
            span = slice(start, start + length)
            alone = replace(rows([[length]]), tokens_BT=packed.tokens_BT[b : b + 1, span],
                            targets_BT=packed.targets_BT[b : b + 1, span])
            torch.testing.assert_close(model.hidden(alone)[0], hidden[b, span], rtol=0, atol=FLOAT64_LOGITS)
            gradients = torch.autograd.grad(model(alone, ("logp",)).logp_BT.sum(), list(model.parameters()))
            parts = [sum_so_far + g for sum_so_far, g in zip(parts, gradients, strict=True)]
            start += length
    for one, other in zip(parts, whole, strict=True):
        torch.testing.assert_close(one, other, rtol=0, atol=FLOAT64_LOGITS)


@pytest.mark.parametrize("path", PATHS)
def test_padding_has_no_gradient(path: str) -> None:
    model = Llama(hidden_size=32, layers=2, heads=4, kv_heads=2).build(320, torch.float32)
    model.initialise(0)
    model.path = path
    batch = rows([[140], [20], []])
    padding = batch.document_BT < 0
    tokens = batch.tokens_BT.clone()
    tokens[padding], tokens[~padding] = 319, tokens[~padding] % 319
    out = model(replace(batch, tokens_BT=tokens), ("logp",)).logp_BT
    assert bool((out[padding] == 0).all())
    out.sum().backward()
    gradient = model.model.embed_tokens.weight.grad
    assert bool((gradient[319] == 0).all()) and bool(torch.isfinite(gradient).all())
