"""The comparisons of a step are a function of (seed, step) alone; budget, ranks and shared prompts only cut them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from llmtrainer.base.errors import UserError
from llmtrainer.core.batch import GROUP, LIKED, MARGIN, ROW, Batch
from llmtrainer.core.objective import count
from llmtrainer.data.comparison_source import ComparisonSource
from llmtrainer.data.packed import Store
from tests.data.compared import compared_store, random_comparisons
from tests.data.worlds import counting, make_store
from tests.tolerances import RATE_RELATIVE

DRAW = np.random.default_rng(2)
SIZES = [tuple(DRAW.integers(1, 15, size=3 + place % 2).tolist()) for place in range(30)]
LONGEST = 40


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> Store:
    return compared_store(tmp_path_factory.mktemp("data") / "store", random_comparisons(SIZES))


def source(store: Store, **settings: Any) -> ComparisonSource:
    standard: dict[str, Any] = {"pairs_per_step": 7, "tokens_per_batch": 80, "seed": 1, "prefetch": False}
    return ComparisonSource(store, **{**standard, **settings})


def answers_in(batches: list[Batch]) -> dict[int, tuple[Any, ...]]:
    """Each answer of some batches by its row of the store: place, targets that count, their positions, its company."""
    found: dict[int, tuple[Any, ...]] = {}
    for batch in batches:
        rows, groups = batch.signals[ROW].tolist(), batch.signals[GROUP].tolist()
        assert groups == sorted(groups) and len(rows) == batch.sequences
        for number, row in enumerate(rows):
            mine = (batch.sequence_BT[0] == number) & (batch.weights_BT[0] > 0)
            assert batch.place_BT is not None and row not in found
            (place,) = set(batch.place_BT[0][batch.sequence_BT[0] == number].tolist())
            company = tuple(other for other, group in zip(rows, groups, strict=True) if group == groups[number])
            found[row] = (
                place, batch.targets_BT[0][mine].tolist(), batch.position_BT[0][mine].tolist(), company,
            )  # fmt: skip
    return found


def test_every_answer_is_learned_once_an_epoch_beside_the_others_of_its_prompt(store: Store) -> None:
    found: dict[int, tuple[Any, ...]] = {}
    for step in range(10):
        found |= answers_in(source(store, pairs_per_step=3).batches(step))
    assert sorted(found) == list(range(store.documents))
    for row, (_, targets, positions, company) in found.items():
        tokens, weights = store.read(row).tolist(), store.weights(row)
        assert weights is not None
        first = int((weights > 0).argmax())
        assert targets == tokens[first:] and positions == list(range(first - 1, len(tokens) - 1))
        assert row in company and list(company) == list(range(company[0], company[-1] + 1))


@pytest.mark.parametrize("share", [True, False])
@pytest.mark.parametrize("world_size", [1, 2, 3, 8])
def test_ranks_and_budgets_only_cut_a_step(store: Store, world_size: int, share: bool) -> None:
    whole = answers_in(source(store, tokens_per_batch=10_000, share_prompt=share).batches(3))
    cut = [
        source(store, rank=rank, world_size=world_size, share_prompt=share).batches(3) for rank in range(world_size)
    ]
    assert len({len(batches) for batches in cut}) == 1
    assert answers_in([batch for batches in cut for batch in batches]) == whole
    assert all(batch.input_tokens <= 80 for batches in cut for batch in batches)


def test_sharing_changes_the_tokens_read_and_not_the_fingerprint(store: Store) -> None:
    shared, apart = source(store), source(store, share_prompt=False)
    assert shared.fingerprint == apart.fingerprint
    read = [sum(batch.input_tokens for batch in rows.batches(0)) for rows in (shared, apart)]
    numbers = shared.comparisons(0)
    saved = sum((len(SIZES[number]) - 2) * (SIZES[number][0] - 1) for number in numbers)
    assert read[1] == sum((len(SIZES[n]) - 1) * SIZES[n][0] + sum(SIZES[n][1:]) for n in numbers)
    assert read[1] - read[0] == saved
    other = {
        source(store, **setting).fingerprint
        for setting in ({"seed": 2}, {"pairs_per_step": 6}, {"held_out": 0.3}, {"shuffle": False})
    }
    assert len({*other, shared.fingerprint}) == 5


def test_pairs_are_counted_as_every_two_answers(store: Store) -> None:
    rows = source(store)
    sizes = [len(SIZES[number]) - 1 for number in rows.comparisons(0)]
    assert count(rows.batches(0))["pairs"] == sum(n * (n - 1) / 2 for n in sizes)


def test_labels_and_margins_are_those_of_each_answers_comparison(tmp_path: Path) -> None:
    many = random_comparisons([(4, 3)] * 5)
    liked = [True, False, False, True, True]
    store = compared_store(tmp_path / "liked", many, liked=liked)
    (batch,) = source(store, pairs_per_step=5, tokens_per_batch=1000).batches(0)
    assert batch.signals[LIKED].tolist() == [float(liked[row]) for row in batch.signals[ROW].tolist()]
    assert MARGIN not in batch.signals
    pairs = compared_store(tmp_path / "margins", random_comparisons([(4, 3, 2)] * 3), margins=[0.5, None, 2.0])
    (batch,) = source(pairs, pairs_per_step=3, tokens_per_batch=1000).batches(0)
    assert batch.signals[MARGIN].tolist() == [[0.5, 0.0, 2.0][row // 2] for row in batch.signals[ROW].tolist()]


def test_a_rank_without_comparisons_gets_padding_with_the_same_signals(tmp_path: Path) -> None:
    store = compared_store(tmp_path / "store", random_comparisons([(4, 3, 2)]), margins=[1.0])
    one, other = (source(store, pairs_per_step=1, rank=rank, world_size=2).batches(0)[0] for rank in (0, 1))
    empty, full = sorted([one, other], key=lambda batch: batch.input_tokens)
    assert empty.sequences == 0 and empty.input_tokens == 0 and count([empty])["pairs"] == 0
    assert empty.signals.keys() == full.signals.keys()
    assert all(value.dtype == full.signals[name].dtype and not len(value) for name, value in empty.signals.items())


def test_held_out_comparisons_are_never_learned(store: Store) -> None:
    held = source(store, held_out=0.3, part="held_out", shuffle=False)
    train = source(store, held_out=0.3)
    numbers = [{n for step in range(20) for n in rows.comparisons(step)} for rows in (held, train)]
    assert numbers[0].isdisjoint(numbers[1]) and len(numbers[0]) + len(numbers[1]) == 30 and numbers[0]


def test_a_comparison_that_does_not_fit_a_micro_batch_is_refused_with_a_budget_that_will_do(store: Store) -> None:
    with pytest.raises(UserError, match="do not fit a micro-batch") as error:
        source(store, tokens_per_batch=20)
    assert error.value.fix is not None
    needed = int(error.value.fix.partition(",")[0].partition("=")[2])
    source(store, tokens_per_batch=needed)
    with pytest.raises(UserError, match="1 of 30"):
        source(store, tokens_per_batch=needed - 1)


def test_the_largest_micro_batch_holds_the_longest_comparison_and_keeps_to_the_budget(store: Store) -> None:
    rows = source(store)
    largest = rows.largest()
    longest = max(size[0] + sum(size[1:]) + len(size) - 2 if size[0] > 1 else sum(size) for size in SIZES)
    assert longest <= largest.input_tokens <= 80


def test_a_store_of_documents_is_refused(tmp_path: Path) -> None:
    store = make_store(tmp_path / "store", counting([3, 4]))
    with pytest.raises(UserError, match="holds no comparisons"):
        source(store)


def test_each_prompt_of_a_step_is_put_the_answer_of_the_place_before_it_whatever_the_cut(tmp_path: Path) -> None:
    made = random_comparisons([(*size[:1], size[1]) for size in SIZES[:9]])
    store = compared_store(tmp_path / "liked", made, liked=[True, False, True] * 3)
    longest = max(len(prompt) + len(answers[0]) for prompt, answers in made)
    for settings in ({}, {"tokens_per_batch": 30}, {"share_prompt": False}):
        found: dict[int, tuple[list[int], list[int]]] = {}
        rows = source(store, pairs_per_step=5, **settings)
        for rank in range(2):
            share, other = (
                source(store, pairs_per_step=5, rank=which, world_size=2, **settings).mismatched(1)
                for which in (rank, 1 - rank)
            )
            assert len(share) == len(other)
            for batch in share:
                for number, place in enumerate(batch.place_BT[0][batch.position_BT[0] == 0].tolist()):  # type: ignore[index]
                    mine = batch.sequence_BT[0] == number
                    if mine.any():
                        counts = mine & (batch.weights_BT[0] > 0)
                        found[place] = batch.tokens_BT[0][mine].tolist(), batch.targets_BT[0][counts].tolist()
        numbers = rows.comparisons(1)
        assert sorted(found) == [0, 1, 2, 3, 4]
        for place, number in enumerate(numbers):
            prompt, answer = made[number][0], made[numbers[place - 1]][1][0]
            tokens = [*prompt, *answer][:longest]
            assert found[place] == (tokens, tokens[len(prompt) :])


def test_one_answer_cannot_be_put_to_another_prompt(tmp_path: Path) -> None:
    store = compared_store(tmp_path / "liked", random_comparisons([(3, 4), (5, 6)]), liked=[True, False])
    with pytest.raises(UserError, match="no other prompt"):
        source(store, pairs_per_step=1).mismatched(0)


@pytest.mark.parametrize("share_prompt", [True, False])
def test_the_pace_is_what_the_steps_of_an_epoch_read(store: Store, share_prompt: bool) -> None:
    rows = source(store, pairs_per_step=1, share_prompt=share_prompt)
    read = sum(batch.input_tokens for step in range(rows.rows_per_epoch) for batch in rows.batches(step))
    assert rows.pace.epochs == 1 / rows.rows_per_epoch
    assert rows.pace.tokens == pytest.approx(read / rows.rows_per_epoch, rel=RATE_RELATIVE)
