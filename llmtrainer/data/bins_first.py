"""Bins first: all sequences into bins, then bins into steps. How a predecessor planned, kept for its figures."""

from __future__ import annotations

import heapq
import itertools
import random
from bisect import insort
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from llmtrainer.base.errors import UserError

SHUFFLED_BY = 1234
GRAIN = 32
"""Budgets are searched in multiples of this many tokens."""
LARGEST = 2**22

Bins = list[list[int]]


@dataclass(frozen=True)
class Steps:
    """A plan: which bins each optimizer step has."""

    budget: int
    """Tokens of a bin."""
    bins: Bins
    """The sequences of each bin."""
    steps: list[list[int]]
    """The bins of each step, as many in every one."""

    @property
    def samples_per_step(self) -> tuple[int, int]:
        """Of the step with fewest and of that with most."""
        counts = [sum(len(self.bins[number]) for number in step) for step in self.steps]
        return min(counts), max(counts)


def find_steps(lengths: Sequence[int] | NDArray[np.int64], group_size: int, batch_size: int) -> Steps:
    """The smallest budget with which a step of `group_size` bins holds `batch_size` sequences on average, and its
    plan. The budget may be smaller than a sequence, which then has a bin of its own."""
    low, high = 0, LARGEST // GRAIN
    order = _shuffled(len(lengths))
    shuffled = np.asarray(lengths, dtype=np.int64)[order]
    while low < high:
        middle = (low + high) // 2
        if _holds(shuffled, middle * GRAIN, group_size, batch_size):
            high = middle
        else:
            low = middle + 1
    return _in_steps(_worst_fit(order, shuffled, low * GRAIN), low * GRAIN, group_size)


def plan_steps(lengths: Sequence[int], budget: int, group_size: int) -> Steps:
    """Bins of `budget` tokens by worst fit, in steps of `group_size` bins with about as many sequences each. Raises
    UserError where there are too few sequences for that many bins."""
    return _in_steps(worst_fit(lengths, budget), budget, group_size)


def _in_steps(bins: Bins, budget: int, group_size: int) -> Steps:
    bins = rounded_up(bins, group_size)
    return Steps(budget, bins, equal_samples([len(held) for held in bins], group_size))


def worst_fit(lengths: Sequence[int], budget: int) -> Bins:
    """Shuffled, each into the bin with most room; one that does not fit there opens a bin, however long it is."""
    order = _shuffled(len(lengths))
    return _worst_fit(order, np.asarray(lengths, dtype=np.int64)[order], budget)


def _worst_fit(order: Sequence[int], shuffled: NDArray[np.int64], budget: int) -> Bins:
    """As `worst_fit`, of sequences in their shuffled order. Of bins with equal room the first is taken."""
    bin_of: list[int] = []
    with_room: list[list[int]] = [[] for _ in range(budget + 1)]
    """The bins that have so much room, as a heap."""
    rooms: list[int] = []
    """The rooms that some bin has, negative, as a heap: a few hundred, where bins are many thousands."""
    opened, most = 0, -1
    for length in shuffled.tolist():
        if most >= length:
            place, room = heapq.heappop(with_room[most]), most - length
            if not with_room[most]:
                heapq.heappop(rooms)
        else:
            place, room = opened, budget - length
            opened += 1
        bin_of.append(place)
        if room >= 0:
            if not with_room[room]:
                heapq.heappush(rooms, -room)
            heapq.heappush(with_room[room], place)
        most = -rooms[0] if rooms else -1
    number = np.asarray(bin_of, dtype=np.int64)
    grouped = np.asarray(order, dtype=np.int64)[np.argsort(number, kind="stable")].tolist()
    ends = np.cumsum(np.bincount(number, minlength=opened)).tolist()
    return [grouped[start:end] for start, end in itertools.pairwise([0, *ends])]


