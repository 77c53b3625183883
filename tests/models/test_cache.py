"""Reading with a cache equals reading everything at once, whatever the rows' lengths."""

from __future__ import annotations

import weakref
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from llmtrainer.core import products
from llmtrainer.models import prepacked, reading
from llmtrainer.models.decoder import Decoder
from tests.models.rows import rows
from tests.models.test_decoder import decoder, logits
from tests.tolerances import FLOAT32_SUM_RELATIVE, FLOAT64_LOGITS

FIELDS: dict[str, dict[str, Any]] = {
    "full": {}, "window": dict(sliding_window=5), "window of one": dict(sliding_window=1),
    "query and key norms, tied": dict(query_key_norm=True, tied_head=True), "partial rotary": dict(rotary_share=0.5),
}


def read_in_pieces(model: Decoder, tokens_BT: Tensor, pieces: list[list[int]], padding: int = 3) -> list[Tensor]:
    """Logits after each piece; piece i of row b is its next pieces[i][b] tokens, the rest of the row is junk."""
    B, T = tokens_BT.shape
    cache = model.cache(B, T)
    place, found = [0] * B, []
    for lengths in pieces:
        width = max(lengths) + padding
        fed = torch.full((B, width), 7, dtype=torch.int64)
        for b, n in enumerate(lengths):
            fed[b, :n] = tokens_BT[b, place[b] : place[b] + n]
            place[b] += n
        found.append(model.read(fed, torch.tensor(lengths), cache))
        assert cache.lengths_B.tolist() == place
    return found


@pytest.mark.parametrize("fields", FIELDS.values(), ids=FIELDS.keys())
def test_logits_by_pieces_are_those_of_the_whole(fields: dict[str, Any]) -> None:
    model, batch = decoder(**fields), rows([[24], [24], [24]])
    whole = logits(model, batch)
    pieces = [[5, 9, 1], [2, 1, 4], *[[1, 1, 1]] * 8, [9, 6, 11]]
    place = torch.zeros(3, dtype=torch.int64)
    for lengths, found in zip(pieces, read_in_pieces(model, batch.tokens_BT, pieces), strict=True):
        place += torch.tensor(lengths)
        torch.testing.assert_close(found, whole[torch.arange(3), place - 1], rtol=0, atol=FLOAT64_LOGITS)
    assert place.tolist() == [24, 24, 24], "rows must be read up to the capacity"


@pytest.mark.parametrize("window", [None, 40], ids=str)
def test_prompts_longer_than_a_block_are_read_alike(window: int | None) -> None:
    model, batch = decoder(sliding_window=window), rows([[300], [300]])
    whole = logits(model, batch)
    first, second = read_in_pieces(model, batch.tokens_BT, [[140, 290], [160, 10]])
    torch.testing.assert_close(first, whole[[0, 1], [139, 289]], rtol=0, atol=FLOAT64_LOGITS)
    torch.testing.assert_close(second, whole[[0, 1], [299, 299]], rtol=0, atol=FLOAT64_LOGITS)


def test_a_row_with_no_new_token_stays_as_it_is() -> None:
    model, batch = decoder(), rows([[10], [10]])
    whole = logits(model, batch)
    found = read_in_pieces(model, batch.tokens_BT, [[4, 9], [3, 0], [0, 1], [3, 0]])
    torch.testing.assert_close(found[2][1], whole[1, 9], rtol=0, atol=FLOAT64_LOGITS)
    torch.testing.assert_close(found[3][0], whole[0, 9], rtol=0, atol=FLOAT64_LOGITS)


@pytest.mark.parametrize("window", [None, 6], ids=str)
def test_greedy_with_a_cache_is_greedy_without_for_fifty_tokens(window: int | None) -> None:
    model = decoder(sliding_window=window, compute=torch.float32)
    prompts = [[3, 14, 15], [9, 2, 6, 5, 3, 5, 8], [97]]
    cache = model.cache(3, 64)
    lengths = torch.tensor([len(p) for p in prompts])
    padded = torch.tensor([p + [0] * (7 - len(p)) for p in prompts])
    following = model.read(padded, lengths, cache).argmax(-1)
    grown = [list(p) for p in prompts]
    for _ in range(50):
        for row, token in zip(grown, following.tolist(), strict=True):
            row.append(token)
        following = model.read(following[:, None], torch.ones(3, dtype=torch.int64), cache).argmax(-1)
    for prompt, row in zip(prompts, grown, strict=True):
        alone = list(prompt)
        for _ in range(50):
            batch = rows([[len(alone)]])
            batch.tokens_BT.copy_(torch.tensor([alone]))
            alone.append(int(logits(model, batch)[0, -1].argmax()))
        assert alone == row


