"""The rows of a step are a function of (seed, step) alone; ranks, workers and micro-batches only cut them."""

from __future__ import annotations

import itertools
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from llmtrainer.base.errors import UserError
from llmtrainer.core.batch import Batch
from llmtrainer.data.packed import Store
from llmtrainer.data.source import DiskSource
from tests.data.worlds import counting, make_store
from tests.tolerances import RATE_RELATIVE

LENGTHS = [int(length) for length in np.random.default_rng(1).integers(1, 40, size=90)]
POLICIES = ["stream", "split", "truncate", "sample"]


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> Store:
    return make_store(tmp_path_factory.mktemp("data") / "store", counting(LENGTHS), vocabulary=70_000)


def source(store: Store, **settings: Any) -> DiskSource:
    standard: dict[str, Any] = {
        "sequence_length": 16, "rows_per_step": 7, "tokens_per_batch": 48, "seed": 1, "prefetch": False
    }
    return DiskSource(store, **{**standard, **settings})


def rows_in(batches: list[Batch]) -> dict[int, tuple[list[int], ...]]:
    """Each real row of some batches by its place in the step: tokens, targets, weights, documents, positions."""
    rows = {}
    for batch in batches:
        for b, place in enumerate(batch.place_B.tolist()):
            real = batch.document_BT[b] >= 0
            if not real.any():
                assert batch.weights_BT[b].sum() == 0
                continue
            assert place not in rows, "a place occurs once"
            tensors = (batch.tokens_BT, batch.targets_BT, batch.weights_BT, batch.document_BT, batch.position_BT)
            rows[place] = tuple(tensor[b][real].tolist() for tensor in tensors)
    return rows


def test_a_row_of_the_stream_equals_the_plain_slice(store: Store) -> None:
    flat = [(token, number) for number, document in enumerate(counting(LENGTHS)) for token in document]
    rows = source(store, shuffle=False)
    for step in range(3):
        for place, (tokens, targets, weights, documents, positions) in rows_in(rows.batches(step)).items():
            start = (step * 7 + place) * 16
            window = flat[start : start + 17]
            assert tokens == [token for token, _ in window[:-1]]
            assert targets == [token for token, _ in window[1:]]
            pairs = itertools.pairwise(window)
            assert weights == [float(one == other) for (_, one), (_, other) in pairs]
            numbers = [number for _, number in window[:-1]]
            assert documents == [number - numbers[0] for number in numbers]
            assert positions == [t - numbers.index(number) for t, number in enumerate(numbers)]


def test_flowing_documents_are_one_and_every_target_counts(store: Store) -> None:
    for tokens, _, weights, documents, positions in rows_in(source(store, documents="flowing").batches(0)).values():
        assert weights == [1.0] * 16 and documents == [0] * 16 and positions == list(range(16)) and len(tokens) == 16


def test_packed_targets_are_those_of_the_documents_alone(store: Store) -> None:
    # A sum over packed rows can equal the sum over single documents only if the same pairs count.
    rows = source(store, shuffle=False, rows_per_step=1, documents="isolated")
    pairs = Counter(
        (token, target)
        for step in range(rows.rows_per_epoch)
        for tokens, targets, weights, *_ in rows_in(rows.batches(step)).values()
        for token, target, weight in zip(tokens, targets, weights, strict=True)
        if weight
    )
    read = rows.rows_per_epoch * 16 + 1
    alone = Counter(
        pair
        for document in counting(LENGTHS)
        for pair in itertools.pairwise(document)
        if pair[1] <= read
    )
    assert pairs == alone


@pytest.mark.parametrize("policy", POLICIES)
def test_an_epoch_holds_every_row_once_and_the_next_in_another_order(store: Store, policy: str) -> None:
    rows = source(store, policy=policy, rows_per_step=5)
    draws = [draw for step in range(3 * rows.rows_per_epoch) for draw in rows.draws(step)][: 3 * rows.rows_per_epoch]
    epochs = [[row for epoch, row in draws if epoch == number] for number in range(3)]
    for order in epochs:
        assert sorted(order) == list(range(rows.rows_per_epoch))
    assert epochs[0] != epochs[1] != epochs[2] != epochs[0]
    assert rows.steps_per_epoch == rows.rows_per_epoch / 5


