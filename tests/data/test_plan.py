"""Which tokens make a row: hand-worked vectors, and every token accounted for."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import numpy as np
import pytest

from llmtrainer.base.errors import UserError
from llmtrainer.data.plan import Piece, Plan, is_held_out, plan
from tests.data.worlds import counting, make_store

RAGGED = [int(length) for length in np.random.default_rng(3).integers(5, 301, size=60)]


def windows(lengths: list[int], sequence_length: int) -> list[list[Piece]]:
    starts = np.concatenate([[0], np.cumsum(lengths, dtype=np.int64)])
    found = Plan(None, sequence_length, "stream", 0, None, starts)  # type: ignore[arg-type]
    return [found.pieces(row, 0) for row in range(found.rows)]


@pytest.mark.parametrize(
    ("lengths", "starts"),
    [
        ([10, 7], [(0, 0), (0, 4), (0, 8), (1, 2)]),
        ([10, 6], [(0, 0), (0, 4), (0, 8)]),
        ([10, 0, 7], [(0, 0), (0, 4), (0, 8), (2, 2)]),
        ([8, 9], [(0, 0), (0, 4), (1, 0), (1, 4)]),
        ([4, 4, 4, 4, 4], [(0, 0), (1, 0), (2, 0), (3, 0)]),
        ([3, 3, 3, 3, 3], [(0, 0), (1, 1), (2, 2)]),
    ],
    ids=str,
)
def test_windows_of_four_begin_where_hand_arithmetic_says(
    lengths: list[int], starts: list[tuple[int, int]]
) -> None:
    assert [(pieces[0].document, pieces[0].start) for pieces in windows(lengths, 4)] == starts


def test_windows_tile_the_stream_for_200_random_lists_of_lengths() -> None:
    random = np.random.default_rng(0)
    for _ in range(200):
        lengths = random.integers(0, 20, size=random.integers(1, 12)).tolist()
        L = int(random.integers(1, 9))
        stream = [(document, place) for document, length in enumerate(lengths) for place in range(length)]
        rows = [
            [(document, place) for document, start, stop in pieces for place in range(start, stop)]
            for pieces in windows(lengths, L)
        ]
        assert all(len(row) == L + 1 for row in rows), "every row has a last target"
        targets = [token for row in rows for token in row[1:]]
        assert targets == stream[1 : len(targets) + 1]
        assert len(stream) - 1 - len(targets) < L, "only what fills no row is left"
        assert not rows or rows[0][0] == stream[0]


def rows_of(tmp_path: Path, policy: str, lengths: list[int], L: int, **settings: object) -> list[list[int]]:
    store = make_store(tmp_path / f"{policy}", counting(lengths), vocabulary=100_000)
    found = plan(store, sequence_length=L, policy=policy, seed=5, **settings)  # type: ignore[arg-type]
    return [
        [int(token) for piece in found.pieces(row, 0) for token in store.read(*piece)] for row in range(found.rows)
    ]


def test_split_makes_every_token_but_the_first_of_a_document_a_target_once(tmp_path: Path) -> None:
    rows = rows_of(tmp_path, "split", [*RAGGED, 1, 65, 66, 129], 64)
    documents = counting([*RAGGED, 1, 65, 66, 129])
    assert [token for row in rows for token in row[1:]] == [token for doc in documents for token in doc[1:]]
    assert [token for row in rows for token in row[:-1]] == [token for doc in documents for token in doc[:-1]]
    assert max(map(len, rows)) == 65 and min(map(len, rows)) >= 2


def test_truncation_keeps_the_end_of_every_document(tmp_path: Path) -> None:
    documents = counting([*RAGGED, 65, 66])
    rows = rows_of(tmp_path, "truncate", [*RAGGED, 65, 66], 64)
    for row, document in zip(rows, documents, strict=True):
        assert row == (document if len(document) <= 65 else [*document[:64], document[-1]])


def test_one_row_a_document_skips_what_has_nothing_to_predict(tmp_path: Path) -> None:
    for policy in ("truncate", "sample", "whole", "split"):
        assert rows_of(tmp_path, policy, [1, 2, 1, 3, 1], 8) == [[2, 3], [5, 6, 7]]


def test_samples_are_heads_a_quarter_of_the_times_and_windows_elsewhere(tmp_path: Path) -> None:
    store = make_store(tmp_path / "store", counting([300] * 40 + [50] * 10), vocabulary=100_000)
    found = plan(store, sequence_length=64, policy="sample", seed=5)
    starts = Counter(found.pieces(row, epoch)[0].start for row in range(40) for epoch in range(100))
    assert abs(starts[0] / 4000 - 0.25) < 0.02
    assert min(starts) == 0 and max(starts) == 300 - 65
    assert len(starts) > 230, "any window may be drawn"
    assert all(found.pieces(row, 3) == [Piece(row, 0, 50)] for row in range(40, 50)), "a short one is whole"
    assert found.pieces(0, 7) == found.pieces(0, 7)
    other = plan(store, sequence_length=64, policy="sample", seed=6)
    assert [found.pieces(row, 0) for row in range(40)] != [other.pieces(row, 0) for row in range(40)]


def test_whole_refuses_a_longer_document_and_says_where_it_came_from(tmp_path: Path) -> None:
    store = make_store(tmp_path / "store", counting([5, 9, 4]))
    assert plan(store, sequence_length=8, policy="whole", seed=0).rows == 3
    with pytest.raises(UserError, match="9 tokens does not fit a row of 7") as error:
        plan(store, sequence_length=7, policy="whole", seed=0)
    assert error.value.where == "by hand, document 2" and "data.sequence_length=8" in str(error.value.fix)


@pytest.mark.parametrize("policy", ["stream", "split", "truncate", "sample"])
def test_held_out_documents_are_disjoint_from_training_and_stable(tmp_path: Path, policy: str) -> None:
    store = make_store(tmp_path / "store", counting([20] * 300), vocabulary=100_000)

    def documents(part: str, seed: int, cache: Path) -> set[int]:
        found = plan(store, sequence_length=8, policy=policy, seed=seed, held_out=0.2, part=part, cache=cache)  # type: ignore[arg-type]
        return {piece.document for row in range(found.rows) for piece in found.pieces(row, 0)}

    train, held = documents("train", 1, tmp_path / "c"), documents("held_out", 1, tmp_path / "c")
    assert not train & held and 30 < len(held) < 90
    assert len(train | held) > 296, "only the end of a stream may fill no row"
    assert held == documents("held_out", 2, tmp_path / "d"), "neither seed nor cache moves the border"


def test_the_held_out_share_is_what_was_asked_for() -> None:
    numbers = np.arange(200_000)
    for share in (0.001, 0.03, 0.5):
        assert abs(is_held_out(numbers, share).mean() / share - 1) < 0.2
    assert not is_held_out(numbers, 0.0).any()
    assert is_held_out(numbers, 0.03)[is_held_out(numbers, 0.01)].all(), "a larger share only adds documents"


def test_tables_are_built_once_and_equal_whatever_the_block(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    store = make_store(tmp_path / "store", counting(RAGGED), vocabulary=100_000)
    settings: dict = {"sequence_length": 64, "policy": "split", "seed": 0, "held_out": 0.3}
    whole = plan(store, **settings, cache=tmp_path / "whole")
    files = sorted((tmp_path / "whole").iterdir())
    before = [path.stat().st_mtime_ns for path in files]
    plan(store, **settings, cache=tmp_path / "whole")
    assert [path.stat().st_mtime_ns for path in files] == before and len(files) == 2
    monkeypatch.setattr("llmtrainer.data.plan._BLOCK", 7)
    blocks = plan(store, **settings, cache=tmp_path / "blocks")
    assert np.array_equal(whole.starts[:], blocks.starts[:])
    assert whole.documents is not None and np.array_equal(whole.documents[:], blocks.documents[:])  # type: ignore[arg-type]


def test_a_failed_build_leaves_no_table_behind(tmp_path: Path) -> None:
    store = make_store(tmp_path / "store", counting([5, 9, 4]))
    with pytest.raises(UserError):
        plan(store, sequence_length=7, policy="whole", seed=0, cache=tmp_path / "cache")
    assert list((tmp_path / "cache").iterdir()) == []
