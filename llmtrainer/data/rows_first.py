"""Rows first: the smallest micro-batch that each step's share of its sequences fits."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from llmtrainer.base.errors import UserError
from llmtrainer.data.budget import Numbers, lower_bound
from llmtrainer.data.draws import Draws

GRAIN = 32
"""Budgets are searched in multiples of this many tokens."""
DIVIDERS = range(1, 17)
MOST_TRIED = 4096
"""Sequences of a step, up to which a larger one is looked for even where the data has fewer."""
SPREAD = 2
"""So many sequences may the fullest step hold more than the emptiest."""


@dataclass(frozen=True)
class Plan:
    """What one pass over the data costs under a budget."""

    budget: int
    """Tokens of a micro-batch at most."""
    divider: int
    """Into how many bins a micro-batch is cut while it is planned."""
    samples_per_step: tuple[int, int]
    """Of the step with fewest and of that with most."""
    micro_batches: tuple[int, int]
    """The same of micro-batches over all ranks, before they are rounded up to a multiple of the ranks."""
    fill: float
    """Share of all micro-batches' budgets that tokens take."""
    bins: int
    """Micro-batches of the whole pass."""
    lower_bound: int
    """So many are needed at least, proved step by step."""


def find_plan(lengths: Numbers, group_size: int, batch_size: int, max_length: int, seed: int) -> Plan:
    """The smallest divider, and for it the smallest budget, with which no step of `batch_size` sequences needs more
    than `group_size` micro-batches and a micro-batch holds a sequence of `max_length`.

    Each step draws as many sequences, so one bin a micro-batch is enough unless that is refused. Raises UserError
    where a sequence is longer than `max_length`, or the budget would be shorter.
    """
    _require_lengths(lengths, max_length)
    drawn = drawn_lengths(lengths, batch_size, seed)
    best = 0
    for divider in DIVIDERS:
        budget = smallest_budget(drawn, group_size * divider)
        found = plan_of(drawn, budget, divider)
        best = max(best, budget)
        if budget >= max_length and found.samples_per_step[1] - found.samples_per_step[0] <= SPREAD:
            return found
        if budget < max_length:
            break    # with more bins a step the budget only falls
    raise _too_small(lengths, seed, group_size, batch_size, max_length, best)


def drawn_lengths(lengths: Numbers, batch_size: int, seed: int) -> Numbers:
    """Lengths of the sequences of every step of the first pass, the longest first: [steps, batch_size]. The last
    step may draw from the second pass."""
    steps = -(-len(lengths) // batch_size)
    _, rows = Draws(len(lengths), batch_size, seed).of_steps(0, steps)
    return -np.sort(-np.asarray(lengths, dtype=np.int64)[rows], axis=1)


def plan_of(drawn: Numbers, budget: int, divider: int = 1) -> Plan:
    """What the steps `drawn` cost under a budget that every sequence fits."""
    bins = bins_of_steps(drawn, budget)
    tokens, samples = int(drawn.sum()), drawn.shape[1]
    least = -(-drawn.sum(axis=1) // budget)
    # Where the sum alone proves the number of bins there is nothing left to prove.
    for step in np.flatnonzero(least < bins).tolist():
        least[step] = lower_bound(drawn[step], budget)
    total = int(bins.sum())
    return Plan(
        budget, divider, (samples, samples), (int(bins.min()), int(bins.max())), tokens / (total * budget), total,
        int(least.sum()),
    )  # fmt: skip


def smallest_budget(drawn: Numbers, bins: int) -> int:
    """The smallest multiple of 32 tokens with which no step needs more than so many bins."""
    # Below this some step does not fit whoever packs; best fit is asked only from here on.
    least = max(int(drawn[:, 0].max()), -(-int(drawn.sum(axis=1).max()) // bins))
    low, high = -(-least // GRAIN), -(-2 * least // GRAIN)
    while low < high:
        middle = (low + high) // 2
        if int(bins_of_steps(drawn, middle * GRAIN).max()) <= bins:
            high = middle
        else:
            low = middle + 1
    return low * GRAIN


def bins_of_steps(drawn: Numbers, budget: int) -> Numbers:
    """How many bins best fit, the longest first, opens for each step: `budget.pack` for all steps at once.

    `drawn` [steps, R] falls along each row and nothing in it exceeds the budget.
    """
    steps, samples = drawn.shape
    rooms = np.full((steps, 1), budget, dtype=np.int64)
    used = np.zeros(steps, dtype=np.int64)
    every = np.arange(steps)
    for place in range(samples):
        length = drawn[:, place]
        left = rooms - length[:, None]
        left[left < 0] = np.iinfo(np.int64).max
        # An untouched bin has the most room of all, so that it is taken only where no other will do.
        bin_of = left.argmin(axis=1)
        rooms[every, bin_of] -= length
        used = np.maximum(used, bin_of + 1)
        if int(used.max()) == rooms.shape[1] and place + 1 < samples:
            rooms = np.concatenate([rooms, np.full((steps, 1), budget, dtype=np.int64)], axis=1)
    return used


def _require_lengths(lengths: Sequence[int] | NDArray[np.int64], max_length: int) -> None:
    found = np.asarray(lengths)
    too_long = int((found > max_length).sum())
    if too_long:
        place = int(found.argmax())
        raise UserError(
            f"{too_long:,} of {len(found):,} sequences are longer than max_length, {max_length:,}",
            where=f"sequence {place + 1:,}, the longest: {int(found[place]):,} tokens",
            why="nothing is cut silently",
            fix=f"max_length={int(found[place])}, or shorten the data first, or compatible=true to plan as if",
        )


def _too_small(
    lengths: Numbers, seed: int, group_size: int, batch_size: int, max_length: int, budget: int
) -> UserError:
    drawn, fits = drawn_lengths(lengths, batch_size, seed), group_size
    while fits > 1 and smallest_budget(drawn, fits) < max_length:
        fits //= 2
    fixes = [f"group_size={fits}"] * (smallest_budget(drawn, fits) >= max_length)
    # The budget is that of the fullest step, which grows more slowly than the number of sequences: tried, not reckoned.
    more = batch_size * -(-max_length // budget)
    while more <= max(len(lengths), MOST_TRIED) and (
        smallest_budget(drawn_lengths(lengths, more, seed), group_size) < max_length
    ):
        more += -(-more // 8)
    fixes += [f"batch_size={more}"] * (more <= max(len(lengths), MOST_TRIED))
    return UserError(
        f"{batch_size:,} sequences in {group_size:,} micro-batches make micro-batches of {budget:,} tokens, below "
        f"max_length, {max_length:,}",
        why="a micro-batch must hold the longest sequence; with so few sequences in so many micro-batches, each is "
        "nearly alone",
        fix=", or ".join([*fixes, "compatible=true to be told regardless"]),
    )
