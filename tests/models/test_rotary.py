"""Rotary tables against their formulas: plain, partial, and stretched over more text in four ways."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

from llmtrainer.models.families.llama import Llama
from llmtrainer.models.layers import rotate
from llmtrainer.models.rotary import RopeScaling, Rotary, document_lengths
from tests.models import rope
from tests.models.rows import rows
from tests.models.test_decoder import decoder, logits
from tests.tolerances import FLOAT32_FREQUENCY_RELATIVE, FLOAT64_LOGITS

SCALINGS = pytest.mark.parametrize("scaling", rope.KINDS.values(), ids=rope.KINDS.keys())


def scaled(scaling: dict[str, Any] | None) -> RopeScaling | None:
    return None if scaling is None else RopeScaling.model_validate(scaling)


@pytest.mark.parametrize("size", [128, 24])
@pytest.mark.parametrize("scaling", [None, *rope.KINDS.values()], ids=["plain", *rope.KINDS])
def test_the_table_is_the_formula_also_far_away(scaling: dict[str, Any] | None, size: int) -> None:
    positions = torch.tensor([[0, 1, 2, 77], [1023, 8191, 100_000, 131_071]], dtype=torch.int32)
    rotary = Rotary(size, 500_000.0, scaled(scaling))
    found = rotary(positions, 131_072, torch.float64)
    expected = rope.table(positions.numpy(), size, 500_000.0, scaling, 131_072)
    for ours, theirs in zip(found, expected, strict=True):
        assert bool(ours.isfinite().all())
        np.testing.assert_allclose(ours[:, :, 0].numpy(), theirs, rtol=0, atol=FLOAT64_LOGITS)


@pytest.mark.parametrize("share", [1.0, 0.5], ids=["whole", "partial"])
@SCALINGS
def test_frequencies_are_those_of_transformers(scaling: dict[str, Any], share: float) -> None:
    transformers = pytest.importorskip("transformers")
    from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

    given = {key: value for key, value in scaling.items() if key not in ("kind", "original_context")}
    original = scaling.get("original_context")
    config = transformers.LlamaConfig(hidden_size=256, num_attention_heads=2, max_position_embeddings=original or 512)
    config.rope_parameters = {"rope_type": scaling["kind"], "rope_theta": 5e5, "partial_rotary_factor": share, **given}
    if scaling["kind"] in ("yarn", "llama3"):
        config.rope_parameters["original_max_position_embeddings"] = original
    if scaling["kind"] == "llama3":
        config.rope_parameters = {"low_freq_factor": 1.0, "high_freq_factor": 4.0, **config.rope_parameters}
    for length in (5, 1000):
        expected, magnitude = ROPE_INIT_FUNCTIONS[scaling["kind"]](config, seq_len=length)
        rotary = Rotary(int(128 * share), 5e5, scaled(scaling))
        assert expected.shape == rotary.frequencies(length).shape
        np.testing.assert_allclose(rotary.frequencies(length), expected, rtol=FLOAT32_FREQUENCY_RELATIVE)
        assert (1.0 if rotary.scaling is None else rotary.scaling.magnitude) == pytest.approx(magnitude, rel=1e-12)


@pytest.mark.parametrize("share", [1.0, 0.5], ids=["whole", "partial"])
@SCALINGS
def test_scores_depend_on_the_distance_alone(scaling: dict[str, Any], share: float) -> None:
    random = torch.Generator().manual_seed(0)
    q, k = (torch.randn(1, 1, 1, 16, generator=random, dtype=torch.float64) for _ in range(2))
    rotary = Rotary(int(16 * share), 10_000.0, scaled(scaling))

    def score(i: int, j: int) -> float:
        turned = [rotate(x, rotary(torch.tensor([[at]]), 4096, torch.float64)) for x, at in ((q, i), (k, j))]
        return float((turned[0] * turned[1]).sum())

    assert score(5, 2) == pytest.approx(score(3, 0), abs=FLOAT64_LOGITS)
    assert score(4003, 4000) == pytest.approx(score(3, 0), abs=FLOAT64_LOGITS)
    assert score(5, 3) != pytest.approx(score(3, 0), abs=1e-4)


@pytest.mark.parametrize("kind", ["linear", "dynamic", "yarn", "llama3"])
def test_a_factor_of_one_is_no_scaling(kind: str) -> None:
    original = {} if kind == "linear" else {"original_context": 4096}
    scaling = RopeScaling.model_validate({"kind": kind, "factor": 1.0, **original})
    positions = torch.arange(4096)[None]
    found = Rotary(64, 10_000.0, scaling)(positions, 4096, torch.float64)
    for ours, plain in zip(found, Rotary(64, 10_000.0)(positions, 4096, torch.float64), strict=True):
        torch.testing.assert_close(ours, plain, rtol=0, atol=FLOAT64_LOGITS)


@SCALINGS
def test_rows_beyond_the_original_context_give_finite_logits_and_gradients(scaling: dict[str, Any]) -> None:
    model, batch = decoder(rope_scaling=scaling), rows([[300], [7, 200]])
    model(batch, ("logp",)).logp_BT.sum().backward()
    assert bool(logits(model, batch).isfinite().all())
    assert all(bool(parameter.grad.isfinite().all()) for parameter in model.parameters())


def test_the_length_of_a_document_is_found_from_its_positions() -> None:
    # Two documents and padding; one that several answers share a prompt in; a row of padding.
    positions = torch.tensor([[0, 1, 2, 0, 1, 0, 0], [0, 1, 2, 3, 2, 3, 4], [0] * 7])
    assert document_lengths(positions).tolist() == [[3, 3, 3, 2, 2, 1, 1], [5] * 7, [1] * 7]


def test_a_dynamic_base_follows_each_document_and_not_its_neighbours() -> None:
    model = decoder(rope_scaling=rope.KINDS["dynamic"])     # of an original context of 8
    batch = rows([[20, 5], [6, 13, 2]])
    together = logits(model, batch)
    for row, start, length in ((0, 0, 20), (0, 20, 5), (1, 0, 6), (1, 6, 13), (1, 19, 2)):
        span = slice(start, start + length)
        alone = rows([[length]])
        alone.tokens_BT.copy_(batch.tokens_BT[row : row + 1, span])
        torch.testing.assert_close(together[row, span], logits(model, alone)[0], rtol=0, atol=FLOAT64_LOGITS)


def test_a_dynamic_base_is_that_of_the_document_and_plain_within_the_original_context() -> None:
    rotary = Rotary(16, 10_000.0, scaled(rope.KINDS["dynamic"]))
    position = torch.tensor([[*range(12), *range(8), *range(20)]])
    found = rotary.of_documents(position, 40, torch.float64)
    start = 0
    for length in (12, 8, 20):
        expected = rope.table(np.arange(length), 16, 10_000.0, rope.KINDS["dynamic"], length)
        for ours, theirs in zip(found, expected, strict=True):
            np.testing.assert_allclose(ours[0, start : start + length, 0], theirs, rtol=0, atol=FLOAT64_LOGITS)
        start += length
    plain = Rotary(16, 10_000.0)(position[:, 12:20], 8, torch.float64)
    assert torch.equal(found[0][:, 12:20], plain[0]) and torch.equal(found[1][:, 12:20], plain[1])


@pytest.mark.parametrize("capacity", [8, 24])
def test_a_cache_has_one_dynamic_base_from_its_first_token_on(capacity: int) -> None:
    # Keys that were turned by one base must not meet queries that were turned by another.
    model, batch = decoder(rope_scaling=rope.KINDS["dynamic"]), rows([[capacity]])
    cache, found = model.cache(1, capacity), []
    for token in range(capacity):
        found.append(model.read(batch.tokens_BT[:, token : token + 1], torch.tensor([1]), cache))
    whole = logits(model, batch)
    torch.testing.assert_close(torch.stack(found, 1), whole, rtol=0, atol=FLOAT64_LOGITS)


def test_a_table_for_a_short_text_is_not_taken_for_a_longer_one() -> None:
    rotary, position = Rotary(16, 10_000.0, scaled(rope.KINDS["dynamic"])), torch.arange(8)[None]
    first = rotary(position, 8, torch.float64)[0]
    assert torch.equal(rotary(position, 5, torch.float64)[0], first)
    longer = rotary(position, 30, torch.float64)[0]
    assert not torch.allclose(longer[:, 1:], first[:, 1:])
    assert torch.equal(rotary(position, 8, torch.float64)[0], first)


@pytest.mark.parametrize(
    ("scaling", "words"),
    [
        ({"kind": "yarn", "factor": 2.0, "original_context": 8, "mscale": 1.0}, "without the other"),
        ({"kind": "yarn", "factor": 2.0, "original_context": 8, "mscale": 1.0, "mscale_all_dim": 1.0,
          "attention_factor": 1.0}, "beside mscale"),
        ({"kind": "yarn", "factor": 2.0, "original_context": 8, "beta_fast": 1.0}, "beta_fast"),
        ({"kind": "llama3", "factor": 2.0, "original_context": 8, "high_freq_factor": 1.0}, "high_freq_factor"),
        ({"kind": "linear", "factor": 0.5}, "factor"),
        ({"kind": "longrope", "factor": 2.0}, "longrope"),
        ({"kind": "dynamic", "factor": 2.0}, "original_context"),
    ],
)  # fmt: skip
def test_settings_without_a_meaning_are_refused(scaling: dict[str, Any], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        Llama.model_validate({"rope_scaling": scaling})


def test_a_single_pair_of_channels_has_no_base_to_stretch() -> None:
    with pytest.raises(ValueError, match="more than 2 channels"):
        Llama(hidden_size=8, heads=4, rope_scaling=scaled(rope.KINDS["dynamic"]))
