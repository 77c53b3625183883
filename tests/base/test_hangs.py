"""Who is named when a job stands still or falls, from what its ranks left: cases written by hand."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import pytest

from llmtrainer.base.hangs import Finding, Rank, memory_kills, why_ended, why_still
from llmtrainer.base.heartbeat import Beat, Collective, Stall
from llmtrainer.base.outcome import Outcome
from llmtrainer.base.stack import Place

STEP = ("counts", "bucket", "figures")
"""The order of every step."""


def collective(number: int, name: str, pending: bool = False) -> Collective:
    size = {"counts": 3, "bucket": 900, "figures": 2}.get(name, 77)
    return Collective("0", number, name, ((size,),), ("Float",), pending)


def rank(
    number: int, names: Sequence[str], *, ranks: int = 2, pending: bool = True, line: int = 10, phase: str = "data",
    state: str | None = "S",
) -> Rank:  # fmt: skip
    """A rank whose collectives had these names; in the last one it still waits, if `pending`."""
    last = len(names)
    found = tuple(collective(place, name, pending and place == last) for place, name in enumerate(names, 1))
    stack = (Place("/home/me/model.py", line, "step"), Place("/home/me/model.py", 99, "main"))
    beat = Beat(number, ranks, 100 + number, "here", "1", 5, 4, phase, 1000.0 + number)
    return Rank(beat, Stall(5, 1010.0, 0.1, found, stack, {}, 0), state)


def still(*ranks: Rank) -> Finding:
    return why_still({item.beat.rank: item for item in ranks})


@pytest.mark.parametrize("culprit", [0, 1])
def test_of_two_ranks_in_different_collectives_the_one_out_of_order_is_named(culprit: int) -> None:
    due, early = [*STEP * 3, "counts"], [*STEP * 3, "bucket"]
    ranks = [rank(0, early if culprit == 0 else due), rank(1, early if culprit == 1 else due)]
    ranks[culprit] = rank(culprit, early, line=20)
    found = still(*ranks)
    assert (found.rank, found.cause, found.line) == (culprit, "skipped collective", "/home/me/model.py:20 in step")
    assert "collective 10 is bucket of float [900]" in found.detail and "counts of float [3]" in found.detail


def test_another_shape_at_the_same_line_is_a_shape_mismatch() -> None:
    found = still(rank(0, [*STEP * 3, "counts"]), rank(1, [*STEP * 3, "stranger"]))
    assert (found.rank, found.cause) == (1, "shape mismatch")


def test_one_collective_too_many_is_found_after_it_went_through() -> None:
    found = still(rank(0, [*STEP * 3, "counts"]), rank(1, [*STEP * 3, "stranger", "counts"]))
    assert (found.rank, found.cause) == (1, "skipped collective")


def test_the_majority_is_right_where_no_order_shows() -> None:
    found = still(*(rank(number, ["counts"] if number != 2 else ["bucket"], ranks=4) for number in range(4)))
    assert found.rank == 2


def test_a_rank_that_passed_a_collective_others_wait_in_has_skipped_it() -> None:
    found = still(rank(0, [*STEP, "counts"]), rank(1, [*STEP, "bucket"], pending=False, phase="optimizer"))
    assert (found.rank, found.cause) == (1, "skipped collective")


def test_ranks_that_all_wait_in_the_same_collective_blame_the_network() -> None:
    found = still(rank(0, STEP), rank(1, STEP))
    assert (found.rank, found.cause) == (None, "network")


@pytest.mark.parametrize(
    ("state", "cause"), [(None, "dead rank"), ("T", "stopped rank"), ("D", "slow disk")]
)
def test_what_the_system_says_of_a_process_comes_first(state: str | None, cause: str) -> None:
    found = still(rank(0, STEP), rank(1, STEP, state=state))
    assert (found.rank, found.cause) == (1, cause)


def test_a_rank_that_never_began_is_missed() -> None:
    assert still(rank(0, STEP, ranks=3), rank(2, STEP, ranks=3)).rank == 1


@pytest.mark.parametrize(("phase", "cause"), [("data", "slow loader"), ("save", "stuck")])
def test_a_rank_that_works_while_others_wait_is_named_by_its_phase(phase: str, cause: str) -> None:
    found = still(rank(0, [*STEP, "counts"]), rank(1, STEP, pending=False, phase=phase, line=33))
    assert (found.rank, found.cause, found.line) == (1, cause, "/home/me/model.py:33 in step")
    assert "rank 0 waits for it" in found.detail


def ended(text: str, *, signalled: int | None = None, kills: int = 0, failed: int = 1) -> Finding:
    outcomes = {0: Outcome(0, 1, "here", 0.0), 1: Outcome(1, 2, "here", 0.0)}
    if text:
        outcomes[1] = Outcome(1, 2, "here", 0.0, 1, text, None, {"line": "a.py:3 in f", "type": "Error"})
    ranks = {number: rank(number, STEP, state=None if number else "S") for number in (0, 1)}
    return why_ended(ranks, outcomes, failed, signalled, memory_kills=kills)


@pytest.mark.parametrize(
    ("text", "cause"),
    [
        ("OSError: [Errno 28] No space left on device", "full disk"), ("MemoryError: ", "out of memory"),
        ("OutOfMemoryError: CUDA out of memory. Tried to allocate", "out of memory"), ("KeyError: 'x'", "error"),
    ],
)  # fmt: skip
def test_what_a_rank_raised_is_sorted_by_who_can_mend_it(text: str, cause: str) -> None:
    found = ended(text)
    assert (found.rank, found.cause, found.line) == (1, cause, "a.py:3 in f")


def test_a_rank_that_ended_in_order_while_others_waited_for_it_is_at_fault() -> None:
    lost = Outcome(0, 1, "here", 2.0, 1, "RuntimeError: Connection closed by peer [127.0.0.1]:1", None, {})
    outcomes = {0: lost, 1: Outcome(1, 2, "here", 1.0, 3, "stopped")}
    found = why_ended({0: rank(0, STEP)}, outcomes, 0, None)
    assert (found.rank, found.cause) == (1, "skipped collective")


def test_a_kill_is_for_memory_only_where_the_kernel_counted_one(tmp_path: Path) -> None:
    assert ended("", signalled=9).cause == "dead rank"
    assert ended("", signalled=9, kills=1).cause == "out of memory"
    events = tmp_path / "memory.events"
    events.write_text("low 0\nhigh 0\nmax 12\noom 3\noom_kill 2\noom_group_kill 0\n")
    assert memory_kills(events) == 2 and memory_kills(tmp_path / "none") == 0
