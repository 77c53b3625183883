"""A permutation is a bijection, depends on its key, and is as even as drawing lots."""

from __future__ import annotations

from collections import Counter

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy.stats import chisquare

from llmtrainer.data.permutation import Permutation


@given(size=st.integers(1, 9000), key=st.integers(0, 2**62 - 1))
def test_every_index_occurs_once(size: int, key: int) -> None:
    image = Permutation(size, key)[np.arange(size)]
    assert sorted(image.tolist()) == list(range(size))


@pytest.mark.parametrize("size", [2**12, 2**12 + 1, 2**16, 2**16 + 1, 10**6])
def test_every_index_of_a_large_range_occurs_once(size: int) -> None:
    seen = np.zeros(size, dtype=bool)
    seen[Permutation(size, 7)[np.arange(size)]] = True
    assert seen.all()


def test_one_element_equals_its_place_in_the_whole() -> None:
    for size in (300, 5000):
        order = Permutation(size, 3)
        assert [order[index] for index in range(300)] == order[np.arange(300)].tolist()


def test_an_index_outside_is_an_error() -> None:
    order = Permutation(10, 0)
    for index in (-1, 10):
        with pytest.raises(IndexError):
            order[index]


def test_a_range_beyond_what_memory_holds_is_shuffled() -> None:
    order = Permutation(2**61, 1)
    places = np.arange(1000)
    image = order[places]
    assert len(set(image.tolist())) == 1000 and image.max() > 2**60 > image.min()


def test_all_orders_of_four_are_equally_likely() -> None:
    seen = Counter(tuple(Permutation(4, key)[np.arange(4)].tolist()) for key in range(4800))
    assert len(seen) == 24
    assert chisquare(list(seen.values())).pvalue > 1e-4


def test_neighbours_do_not_stay_neighbours() -> None:
    image = Permutation(100_000, 5)[np.arange(100_000)]
    assert abs(np.corrcoef(image[:-1], image[1:])[0, 1]) < 0.02
    assert (np.abs(np.diff(image)) == 1).sum() < 20    # 2 are expected


def test_the_order_is_the_same_for_ever() -> None:
    # A resumed run must meet the order it began with, also after an update of this package or of numpy.
    assert Permutation(10, 0)[np.arange(10)].tolist() == [5, 7, 1, 4, 2, 8, 0, 6, 3, 9]
    assert Permutation(10**12, 42)[np.arange(3)].tolist() == [367030757384, 318487341394, 154862858099]
