"""Sample indexes: rows tile the files as they should, and an index that says otherwise is refused by name."""

from __future__ import annotations

import struct
from pathlib import Path

import numpy as np
import pytest

from llmtrainer.base.errors import UserError
from llmtrainer.data.open import find
from llmtrainer.data.samples import sample_index

VECTORS = {
    (10, 7): [(0, 0), (0, 4), (0, 8), (1, 2)],
    (10, 6): [(0, 0), (0, 4), (0, 8)],
    (10, 0, 7): [(0, 0), (0, 4), (0, 8), (2, 2)],
    (8, 9): [(0, 0), (0, 4), (1, 0), (1, 4)],
    (4, 4, 4, 4, 4): [(0, 0), (1, 0), (2, 0), (3, 0)],
    (3, 3, 3, 3, 3): [(0, 0), (1, 1), (2, 2)],
}
"""Tokens of each file -> rows of 4 tokens that have a next one, worked out by hand."""


@pytest.mark.parametrize("lengths", VECTORS, ids=str)
def test_rows_begin_where_hand_arithmetic_says(lengths: tuple[int, ...]) -> None:
    assert [tuple(pair) for pair in sample_index(lengths, 4).tolist()] == VECTORS[lengths]


def test_rows_tile_two_hundred_random_lists_of_files_without_gap_or_overlap() -> None:
    random = np.random.default_rng(0)
    for _ in range(200):
        lengths = random.integers(0, 30, size=random.integers(1, 12)).tolist()
        S = int(random.integers(1, 9))
        stream = [(file, token) for file, length in enumerate(lengths) for token in range(length)]
        found = [tuple(pair) for pair in sample_index(lengths, S).tolist()]
        assert found == stream[: len(found) * S : S], "each begins S tokens behind the one before"
        assert len(stream) > len(found) * S or not found, "the last one has a next token"
        assert len(stream) <= (len(found) + 1) * S, "no further one would have"


def corpus(folder: Path, lengths: tuple[int, ...], pairs: list[tuple[int, int]], S: int = 4) -> Path:
    """Raw files and an index as other programs write it: pairs of uint32."""
    (folder / "01").mkdir(parents=True)
    for number, length in enumerate(lengths):
        (folder / "01" / f"file_000_{number:05d}.bin").write_bytes(struct.pack(f"<{length}H", *range(length)))
    index = folder / f"all_sample_index_map_{S}.ibin"
    index.write_bytes(b"".join(struct.pack("<II", *pair) for pair in pairs))
    return index


@pytest.mark.parametrize("lengths", VECTORS, ids=str)
def test_a_right_index_is_accepted(tmp_path: Path, lengths: tuple[int, ...]) -> None:
    corpus(tmp_path / "c", lengths, VECTORS[lengths])
    assert len(find(tmp_path / "c")) == len(lengths)


BROKEN = [
    ((8, 9), [(0, 0), (0, 4)], "row 3", "file_000_00000.bin ends exactly where a row begins"),
    ((4, 4, 4, 4, 4), [], "row 1", "there are only 0 rows"),
    ((3, 3, 3, 3, 3), [(0, 0), (1, 1)], "row 3", "files were added"),
    ((8, 5, 9), [(0, 0), (0, 4), (1, 8), (2, 3)], "row 3", "it begins at token 8 of file_000_00001.bin"),
]
"""What a program writes that does not begin anew where a file ends on a row's border."""


@pytest.mark.parametrize(("lengths", "pairs", "where", "why"), BROKEN, ids=[str(item[0]) for item in BROKEN])
def test_a_wrong_index_is_refused_by_its_first_wrong_row(
    tmp_path: Path, lengths: tuple[int, ...], pairs: list[tuple[int, int]], where: str, why: str
) -> None:
    index = corpus(tmp_path / "c", lengths, pairs)
    with pytest.raises(UserError, match="does not fit its files") as error:
        find(tmp_path / "c")
    assert where in str(error.value.where) and why in str(error.value.why)
    assert error.value.fix is not None and str(index) in error.value.fix
    index.unlink()
    assert len(find(tmp_path / "c")) == len(lengths)


def test_a_file_more_or_less_or_longer_is_an_error_and_no_shifted_data(tmp_path: Path) -> None:
    for number, change in enumerate(("more", "first", "less", "longer")):
        folder = tmp_path / change
        corpus(folder, (10, 7, 9), [tuple(pair) for pair in sample_index((10, 7, 9), 4).tolist()])    # type: ignore[misc]
        find(folder)
        if change == "less":
            (folder / "01" / "file_000_00002.bin").unlink()
        else:
            name = {"more": "file_000_00003.bin", "first": "file_000.bin", "longer": "file_000_00001.bin"}[change]
            (folder / "01" / name).write_bytes(b"\1\0" * 30)
        with pytest.raises(UserError, match="does not fit its files"):
            find(folder)
        assert number < 4


def test_an_index_that_breaks_off_is_refused(tmp_path: Path) -> None:
    index = corpus(tmp_path / "c", (10, 7), VECTORS[10, 7])
    index.write_bytes(index.read_bytes()[:-3])
    with pytest.raises(UserError, match="breaks off"):
        find(tmp_path / "c")
