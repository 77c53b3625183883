"""A shuffled order of any size that is computed, never stored."""

from __future__ import annotations

from typing import overload

import numpy as np
from numpy.typing import NDArray

ROUNDS = 8
SMALL = 2**12
"""Up to this size the order is drawn whole, by sorting hashes: exactly fair, and a network over few bits is not."""


class Permutation:
    """A bijection of 0..size-1 that is a function of (size, key): element i by random access, in O(1) memory.

    A balanced Feistel network (Luby and Rackoff 1988) over the next even power of two; an image outside the
    range is sent through again until it falls inside (cycle walking: Black and Rogaway 2002), at most four times
    on average, since the domain is less than four times the size.
    """

    def __init__(self, size: int, key: int) -> None:
        assert 0 < size < 2**62, f"a permutation of {size} elements"
        self.size = size
        hashed_key = hashed(np.array([key], dtype=np.uint64))
        self._table = None
        if size <= SMALL:
            self._table = np.argsort(hashed(np.arange(size, dtype=np.uint64) + hashed_key), kind="stable")
        self._half = np.uint64(((size - 1).bit_length() + 1) // 2)
        self._mask = (np.uint64(1) << self._half) - np.uint64(1)
        self._keys = hashed(np.arange(ROUNDS, dtype=np.uint64) + hashed_key)

    def __len__(self) -> int:
        return self.size

    @overload
    def __getitem__(self, index: int) -> int: ...
    @overload
    def __getitem__(self, index: NDArray[np.int64]) -> NDArray[np.int64]: ...
    def __getitem__(self, index: int | NDArray[np.int64]) -> int | NDArray[np.int64]:
        """The element at a place, or the elements at an array of places: int64 of the same shape."""
        place = np.atleast_1d(np.asarray(index, dtype=np.int64))
        if place.size and (place.min() < 0 or place.max() >= self.size):
            raise IndexError(f"place {index} of a permutation of {self.size}")
        found = self._walk(place) if self._table is None else self._table[place]
        return found if isinstance(index, np.ndarray) else int(found[0])

    def _walk(self, place: NDArray[np.int64]) -> NDArray[np.int64]:
        image = self._network(place.astype(np.uint64))
        while (outside := image >= self.size).any():
            image[outside] = self._network(image[outside])
        return image.astype(np.int64)

    def _network(self, value: NDArray[np.uint64]) -> NDArray[np.uint64]:
        left, right = value >> self._half, value & self._mask
        for key in self._keys:
            left, right = right, left ^ (hashed(right + key) & self._mask)
        return (left << self._half) | right


def hashed(value: NDArray[np.uint64]) -> NDArray[np.uint64]:
    """64 well-mixed bits of each 64-bit number: the step and finaliser of SplitMix64 (Steele et al. 2014)."""
    mixed = value + np.uint64(0x9E3779B97F4A7C15)
    mixed = (mixed ^ (mixed >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    mixed = (mixed ^ (mixed >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return mixed ^ (mixed >> np.uint64(31))
