"""Reading with keys and values in blocks equals reading everything at once, wherever the blocks lie."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from llmtrainer.core import products
from llmtrainer.models.decoder import Decoder
from llmtrainer.models.rope_scalings.dynamic import Dynamic
from tests.models.rows import rows
from tests.models.test_cache import FIELDS
from tests.models.test_decoder import decoder, logits
from tests.tolerances import FLOAT64_LOGITS

SIZE = 4
TABLES = [[9, 2, 5, 1, 11, 3], [4, 10, 12, 6, 7, 8], [13, 15, 14, 18, 17, 16]]


def pages(model: Decoder, longest: int = 24) -> Any:
    return model.pages(model.reading_weights(), 20, SIZE, longest)


def piece(tokens_BT: torch.Tensor, place: list[int], lengths: list[int]) -> tuple[torch.Tensor, torch.Tensor]:
    """The next tokens of each row, junk behind them."""
    fed = torch.full((len(lengths), max(lengths) + 2), 7, dtype=torch.int64)
    for b, n in enumerate(lengths):
        fed[b, :n] = tokens_BT[b, place[b] : place[b] + n]
    return fed, torch.tensor(lengths)


@pytest.mark.parametrize("fields", FIELDS.values(), ids=FIELDS.keys())
def test_logits_by_pieces_in_scattered_blocks_are_those_of_the_whole(fields: dict[str, Any]) -> None:
    model, batch = decoder(**fields), rows([[24], [24], [24]])
    whole, memory, place = logits(model, batch), pages(model), [0, 0, 0]
    for lengths in ([5, 9, 1], [2, 1, 4], *[[1, 1, 1]] * 8, [9, 6, 11]):
        fed, lengths_B = piece(batch.tokens_BT, place, lengths)
        if lengths == [1, 1, 1]:
            fed = fed[:, :1]
        after = [start + n for start, n in zip(place, lengths, strict=True)]
        tables = [table[: -(-end // SIZE)] for table, end in zip(TABLES, after, strict=True)]
        found = memory.read(fed, lengths_B, tables, place)
        place = after
        torch.testing.assert_close(found, whole[torch.arange(3), torch.tensor(place) - 1], rtol=0, atol=FLOAT64_LOGITS)
    assert place == [24, 24, 24]
    for held in memory.held:
        assert held[0].eq(0.0).all() and held[19].eq(0.0).all(), "written where nobody's block is"


def test_two_rows_go_on_from_one_shared_block_and_a_copy_of_the_half_filled_one() -> None:
    model, batch = decoder(), rows([[10], [10]], seed=3)
    batch.tokens_BT[1, :6] = batch.tokens_BT[0, :6]
    whole, memory = logits(model, batch), pages(model)
    memory.read(batch.tokens_BT[:1, :6], torch.tensor([6]), [[3, 8]], [0])
    memory.copy(8, 5)
    found = memory.read(batch.tokens_BT[:, 6:], torch.tensor([4, 4]), [[3, 8, 1], [3, 5, 2]], [6, 6])
    torch.testing.assert_close(found, whole[:, 9], rtol=0, atol=FLOAT64_LOGITS)


def test_rotary_positions_depend_on_the_longest_row_and_on_no_table() -> None:
    scaling = Dynamic(factor=2.0, original_context=8)
    model, batch = decoder(rope_scaling=scaling), rows([[24]])
    whole = logits(model, batch)[0, 23]
    fed, n = batch.tokens_BT, torch.tensor([24])
    for table in (TABLES[0], [*TABLES[0], 13, 14]):
        memory = pages(model)
        memory.read(fed[:, :10], torch.tensor([10]), [table[:3]], [0])
        found = memory.read(fed[:, 10:], n - 10, [table], [10])[0]
        torch.testing.assert_close(found, whole, rtol=0, atol=FLOAT64_LOGITS)
    other = pages(model, longest=60)
    assert (other.read(fed, n, [TABLES[0]], [0])[0] - whole).abs().max() > 1e-3


@pytest.mark.parametrize("natively", [True, False])
def test_blocks_hold_the_type_that_is_multiplied_and_an_own_copy_stays_as_it_was(
    natively: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(products, "_SLOW", {torch.bfloat16: not natively})
    model = decoder(compute=torch.bfloat16)
    own = model.reading_weights(own=True)
    tokens_BT, n = torch.tensor([[5, 6, 7]]), torch.tensor([3])
    before = model.pages(own, 20, SIZE, 24).read(tokens_BT, n, [[1]], [0])
    with torch.no_grad():
        model.head_weight.mul_(2.0)
    memory = model.pages(own, 20, SIZE, 24)
    assert memory.held[0].dtype == (torch.bfloat16 if natively else torch.float32)
    assert torch.equal(memory.read(tokens_BT, n, [[1]], [0]), before)
    assert not torch.equal(pages(model).read(tokens_BT, n, [[1]], [0]), before)


ROOT = Path(__file__).resolve().parents[2]
FRESH = """
import psutil, torch
from tests.models.test_paged import decoder
model, process = decoder(), psutil.Process()
weights = model.reading_weights()
before = process.memory_info().rss
memory = model.pages(weights, 2**16, 16, 64)
size = sum(held.nbytes for held in memory.held)
memory.read(torch.tensor([[5, 6, 7]]), torch.tensor([3]), [[1]], [0])
print(size, process.memory_info().rss - before)
"""


def test_blocks_that_no_row_comes_to_need_take_no_memory() -> None:
    # In a process of its own: what others have freed before would be taken again, and is resident already.
    found = subprocess.run([sys.executable, "-c", FRESH], capture_output=True, text=True, cwd=ROOT, check=True)
    size, more = map(int, found.stdout.split())
    assert size > 2**28 and more < size / 8