def rounded_up(bins: Bins, group_size: int) -> Bins:
    """As many more bins as make whole steps: bins are halved from the end on, once each, and where that is not
    enough, single sequences leave them."""
    missing = -len(bins) % group_size
    found: Bins = []
    for held in reversed(bins):
        if missing and len(held) > 1:
            found += [held[len(held) // 2 :], held[: len(held) // 2]]
            missing -= 1
        else:
            found.append(held)
    found.reverse()
    for place in range(len(found) - 1, -1, -1):
        while missing and len(found[place]) > 1:
            found.append([found[place].pop()])
            missing -= 1
    if missing:
        raise UserError(
            f"{sum(map(len, bins)):,} sequences do not fill a step of {group_size:,} bins",
            why="every bin of a step holds one sequence at least",
            fix="a smaller group_size, or more data",
        )
    return found


def equal_samples(counts: Sequence[int], group_size: int) -> list[list[int]]:
    """Bins to steps of `group_size` bins with about as many sequences each: the fullest bin to the step with fewest
    that has a place; then the lightest and the heaviest step exchange the two bins whose difference is the largest
    below the steps' own, until none is left that helps."""
    order = np.argsort(-np.asarray(counts), kind="stable").tolist()
    steps: list[list[int]] = [[] for _ in range(len(counts) // group_size)]
    lightest = [(0, step) for step in range(len(steps))]
    for number in order:
        total, step = heapq.heappop(lightest)
        steps[step].append(number)
        if len(steps[step]) < group_size:
            heapq.heappush(lightest, (total + counts[number], step))
    count = np.asarray(counts, dtype=np.int64)
    totals = sorted((int(count[held].sum()), step) for step, held in enumerate(steps))
    while len(totals) > 1:
        (least, light), (most, heavy) = totals[0], totals[-1]
        swap = _best_swap(count[steps[light]], count[steps[heavy]], most - least)
        if swap is None:
            break
        mine, theirs, moved = swap
        steps[light][mine], steps[heavy][theirs] = steps[heavy][theirs], steps[light][mine]
        totals = totals[1:-1]
        insort(totals, (least + moved, light))
        insort(totals, (most - moved, heavy))
    return steps


def _best_swap(light: NDArray[np.int64], heavy: NDArray[np.int64], gap: int) -> tuple[int, int, int] | None:
    """(bin of the light step, bin of the heavy one, sequences that move): the most, but fewer than the gap."""
    moved = heavy[None, :] - light[:, None]
    moved = np.where(moved < gap, moved, 0)
    place = int(moved.argmax())
    mine, theirs = divmod(place, len(heavy))
    return (mine, theirs, int(moved[mine, theirs])) if moved[mine, theirs] > 0 else None


def _holds(shuffled: NDArray[np.int64], budget: int, group_size: int, batch_size: int) -> bool:
    """Whether a step holds enough sequences on average. Worst fit is run only where bounds leave it open."""
    count, total = len(shuffled), int(np.minimum(shuffled, budget).sum())
    if budget and not _enough(count, -(-total // budget), group_size, batch_size):
        return False    # even bins that are all full are too many
    if budget and shuffled.max() <= budget and _enough(count, 2 * total // budget + 1, group_size, batch_size):
        return True     # any two bins hold more than a budget together
    most = count // batch_size * group_size
    return _enough(count, _bins(shuffled, budget, most), group_size, batch_size)


def _bins(shuffled: NDArray[np.int64], budget: int, most: int) -> int:
    """How many bins worst fit opens; once they are more than `most`, how many there are by then."""
    rooms = [-budget]
    replace, push = heapq.heapreplace, heapq.heappush    # a million times: looking up a name counts
    for length in shuffled.tolist():
        left = rooms[0] + length
        if left <= 0:
            replace(rooms, left)
        else:
            push(rooms, length - budget)
            if len(rooms) > most + 1:    # one of them may be the bin that nothing is in yet
                break
    return len(rooms) - (-budget in rooms)


def _enough(sequences: int, bins: int, group_size: int, batch_size: int) -> bool:
    return sequences >= batch_size * -(-bins // group_size)


def _shuffled(count: int) -> list[int]:
    order = list(range(count))
    random.Random(SHUFFLED_BY).shuffle(order)
    return order
