"""The sequences of a step are a function of (seed, step) alone; a budget of tokens, ranks and work only cut them."""

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
from llmtrainer.data.budget_source import BudgetSource
from llmtrainer.data.packed import Store
from tests.data.worlds import counting, make_store
from tests.tolerances import RATE_RELATIVE

LENGTHS = [int(length) for length in np.random.default_rng(1).integers(2, 40, size=90)]


def weights_of(document: list[int]) -> list[float]:
    """The first token counts 9, which nothing may notice; others 0, 1 or 2."""
    return [9.0, *(float(token % 3) for token in document[1:])]


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> Store:
    return make_store(tmp_path_factory.mktemp("data") / "store", counting(LENGTHS), vocabulary=70_000)


def source(store: Store, **settings: Any) -> BudgetSource:
    standard: dict[str, Any] = {
        "sequence_length": 40, "sequences_per_step": 13, "tokens_per_batch": 64, "seed": 1, "prefetch": False
    }
    return BudgetSource(store, **{**standard, **settings})


def sequences_in(batches: list[Batch]) -> dict[int, tuple[list[int], ...]]:
    """Each sequence of some batches by its place in the step: tokens, targets, weights, positions."""
    found: dict[int, tuple[list[int], ...]] = {}
    for batch in batches:
        if batch.place_BT is None:
            assert not batch.weights_BT.any() and batch.input_tokens == 0
            continue
        assert batch.tokens_BT.shape[0] == 1 and (batch.document_BT >= 0).all(), "one row, no padding"
        assert torch.equal(batch.document_BT, batch.sequence_BT)
        for number in range(batch.sequences):
            mine = batch.document_BT[0] == number
            (place,) = set(batch.place_BT[0][mine].tolist())
            assert place not in found, "a place occurs once"
            tensors = (batch.tokens_BT, batch.targets_BT, batch.weights_BT, batch.position_BT)
            found[place] = tuple(tensor[0][mine].tolist() for tensor in tensors)
    return found


def test_a_sequence_is_a_whole_document_from_position_0_whose_first_token_nothing_predicts(store: Store) -> None:
    documents = {document[0]: document for document in counting(LENGTHS)}
    seen = Counter()
    for step in range(7):
        for tokens, targets, weights, positions in sequences_in(source(store).batches(step)).values():
            document = documents[tokens[0]]
            assert [tokens[0], *targets] == document and tokens == document[:-1]
            assert weights == [1.0] * len(tokens) and positions == list(range(len(tokens)))
            seen[tokens[0]] += 1
    assert len(seen) == 90, "7 steps of 13 are all 90, and one of the next epoch"


def test_weights_of_the_store_are_those_of_the_targets(tmp_path: Path) -> None:
    documents = counting(LENGTHS)
    weights = [weights_of(document) for document in documents]
    rows = source(make_store(tmp_path / "store", documents, vocabulary=70_000, weights=weights))
    for tokens, targets, found, _ in sequences_in(rows.batches(0)).values():
        assert len(tokens) == len(found) and found == [float(target % 3) for target in targets]
    row = rows.row(0, 4)
    assert row["weights"] == [0.0, *[float(token % 3) for token in row["tokens"][1:]]]


@pytest.mark.parametrize("world_size", range(1, 8))
def test_every_split_over_ranks_and_budgets_gives_the_same_step(store: Store, world_size: int) -> None:
    whole = source(store, tokens_per_batch=10_000)
    for step, budget in itertools.product((0, 3, 11), (40, 64, 200, 10_000)):
        expected = sequences_in(whole.batches(step))
        assert sorted(expected) == list(range(13))
        parts = [
            source(store, tokens_per_batch=budget, rank=rank, world_size=world_size) for rank in range(world_size)
        ]
        cuts = [part.batches(step) for part in parts]
        found = [sequences_in(cut) for cut in cuts]
        assert sum(map(len, found)) == 13, "no sequence twice"
        assert {place: row for rows in found for place, row in rows.items()} == expected, "and none missing"
        assert len({len(cut) for cut in cuts}) == 1, "as many micro-batches everywhere"
        assert all(batch.input_tokens <= budget for cut in cuts for batch in cut)
        assert {part.fingerprint for part in parts} == {whole.fingerprint}


