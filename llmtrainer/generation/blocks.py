"""Who holds which block of a cache: taken, shared, given back."""

from __future__ import annotations

from collections.abc import Iterable


class Blocks:
    """Blocks 1 to `count` of `size` tokens, each held by as many as share it. Block 0 is nobody's: it pads tables."""

    def __init__(self, count: int, size: int) -> None:
        self.count, self.size = count, size
        self._free = list(range(count, 0, -1))
        self._holders = [0] * (count + 1)

    @property
    def free(self) -> int:
        return len(self._free)

    def needed(self, tokens: int) -> int:
        """Blocks that so many tokens fill, the last one perhaps in part."""
        return -(-tokens // self.size)

    def take(self, number: int) -> list[int]:
        """So many blocks that nobody else holds; the caller has seen that they are free."""
        assert number <= len(self._free), "more blocks asked for than are free"
        taken = [self._free.pop() for _ in range(number)]
        for block in taken:
            self._holders[block] = 1
        return taken

    def share(self, blocks: Iterable[int]) -> list[int]:
        """The same blocks for one more holder."""
        shared = list(blocks)
        for block in shared:
            assert self._holders[block] > 0, "a free block cannot be shared"
            self._holders[block] += 1
        return shared

    def give_back(self, blocks: Iterable[int]) -> None:
        """One holder less for each; who was the last one frees it."""
        for block in blocks:
            assert self._holders[block] > 0, "a free block cannot be given back"
            self._holders[block] -= 1
            if not self._holders[block]:
                self._free.append(block)
