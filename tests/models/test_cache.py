"""Reading with a cache equals reading everything at once, whatever the rows' lengths."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from llmtrainer.models.decoder import Decoder
from tests.models.rows import rows
from tests.models.test_decoder import decoder, logits
from tests.tolerances import FLOAT64_LOGITS

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
def test_logits_are_float32_and_the_cache_holds_the_compute_type(compute: torch.dtype) -> None:
    model, batch = decoder(compute=compute), rows([[12], [12]])
    cache = model.cache(2, 12)
    found = model.read(batch.tokens_BT, torch.tensor([12, 6]), cache)
    assert found.dtype == torch.float32 and cache.keys[0].dtype == compute
    expected = logits(model, batch).float()
    torch.testing.assert_close(found, expected[[0, 1], [11, 5]], rtol=2e-2, atol=2e-2)


def test_a_cache_holds_the_weights_that_filled_it() -> None:
    model, batch = decoder(compute=torch.bfloat16), rows([[12]])
    cache, other = model.cache(1, 12), model.cache(1, 12)
    before = model.read(batch.tokens_BT, torch.tensor([12]), cache)
    with torch.no_grad():
        model.model.layers[0].mlp.up_proj.weight.zero_()
    assert torch.equal(model.read(batch.tokens_BT, torch.tensor([12]), other), before)
    assert not torch.equal(model.read(batch.tokens_BT, torch.tensor([12]), model.cache(1, 12)), before)


def test_more_tokens_than_the_capacity_are_refused() -> None:
    model, batch = decoder(), rows([[9]])
    with pytest.raises(AssertionError, match="8 tokens"):
        model.read(batch.tokens_BT, torch.tensor([9]), model.cache(1, 8))