def test_a_window_reads_what_a_cut_context_reads() -> None:
    # One layer: what is further back than the window cannot reach the last token by any other way.
    model, batch = decoder(layers=1, sliding_window=5), rows([[20]])
    cache = model.cache(1, 20)
    whole = model.read(batch.tokens_BT, torch.tensor([20]), cache)
    cut_cache = model.cache(1, 5)
    cut = model.read(batch.tokens_BT[:, 15:], torch.tensor([5]), cut_cache)
    torch.testing.assert_close(whole, cut, rtol=0, atol=FLOAT64_LOGITS)


@pytest.mark.parametrize("compute", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("natively", [True, False])
def test_logits_are_float32_and_the_cache_holds_the_type_that_is_multiplied(
    compute: torch.dtype, natively: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(products, "_SLOW", {torch.bfloat16: not natively, torch.float16: not natively})
    model, batch = decoder(compute=compute), rows([[12], [12]])
    cache = model.cache(2, 12)
    found = model.read(batch.tokens_BT, torch.tensor([12, 6]), cache)
    assert found.dtype == torch.float32 and cache.keys[0].dtype == (compute if natively else torch.float32)
    expected = logits(model, batch).float()
    if not natively:    # between weights of the narrow type nothing is rounded to it
        exact = decoder()
        for rounded, master in zip(exact.parameters(), model.parameters(), strict=True):
            rounded.data = (master.to(compute) if master.ndim == 2 else master).double()
        expected = logits(exact, batch).float()
    torch.testing.assert_close(found, expected[[0, 1], [11, 5]], rtol=2e-2, atol=2e-2)


def test_a_cache_holds_the_weights_that_filled_it() -> None:
    model, batch = decoder(compute=torch.bfloat16), rows([[12]])
    cache, other = model.cache(1, 12), model.cache(1, 12)
    before = model.read(batch.tokens_BT, torch.tensor([12]), cache)
    with torch.no_grad():
        model.model.layers[0].mlp.up_proj.weight.zero_()
    assert torch.equal(model.read(batch.tokens_BT, torch.tensor([12]), other), before)
    assert not torch.equal(model.read(batch.tokens_BT, torch.tensor([12]), model.cache(1, 12)), before)


def test_a_cache_in_float32_holds_them_too() -> None:
    model, batch = decoder(compute=torch.float32), rows([[12]])
    cache = model.cache(1, 12)
    before = model.read(batch.tokens_BT, torch.tensor([12]), model.cache(1, 12))
    with torch.no_grad():
        for weight in model.parameters():
            weight.mul_(1.1)
    assert torch.equal(model.read(batch.tokens_BT, torch.tensor([12]), cache), before)


def test_caches_share_their_copy_of_the_weights_until_one_weight_changes() -> None:
    model = decoder(compute=torch.bfloat16)
    first = model.cache(1, 4)
    assert model.cache(2, 8).weights is first.weights
    with torch.no_grad():
        model.model.layers[1].mlp.down_proj.weight[0, 0] += 1.0
    second = model.cache(1, 4)
    assert second.weights is not first.weights
    model.model.norm.weight.data[3] += 1.0    # which no version counter sees
    third = model.cache(1, 4)
    assert third.weights is not second.weights
    kept = weakref.ref(third.weights)
    del third
    assert kept() is None, "a policy in training must not hold a second copy of itself"


@pytest.mark.parametrize("window", [None, 5], ids=str)
@pytest.mark.parametrize("taken", [[0, 3, 2], [2, 3], [1, 1, 0, 3, 1], [3, 2, 1, 0], [0, 1, 2, 3]], ids=str)
def test_rows_that_are_taken_go_on_as_if_they_had_been_alone(taken: list[int], window: int | None) -> None:
    model, batch = decoder(sliding_window=window), rows([[16]] * 4)
    lengths, more = torch.tensor([3, 9, 6, 1]), torch.tensor([[5], [6], [7], [8]])
    cache = model.cache(4, 16)
    model.read(batch.tokens_BT[:, :9], lengths, cache)
    cache.take(taken)
    assert cache.lengths_B.tolist() == lengths[taken].tolist()
    found = [model.read(more[taken], torch.ones(len(taken), dtype=torch.int64), cache) for _ in range(2)]
    for place, row in enumerate(taken):
        alone = model.cache(1, 16)
        model.read(batch.tokens_BT[row : row + 1, :9], lengths[row : row + 1], alone)
        for step in found:
            expected = model.read(more[row : row + 1], torch.tensor([1]), alone)
            torch.testing.assert_close(step[place], expected[0], rtol=0, atol=FLOAT64_LOGITS)


def test_both_ways_to_attend_with_one_query_are_the_reference() -> None:
    random = torch.Generator().manual_seed(0)
    q_BKGC, k_BKSC, v_BKSC = (
        torch.randn(3, 2, n, 8, generator=random, dtype=torch.float64) for n in (4, 11, 11)
    )
    hidden = torch.zeros(3, 1, 1, 11, dtype=torch.float64)
    hidden[0, ..., 7:], hidden[2, ..., :3] = -torch.inf, -torch.inf
    scores = torch.einsum("bkgc,bksc->bkgs", q_BKGC, k_BKSC) / 8**0.5 + hidden
    expected = torch.einsum("bkgs,bksc->bkgc", scores.softmax(-1), v_BKSC)
    for attend in (reading._fused, reading._by_products):
        torch.testing.assert_close(attend(q_BKGC, k_BKSC, v_BKSC, hidden), expected, rtol=0, atol=FLOAT64_LOGITS)


def test_packed_products_have_the_bits_of_plain_ones_and_without_the_operators_nothing_is_packed(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(products, "_SLOW", {torch.bfloat16: False})
    random = torch.Generator().manual_seed(0)
    weights = [torch.randn(n, 64, generator=random) for n in (96, 32)]
    biases = [torch.randn(n, generator=random) for n in (96, 32)]
    x_NI = torch.randn(7, 64, generator=random).bfloat16()
    plain = F.linear(x_NI, torch.cat(weights).bfloat16(), torch.cat(biases).bfloat16())
    usual = prepacked.Product(weights, biases, torch.bfloat16)
    assert torch.equal(usual(x_NI), plain)
    assert usual.packed == (prepacked.missing() is None)
    monkeypatch.setattr(prepacked, "_PROVED", {})
    monkeypatch.setattr(prepacked, "_multiply", lambda x, packed, bias: F.linear(x, torch.zeros(128, 64).bfloat16()))
    wrong = prepacked.Product(weights, biases, torch.bfloat16)
    assert not wrong.packed, "products with other bits must be refused"
    assert torch.equal(wrong(x_NI), plain)
    monkeypatch.setattr(prepacked, "_PROVED", {})
    monkeypatch.setattr(torch.backends.mkldnn, "is_available", lambda: False)
    assert prepacked.missing() == "torch was built without oneDNN"
    assert torch.equal(prepacked.Product(weights, biases, torch.bfloat16)(x_NI), plain)


def test_packed_products_in_float32_are_right_and_give_a_row_the_same_bits_beside_any_others(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    random = torch.Generator().manual_seed(0)
    weight_OI, bias_O = torch.randn(384, 256, generator=random), torch.randn(384, generator=random)
    x_NI = torch.randn(40, 256, generator=random)
    packed = prepacked.Product([weight_OI], [bias_O], torch.float32)
    exact = F.linear(x_NI.double(), weight_OI.double(), bias_O.double())
    assert (packed(x_NI) - exact).norm() <= FLOAT32_SUM_RELATIVE * exact.norm()
    if packed.packed:
        whole = packed(x_NI)
        assert all(torch.equal(packed(x_NI[:rows]), whole[:rows]) for rows in (1, 2, 7, 16, 33))
    for wrong in (lambda x, *_: F.linear(x, weight_OI + 1e-2), lambda x, *_: F.linear(x, weight_OI) + 1e-6 * len(x)):
        monkeypatch.setattr(prepacked, "_PROVED", {})
        monkeypatch.setattr(prepacked, "_multiply", wrong)
        assert not prepacked.Product([weight_OI], [bias_O], torch.float32).packed
    small = prepacked.Product([weight_OI[:8, :8]], [None], torch.float32)
    assert not small.packed, "to find the operator would take longer than the product"


def test_more_tokens_than_the_capacity_are_refused() -> None:
    model, batch = decoder(), rows([[9]])
    with pytest.raises(AssertionError, match="8 tokens"):
        model.read(batch.tokens_BT, torch.tensor([9]), model.cache(1, 8))
