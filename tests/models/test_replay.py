"""Steps of one token that are recorded once and replayed give what reading everything at once gives."""

from __future__ import annotations

import gc
import weakref
from collections.abc import Iterator
from typing import Any

import pytest
import torch

from llmtrainer.models import cache, paged, replay
from llmtrainer.models.rope_scalings.dynamic import Dynamic
from tests.models.recorder import Recorder
from tests.models.rows import rows
from tests.models.test_cache import FIELDS
from tests.models.test_decoder import decoder, logits
from tests.models.test_paged import SIZE, TABLES, pages
from tests.tolerances import FLOAT64_LOGITS

CUDA = torch.cuda.is_available()
RECORDER = Recorder()
MODELS = {**FIELDS, "frequencies by length": dict(rope_scaling=Dynamic(factor=2.0, original_context=8))}


@pytest.fixture(params=["cpu", pytest.param("cuda", marks=pytest.mark.skipif(not CUDA, reason="no CUDA device"))])
def device(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    RECORDER.recorded = 0
    if request.param == "cpu":
        for module in (cache, paged):
            monkeypatch.setattr(module, "recordings", lambda device: replay.Recordings(RECORDER))
    yield request.param


@pytest.mark.parametrize("fields", MODELS.values(), ids=MODELS.keys())
def test_replayed_steps_over_scattered_blocks_are_those_of_the_whole(fields: dict[str, Any], device: str) -> None:
    model, batch = decoder(**fields).to(device), rows([[24], [24], [24]]).to(device)
    whole, memory, place = logits(model, batch), pages(model), [5, 9, 1]
    first = torch.full((3, 9), 7)
    for row, n in enumerate(place):
        first[row, :n] = batch.tokens_BT[row, :n]
    used = [table[: -(-n // SIZE)] for table, n in zip(TABLES, place, strict=True)]
    memory.read(first, torch.tensor(place), used, [0, 0, 0])
    living = [0, 1, 2]
    for _ in range(15):
        living = [row for row in living if place[row] < 24]
        tables = [TABLES[row][: place[row] // SIZE + 1] for row in living]
        tokens = torch.stack([batch.tokens_BT[row, place[row]].cpu() for row in living])[:, None]
        one = torch.ones(len(living), dtype=torch.int64)
        found = memory.read(tokens, one, tables, [place[row] for row in living])
        expected = torch.stack([whole[row, place[row]] for row in living])
        torch.testing.assert_close(found, expected, rtol=0, atol=FLOAT64_LOGITS)
        for row in living:
            place[row] += 1
    assert place == [20, 24, 16]
    # Three rows of up to 4 and of up to 6 blocks; the first time of each is not recorded.
    assert device == "cuda" or RECORDER.recorded == 2
    for held in memory.held:
        assert held[0].eq(0.0).all() and held[19].eq(0.0).all(), "written where nobody's block is"


def test_replayed_steps_of_rows_that_leave_and_multiply_are_those_of_the_whole(device: str) -> None:
    model, batch = decoder(context_length=256).to(device), rows([[200], [200], [200]]).to(device)
    whole = logits(model, batch)
    memory, place = model.cache(3, 200), [50, 9, 61]
    first = torch.full((3, 61), 7, device=device)
    for row, n in enumerate(place):
        first[row, :n] = batch.tokens_BT[row, :n]
    model.read(first, torch.tensor(place, device=device), memory)
    living = [0, 1, 2]

    def go_on(steps: int) -> None:
        for _ in range(steps):
            tokens = torch.stack([batch.tokens_BT[row, place[row]] for row in living])[:, None]
            found = model.read(tokens, torch.ones(len(living), dtype=torch.int64, device=device), memory)
            expected = torch.stack([whole[row, place[row]] for row in living])
            torch.testing.assert_close(found, expected, rtol=0, atol=FLOAT64_LOGITS)
            for row in set(living):
                place[row] += 1

    go_on(6)
    for kept in ([0, 2], [1, 0, 0], [2]):
        memory.take(kept)
        living = [living[row] for row in kept]
        go_on(4)
    assert device == "cuda" or RECORDER.recorded >= 4


def test_a_result_stays_as_it_was_when_the_next_step_is_replayed(device: str) -> None:
    model = decoder().to(device)
    memory, one = model.cache(1, 24), torch.ones(1, dtype=torch.int64, device=device)
    told = []
    for token in (3, 5, 7, 9):
        out = model.read(torch.tensor([[token]], device=device), one, memory)
        told.append((out, out.clone()))
    assert all(torch.equal(out, then) for out, then in told)


@pytest.mark.skipif(not CUDA, reason="no CUDA device")
def test_a_memory_with_recordings_goes_when_nobody_holds_it() -> None:
    model = decoder().to("cuda")
    memory = model.cache(1, 24)
    for token in (3, 5, 7):
        model.read(torch.tensor([[token]], device="cuda"), torch.ones(1, dtype=torch.int64, device="cuda"), memory)
    gc.disable()
    try:
        gone = weakref.ref(memory.keys[0])
        del memory
        assert gone() is None
    finally:
        gc.enable()