def test_an_epoch_holds_every_sequence_once_and_the_next_in_another_order(store: Store) -> None:
    rows = source(store, sequences_per_step=9)
    draws = [draw for step in range(30) for draw in rows.draws(step)]
    epochs = [[row for epoch, row in draws if epoch == number] for number in range(3)]
    assert all(sorted(order) == list(range(90)) for order in epochs)
    assert epochs[0] != epochs[1] != epochs[2] != epochs[0]
    assert rows.steps_per_epoch == 10 and rows.epochs(20) == 2.0


def test_a_step_is_the_same_whenever_and_however_it_is_asked_for(store: Store) -> None:
    straight = [sequences_in(source(store).batches(step)) for step in range(20)]
    ahead = source(store, prefetch=True)
    for step in [*range(20), 19, 5, 6, 7, 0, 1]:
        assert sequences_in(ahead.batches(step)) == straight[step]
    ahead.close()


def test_seed_and_data_change_the_sequences_and_the_fingerprint(store: Store) -> None:
    first = source(store)
    changes: list[dict[str, Any]] = [{"seed": 2}, {"held_out": 0.3}, {"shuffle": False}, {"sequences_per_step": 6}]
    for change in changes:
        other = source(store, **change)
        assert other.fingerprint != first.fingerprint, change
        assert sequences_in(other.batches(0)) != sequences_in(first.batches(0)), change


def test_train_and_held_out_parts_are_all_documents_once(store: Store) -> None:
    parts = [source(store, held_out=0.3, part=part, sequences_per_step=1) for part in ("train", "held_out")]
    tokens = [
        row[0][0]
        for part in parts
        for step in range(part.rows_per_epoch)
        for row in sequences_in(part.batches(step)).values()
    ]
    assert sorted(tokens) == sorted(document[0] for document in counting(LENGTHS))


@pytest.mark.parametrize("held_out", [0.0, 0.3])
def test_tokens_per_step_is_an_average_that_fixes_the_number_of_sequences(store: Store, held_out: float) -> None:
    rows = source(store, sequences_per_step=None, tokens_per_step=200, held_out=held_out)
    whole = source(store, sequences_per_step=1, held_out=held_out, shuffle=False)
    tokens = [whole.batches(step)[0].input_tokens for step in range(whole.rows_per_epoch)]
    assert rows.rows_per_step == round(200 / np.mean(tokens))


def test_micro_batches_of_a_step_hold_about_the_same_work(store: Store) -> None:
    for step in range(10):
        sizes = [batch.input_tokens for batch in source(store, tokens_per_batch=100).batches(step)]
        assert max(sizes) - min(sizes) < 40, "no further apart than the longest sequence"


@pytest.mark.parametrize(
    ("settings", "what", "fix"),
    [
        ({"tokens_per_batch": 39}, "does not fit a micro-batch", "data.tokens_per_batch=40"),
        ({"sequence_length": 20}, "does not fit a row of 20", "data.sequence_length=38, or prepare the data again"),
        ({"sequences_per_step": 0}, "holds nothing", "1 at least"),
        ({"part": "held_out"}, "data.held_out is 0.0", "data.held_out=0.01"),
        ({"held_out": 1e-12, "part": "held_out"}, "no sequence to learn from", "data.held_out"),
    ],
)  # fmt: skip
def test_what_cannot_be_is_refused_with_a_remedy(store: Store, settings: dict[str, Any], what: str, fix: str) -> None:
    with pytest.raises(UserError, match=what) as error:
        source(store, **settings)
    assert fix in str(error.value.fix)


@pytest.mark.parametrize("held_out", [0.0, 0.3])
def test_the_pace_is_what_the_steps_of_an_epoch_read(store: Store, held_out: float) -> None:
    rows = source(store, sequences_per_step=1, held_out=held_out)
    read = sum(batch.input_tokens for step in range(rows.rows_per_epoch) for batch in rows.batches(step))
    assert rows.pace.epochs == 1 / rows.rows_per_epoch
    assert rows.pace.tokens == pytest.approx(read / rows.rows_per_epoch, rel=RATE_RELATIVE)
