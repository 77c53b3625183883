"""Sequences into micro-batches under a budget of tokens: few bins, a proof of how few, and equal work on every rank."""

from __future__ import annotations

import heapq
from bisect import bisect_left, insort
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from llmtrainer.base.errors import UserError

Numbers = NDArray[np.int64]

PAIR_COST = 1 / 8192
"""What a query's look at one key costs beside all else that is done for a token. By the count of operations it is
about 1 / (12 x hidden size); an estimate does, since it only decides which rank computes what."""


def pack(lengths: Numbers, budget: int) -> Numbers:
    """The bin of each length, numbered from 0: best fit, the longest first. No bin holds more than `budget`.

    Equal lengths go together: a bin that is the best fit for one stays it until it is full, so that the time grows
    with the number of different lengths and not of lengths.
    """
    lengths = np.asarray(lengths, dtype=np.int64)
    assert lengths.size == 0 or (lengths.min() > 0 and lengths.max() <= budget), "a length is in 1..budget"
    order = np.argsort(-lengths, kind="stable")
    found = np.empty(len(lengths), dtype=np.int64)
    edges = np.flatnonzero(np.diff(lengths[order], prepend=-1, append=-1))
    rooms: list[int] = []
    open_bins: dict[int, list[Numbers]] = {}
    bins = 0

    def keep(room: int, numbers: Numbers) -> None:
        if room and len(numbers):
            if room not in open_bins:
                insort(rooms, room)
            open_bins.setdefault(room, []).append(numbers)

    for at, stop in zip(edges[:-1].tolist(), edges[1:].tolist(), strict=True):
        length = int(lengths[order[at]])
        while at < stop:
            place = bisect_left(rooms, length)
            if place < len(rooms):
                room = rooms.pop(place)
                held = np.concatenate(open_bins.pop(room))
            else:
                room, new = budget, -(-(stop - at) // (budget // length))
                held, bins = np.arange(bins, bins + new), bins + new
            each = room // length
            used = min(len(held), -(-(stop - at) // each))
            taken = min(used * each, stop - at)
            found[order[at : at + taken]] = np.repeat(held[:used], each)[:taken]
            full, more = divmod(taken, each)
            keep(room - each * length, held[:full])
            keep(room - more * length, held[full:used])
            keep(room, held[used:])
            at += taken
    return found


def lower_bound(lengths: Numbers, budget: int) -> int:
    """So many bins are needed at least, whoever packs: the better of two bounds."""
    if not len(lengths):
        return 0
    ordered = np.sort(np.asarray(lengths, dtype=np.int64))
    return max(_by_thresholds(ordered, budget), _by_counts(ordered, budget))


def _by_thresholds(ordered: Numbers, budget: int) -> int:
    """L2 of Martello and Toth (1990), section 8.3.2.

    For a threshold a up to half the budget C: a length above C - a shares its bin with nothing of a or more; two
    above C / 2 share none; what is left of the lengths in a..C/2 must fit the room beside them.
    """
    before = np.concatenate([[0], np.cumsum(ordered)])
    half = int(np.searchsorted(ordered, budget / 2, side="right"))
    thresholds = np.unique(np.concatenate([[0], ordered[:half]]))
    small = np.searchsorted(ordered, thresholds, side="left")
    alone = np.searchsorted(ordered, budget - thresholds, side="right")
    large = len(ordered) - half
    room = (alone - half) * budget - (before[alone] - before[half])
    rest = before[half] - before[small] - room
    return int((large + np.maximum(0, -(-rest // budget))).max())


def _by_counts(ordered: Numbers, budget: int) -> int:
    """u(k) of Fekete and Schepers (2001), section 3, for k up to 24: of lengths above C / (k + 1) a bin holds k at
    most, so each takes a k-th of it, and so on; a length that is a whole number of such parts keeps its share."""
    values, counts = np.unique(ordered, return_counts=True)
    parts = np.arange(2, 26)[:, None] * values
    whole = parts % budget == 0
    shares = (np.where(whole, values, 0) @ counts).tolist()
    taken = (np.where(whole, 0, parts // budget) @ counts).tolist()
    return max(-(-(a * k + b * budget) // (budget * k)) for k, (a, b) in enumerate(zip(shares, taken, strict=True), 1))


def cost_of(lengths: Numbers, pair_cost: float = PAIR_COST) -> NDArray[np.float64]:
    """The work of each sequence in units of a token's: linear, and quadratic in attention (the causal half)."""
    length = np.asarray(lengths, dtype=np.float64)
    return length * (1.0 + pair_cost * length / 2)


def cut_step(lengths: Numbers, budget: int, ranks: int = 1, pair_cost: float = PAIR_COST) -> list[list[Numbers]]:
    """The micro-batches of one step: for each rank as many, each the places of its sequences, ascending. A sequence
    beyond the budget is a micro-batch alone.

    As few micro-batches as best fit finds, rounded up to a multiple of the ranks; over these the work is spread
    evenly where the budget allows. A micro-batch may be empty: there are fewer sequences than ranks.
    """
    costs = cost_of(lengths, pair_cost)
    lengths = np.minimum(lengths, budget)
    numbers = pack(lengths, budget)
    bins = int(numbers.max()) + 1 if len(numbers) else 1
    bins = -(-bins // ranks) * ranks
    even = _spread(lengths, costs, bins, budget)
    numbers = numbers if even is None else even
    work: NDArray[np.float64] = np.bincount(numbers, weights=costs, minlength=bins).astype(np.float64)
    members = np.split(np.argsort(numbers, kind="stable"), np.cumsum(np.bincount(numbers, minlength=bins))[:-1])
    return [[members[number] for number in dealt] for dealt in deal(work, ranks)]


def deal(costs: Sequence[float] | NDArray[np.float64], ranks: int) -> list[list[int]]:
    """Items to ranks, as many each, so that the costliest rank is cheap: each rank's, the costliest first.

    By the better of the snake (0 1 2 2 1 0 ...) and balanced differencing (Karmarkar and Karp 1982; with equal
    counts: Michiels et al. 2003).
    """
    assert len(costs) % ranks == 0, f"{len(costs)} items for {ranks} ranks"
    cost = np.asarray(costs, dtype=np.float64)
    order = np.argsort(-cost, kind="stable")
    found = [snake(order.tolist(), ranks)]
    if ranks > 1 and len(order):
        found.append(_differencing(cost, order, ranks))
    best = min(found, key=lambda dealt: max(float(cost[items].sum()) for items in dealt))
    return [sorted(items, key=lambda item: (-cost[item], item)) for items in best]


def snake(ordered: Sequence[int], ranks: int) -> list[list[int]]:
    """Items, the costliest first, to ranks there and back: rank r of W takes r, 2W-1-r, 2W+r, ..."""
    return [
        [item for place, item in enumerate(ordered) if place % (2 * ranks) in (rank, 2 * ranks - 1 - rank)]
        for rank in range(ranks)
    ]


def _differencing(cost: NDArray[np.float64], order: Numbers, ranks: int) -> list[list[int]]:
    """Groups of one item a rank are merged two by two, those that differ most first, the heaviest of one with the
    lightest of the other; so each rank has as many items."""
    heap: list[tuple[float, int, list[tuple[float, list[int]]]]] = []
    for start in range(0, len(order), ranks):
        parts = [(float(cost[item]), [int(item)]) for item in order[start : start + ranks]]
        heap.append((parts[-1][0] - parts[0][0], start, parts))
    heapq.heapify(heap)
    while len(heap) > 1:
        _, number, one = heapq.heappop(heap)
        _, _, other = heapq.heappop(heap)
        merged = [(a + b, [*mine, *theirs]) for (a, mine), (b, theirs) in zip(one, reversed(other), strict=True)]
        merged.sort(key=lambda part: -part[0])
        heapq.heappush(heap, (merged[-1][0] - merged[0][0], number, merged))
    return [items for _, items in heap[0][2]]


def _spread(lengths: Numbers, costs: NDArray[np.float64], bins: int, budget: int) -> Numbers | None:
    """The bin of each sequence, the costliest first into the least loaded that has room; None if one finds none."""
    work, room = np.zeros(bins), np.full(bins, budget, dtype=np.int64)
    found = np.empty(len(lengths), dtype=np.int64)
    for place in np.argsort(-costs, kind="stable").tolist():
        length = lengths[place]
        number = int(np.where(room >= length, work, np.inf).argmin())
        if room[number] < length:
            return None
        found[place] = number
        work[number] += costs[place]
        room[number] -= length
    return found


def require_fit(lengths: Numbers, budget: int, origin: str) -> None:
    """Refuse a budget into which one sequence does not fit."""
    if len(lengths) and (longest := int(np.argmax(lengths))) >= 0 and lengths[longest] > budget:
        too_long = int((lengths > budget).sum())
        raise UserError(
            f"{too_long:,} of {len(lengths):,} sequences do not fit a micro-batch of {budget:,} tokens",
            where=f"{origin}, the longest: {int(lengths[longest]):,} tokens",
            why="a sequence is never cut by the memory knob: what is trained would depend on the machine",
            fix=f"data.tokens_per_batch={int(lengths[longest])}",
        )