@pytest.mark.parametrize("policy", POLICIES)
def test_every_split_over_ranks_and_workers_gives_the_same_step(store: Store, policy: str) -> None:
    whole = source(store, policy=policy)
    for step in (0, 3, 11):
        expected = rows_in(whole.batches(step))
        assert sorted(expected) == list(range(7))
        for world_size in range(1, 8):
            for workers in (1, 2):
                parts = [
                    source(store, policy=policy, rank=rank, world_size=world_size, worker=worker, workers=workers)
                    for rank in range(world_size)
                    for worker in range(workers)
                ]
                cuts = [part.batches(step) for part in parts]
                found = [rows_in(cut) for cut in cuts]
                assert sum(map(len, found)) == 7, "no row twice"
                assert {place: row for rows in found for place, row in rows.items()} == expected, "and none missing"
                assert len({len(cut) for cut in cuts}) == 1, "as many micro-batches everywhere"
                assert len({part.fingerprint for part in parts} | {whole.fingerprint}) == 1


@pytest.mark.parametrize("tokens_per_batch", [16, 17, 33, 64, 1000])
def test_the_memory_knob_only_cuts(store: Store, tokens_per_batch: int) -> None:
    for policy in POLICIES:
        whole = source(store, policy=policy)
        cut = source(store, policy=policy, tokens_per_batch=tokens_per_batch)
        batches = cut.batches(2)
        assert rows_in(batches) == rows_in(whole.batches(2))
        assert all(batch.tokens_BT.numel() <= tokens_per_batch for batch in batches)
        assert len(batches) == -(-7 // (tokens_per_batch // 16))
        assert cut.fingerprint == whole.fingerprint


def test_a_step_is_the_same_whenever_and_however_it_is_asked_for(store: Store) -> None:
    straight = [rows_in(source(store).batches(step)) for step in range(40)]
    ahead = source(store, prefetch=True)
    held = source(store, held_out=0.2, part="held_out", prefetch=True)
    order = [*range(40), 39, 5, 6, 7, 30, 0, 1]    # a resumed run asks for any step first, and again
    for step in order:
        assert rows_in(ahead.batches(step)) == straight[step]
        held.batches(step)    # an evaluation in between moves nothing
    ahead.close()
    held.close()


def test_validation_between_steps_leaves_the_training_rows_alone(store: Store) -> None:
    train, held = source(store, held_out=0.2), source(store, held_out=0.2, part="held_out", shuffle=False)
    alone = [rows_in(source(store, held_out=0.2).batches(step)) for step in range(20)]
    mixed = []
    for step in range(20):
        mixed.append(rows_in(train.batches(step)))
        held.batches(step % 3)
    assert mixed == alone
    held_tokens = {token for step in range(12) for row in rows_in(held.batches(step)).values() for token in row[0]}
    assert not held_tokens & {token for step in alone for row in step.values() for token in row[0]}


def test_seed_and_policy_change_the_rows_and_the_fingerprint(store: Store) -> None:
    first = source(store)
    changes: list[dict[str, Any]] = [
        {"seed": 2}, {"policy": "split"}, {"sequence_length": 8}, {"held_out": 0.3}, {"shuffle": False},
        {"documents": "flowing"}, {"rows_per_step": 6},
    ]
    for change in changes:
        other = source(store, **change)
        assert other.fingerprint != first.fingerprint, change
        assert rows_in(other.batches(0)) != rows_in(first.batches(0)), change
    assert source(store).fingerprint == first.fingerprint


def test_the_fingerprint_follows_the_data(store: Store, tmp_path: Path) -> None:
    other = make_store(tmp_path / "other", counting([*LENGTHS[:-1], LENGTHS[-1] + 1]), vocabulary=70_000)
    assert source(other).fingerprint != source(store).fingerprint


def test_a_step_larger_than_an_epoch_runs_through_several(store: Store) -> None:
    rows = source(store, rows_per_step=400, tokens_per_batch=16 * 400)
    epochs = Counter(epoch for epoch, _ in rows.draws(0))
    assert epochs[0] == rows.rows_per_epoch and sum(epochs.values()) == 400
    assert sum(len(rows_in([batch])) for batch in rows.batches(0)) == 400


def test_row_shows_a_row_whole(store: Store) -> None:
    rows = source(store)
    for place, (tokens, targets, weights, documents, positions) in rows_in(rows.batches(4)).items():
        shown = rows.row(4, place)
        assert shown["tokens"] == [tokens[0], *targets]
        assert shown["weights"] == [0.0, *weights]
        assert shown["document"][:-1] == documents and shown["positions"][:-1] == positions
        assert len({len(values) for values in shown.values()}) == 1


@pytest.mark.parametrize(
    ("settings", "what", "fix"),
    [
        ({"tokens_per_batch": 15}, "does not fit a micro-batch", "data.tokens_per_batch=16"),
        ({"sequence_length": 5000, "tokens_per_batch": 5000}, "makes no row", "smaller data.sequence_length"),
        ({"sequence_length": 0}, "holds nothing", "1 at least"),
        ({"part": "held_out"}, "data.held_out is 0.0", "data.held_out=0.01"),
        ({"held_out": 1.0}, "data.held_out is 1.0", "data.held_out=0.01"),
        ({"held_out": 1e-12, "part": "held_out"}, "makes no row", "data.held_out"),
    ],
)  # fmt: skip
def test_what_cannot_be_is_refused_with_a_remedy(store: Store, settings: dict[str, Any], what: str, fix: str) -> None:
    with pytest.raises(UserError, match=what) as error:
        source(store, **settings)
    assert fix in str(error.value.fix)


def test_perturbing_one_document_leaves_the_rows_of_others_alone(tmp_path: Path) -> None:
    documents = counting([9] * 30)
    changed = [list(document) for document in documents]
    changed[4] = [999] * 9
    one = source(make_store(tmp_path / "one", documents), policy="split", shuffle=False, rows_per_step=30)
    other = source(make_store(tmp_path / "other", changed), policy="split", shuffle=False, rows_per_step=30)
    first, second = rows_in(one.batches(0)), rows_in(other.batches(0))
    assert [place for place in first if first[place] != second[place]] == [4]


def test_an_error_in_the_reading_thread_reaches_the_caller(tmp_path: Path) -> None:
    rows = source(make_store(tmp_path / "store", counting(LENGTHS), vocabulary=70_000), prefetch=True)
    rows.batches(0)
    rows.close()
    fresh = source(rows.store, prefetch=True)
    fresh._plan = None  # type: ignore[assignment]
    with pytest.raises(AttributeError):
        fresh.batches(0)
    fresh.close()


def test_batches_do_not_share_memory_between_steps(store: Store) -> None:
    rows = source(store)
    first = rows.batches(0)[0]
    kept = first.tokens_BT.clone()
    rows.batches(0)[0].tokens_BT.zero_()
    assert torch.equal(first.tokens_BT, kept)


@pytest.mark.parametrize("policy", ["stream", "split"])
def test_the_pace_is_what_the_steps_of_an_epoch_read(store: Store, policy: str) -> None:
    rows = source(store, policy=policy, rows_per_step=1, held_out=0.3)
    read = sum(batch.input_tokens for step in range(rows.rows_per_epoch) for batch in rows.batches(step))
    assert rows.pace.epochs == 1 / rows.rows_per_epoch
    assert rows.pace.tokens == pytest.approx(read / rows.rows_per_epoch, rel=RATE_RELATIVE)
