"""Why a run stands still or fell: which rank, what for, and at which line, from what the ranks left in their files."""

from __future__ import annotations

import linecache
import re
import socket
import time
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from llmtrainer.base.heartbeat import Beat, Collective, Stall, read_beats, read_stack, read_stall
from llmtrainer.base.outcome import Outcome
from llmtrainer.base.process import process_started, process_state
from llmtrainer.base.stack import Place, is_own, own_place

DEAD, STOPPED, DISK = "dead rank", "stopped rank", "slow disk"
SKIPPED, SHAPE, NETWORK = "skipped collective", "shape mismatch", "network"
LOADER, DEADLOCK, STUCK = "slow loader", "deadlock", "stuck"
FULL, MEMORY, RAISED = "full disk", "out of memory", "error"

_WAITING_FILES = (
    "threading.py", "queue.py", "_base.py", "connection.py", "synchronize.py", "selectors.py", "queues.py",
)  # fmt: skip
_WAITING_CODE = re.compile(r"\.(acquire|join|wait|get|put|result|recv|communicate|poll)\(|\bwith\b.*(lock|mutex|guard)")
_NO_SPACE = ("no space left on device", "the disk is full", "errno 28", "disk quota exceeded", "errno 122")
_NO_MEMORY = ("memoryerror", "can't allocate memory", "out of memory", "outofmemory", "cannot allocate memory",
              "not enough memory")  # fmt: skip
_OUR_OWN = ("heartbeat", "checkpoint", "pt_")
"""Threads that are no workers of a loader."""


@dataclass(frozen=True)
class Finding:
    """What is wrong, as far as the files tell."""

    rank: int | None
    """Who is at fault; None if that cannot be told."""
    cause: str
    """One of the words above."""
    line: str | None
    """`file:line in function`."""
    detail: str

    def __str__(self) -> str:
        who = "no rank can be named" if self.rank is None else f"rank {self.rank}"
        at = f"\n  at    {self.line}" + _code(self.line) if self.line else ""
        return f"{self.cause}: {who}\n  why   {self.detail}{at}"


@dataclass(frozen=True)
class Rank:
    """All that is known of one rank."""

    beat: Beat
    stall: Stall | None
    state: str | None
    """Of its process, as the system has it: None is gone, "?" is on another machine."""
    dumped: tuple[Place, ...] = ()
    """Its stack as faulthandler wrote it."""

    @property
    def collectives(self) -> tuple[Collective, ...]:
        """The last ones, oldest first."""
        return self.stall.collectives if self.stall is not None else ()

    @property
    def pending(self) -> Collective | None:
        """The oldest collective that it waits in, or that it was in when its neighbour fell."""
        if self._failed is not None:
            return self._failed
        return next((item for item in self.collectives if item.pending), None)

    @property
    def done(self) -> list[Collective]:
        """The collectives behind it, oldest first."""
        return [item for item in self.collectives if not item.pending and item is not self._failed]

    @property
    def _failed(self) -> Collective | None:
        """The collective that ended with an error: torch counts it as done."""
        if self.stall is None or not self.stall.raised or not exchanges(self.stall.stack):
            return None
        return self.stall.collectives[-1] if self.stall.collectives else None

    @property
    def stack(self) -> tuple[Place, ...]:
        return self.stall.stack if self.stall is not None and self.stall.stack else self.dumped

    @property
    def line(self) -> str | None:
        """The innermost line that is neither Python's nor a library's."""
        place = own_place(self.stack)
        return None if place is None else str(place)


def ranks_of(folder: Path, *, started: Callable[[int], str | None] = process_started) -> dict[int, Rank]:
    """Every rank that has a heartbeat in this folder."""
    found = {}
    for rank, beat in read_beats(folder).items():
        stall = read_stall(folder, rank)
        here = beat.host == socket.gethostname()
        state: str | None = "?"
        if here:
            state = process_state(beat.pid) if started(beat.pid) == beat.started else None
        current = stall if stall is not None and (stall.count == beat.count or state is None) else None
        found[rank] = Rank(beat, current, state, read_stack(folder, rank))
    return found


def why_still(ranks: Mapping[int, Rank]) -> Finding:
    """Why none of these goes on."""
    everyone = list(ranks.values())
    for state, cause, what in (
        (None, DEAD, "its process is gone"), ("T", STOPPED, "its process was stopped by a signal; kill -CONT goes on"),
        ("t", STOPPED, "its process is stopped by a debugger"), ("D", DISK, "its process waits for a disk or device"),
    ):  # fmt: skip
        found = [item for item in everyone if item.state == state]
        if found:
            return Finding(found[0].beat.rank, cause, found[0].line, f"{what}, in {_phase(found[0])}")
    busy = [item for item in everyone if item.pending is None]
    if not busy:
        return _in_collectives(everyone)
    slowest = min(busy, key=lambda item: item.beat.since)
    waiting = [item for item in everyone if item.pending is not None]
    passed = [(item, other) for item in busy for other in waiting if _is_past(item, other.pending)]
    if passed:
        rank, other = passed[0]
        return Finding(
            rank.beat.rank, SKIPPED, rank.line,
            f"in {_phase(rank)}, past collective {_pending_number(other)}; rank {other.beat.rank} waits in it: "
            f"{_what(other)} at {other.line}",
        )  # fmt: skip
    return _busy(slowest, waiting)


def why_ended(
    ranks: Mapping[int, Rank], outcomes: Mapping[int, Outcome], failed: int | None, signalled: int | None,
    *, memory_kills: int = 0,
) -> Finding:  # fmt: skip
    """Why a run fell. `failed` is the rank that ended it and `signalled` the signal that killed it, if one did;
    `memory_kills` are processes that the kernel killed here for memory meanwhile."""
    failed = failed if failed is not None else next((rank for rank, item in outcomes.items() if item.failed), None)
    outcome = outcomes.get(failed) if failed is not None else None
    rank = ranks.get(failed) if failed is not None else None
    if outcome is not None and outcome.failed:
        said = outcome.text
        error = outcome.error or {}
        for signs, cause in ((_NO_SPACE, FULL), (_NO_MEMORY, MEMORY)):
            if any(sign in f"{said} {error.get('type') or ''}".lower() for sign in signs):
                return Finding(failed, cause, error.get("line"), said.splitlines()[0])
        if (found := _mismatch(list(ranks.values()))) is not None:
            return found
        left = [item for item in outcomes.values() if item.exit_code is not None and not item.failed]
        if outcome.lost_a_neighbour and left:
            return Finding(
                left[0].rank, SKIPPED, error.get("line"),
                f"it ended in order, with exit code {left[0].exit_code}, while rank {failed} still exchanged numbers "
                "with it: it had left the order of collectives before, and read numbers that were meant for another",
            )  # fmt: skip
        return Finding(failed, RAISED, error.get("line"), said.splitlines()[0])
    where = f" in {_phase(rank)}" if rank is not None else ""
    line = rank.line if rank is not None else None
    if signalled == 9 and memory_kills:
        return Finding(failed, MEMORY, line, f"the kernel killed it for memory{where}")
    if signalled in (6, 11, 7) and rank is not None:
        return _given_up(rank, ranks, signalled)
    how = f"killed by signal {signalled}" if signalled else "gone without a word"
    return Finding(failed, DEAD, line, f"it was {how}{where}")


def exchanges(stack: Sequence[Place]) -> bool:
    """Whether a thread is in a collective, or in a backward pass, which may hold one."""
    return any("torch/distributed" in place.file or place.function == "_engine_run_backward" for place in stack[:6])


def memory_kills(path: Path = Path("/sys/fs/cgroup/memory.events")) -> int:
    """How many processes of this control group the kernel has killed for memory; 0 where it does not say."""
    try:
        words = dict(line.split() for line in path.read_text(encoding="ascii").splitlines())
    except (OSError, ValueError):
        return 0
    return int(words.get("oom_kill", 0))


def _in_collectives(everyone: Sequence[Rank]) -> Finding:
    """All of them wait in a collective: in different ones, or the network has lost it."""
    found = _mismatch(everyone)
    if found is not None:
        return found
    first = everyone[0]
    missing = sorted(set(range(first.beat.ranks)) - {item.beat.rank for item in everyone})
    if missing:
        return Finding(
            missing[0], DEAD, None,
            "all others wait, and no sign of life of it was ever written: it has not begun, or writes into another "
            "folder than this",
        )  # fmt: skip
    return Finding(
        None, NETWORK, first.line,
        f"every rank waits in collective {_pending_number(first)}, {first.pending.what if first.pending else ''}, and "
        "it does not end: a connection was lost, or a machine is gone",
    )  # fmt: skip


def _mismatch(everyone: Sequence[Rank]) -> Finding | None:
    """Where the ranks' collectives part, if they do: who left the order that all had before, and how."""
    parted = _parting(everyone)
    if parted is None:
        return None
    (group, number), there = parted
    culprit = _odd_one(there)
    other = next(item for item, found in there if found.what != _at(culprit, group, number))
    what, right = _at(culprit, group, number), _at(other, group, number)
    return Finding(
        culprit.beat.rank, _how(culprit, other, group, number), culprit.line,
        f"its collective {number} is {what}, that of rank {other.beat.rank} is {right} ({other.line})",
    )  # fmt: skip


def _parting(everyone: Sequence[Rank]) -> tuple[tuple[str, int], list[tuple[Rank, Collective]]] | None:
    """The first collective that is not the same on all ranks that have come to it: its group and number, and what it
    is on each."""
    found: dict[tuple[str, int], list[tuple[Rank, Collective]]] = {}
    for rank in everyone:
        for item in rank.collectives:
            found.setdefault((item.group, item.number), []).append((rank, item))
    parted = [(key, there) for key, there in found.items() if len({item.what for _, item in there}) > 1]
    return min(parted, key=lambda item: item[0][1], default=None)


def _odd_one(there: Sequence[tuple[Rank, Collective]]) -> Rank:
    """Whose collective is not the one that was due: by the order of the steps before, else by the majority."""
    strangers = [rank for rank, item in there if (due := _due(_before(rank, item))) is not None and item.what != due]
    if strangers and len(strangers) < len(there):
        return strangers[0]
    votes = Counter(item.what for _, item in there)
    rarest = min(votes, key=lambda what: votes[what])
    if votes[rarest] < max(votes.values()):
        return next(rank for rank, item in there if item.what == rarest)
    # Of two, what was never seen before is the stranger.
    known = {before.what for rank, item in there for before in _before(rank, item)}
    return next((rank for rank, item in there if item.what not in known), there[-1][0])


def _how(culprit: Rank, other: Rank, group: str, number: int) -> str:
    """Whether a rank brought another shape to a collective, or is in one that was not due."""
    mine, yours = culprit.pending, other.pending
    if mine is not None and yours is not None and mine.number == yours.number == number:
        return SHAPE if _same_place(culprit.stack, other.stack) else SKIPPED
    due, brought = _at(other, group, number), _at(culprit, group, number)
    known = {item.what for item in culprit.collectives if (item.group, item.number) < (group, number)}
    # It goes on with what the others are in: it has only put one in between.
    return SKIPPED if brought in known or _at(culprit, group, number + 1) == due else SHAPE


def _at(rank: Rank, group: str, number: int) -> str | None:
    found = (item.what for item in rank.collectives if (item.group, item.number) == (group, number))
    return next(found, None)


def _before(rank: Rank, collective: Collective) -> list[Collective]:
    place = rank.collectives.index(collective)
    return list(rank.collectives[:place])


def _due(done: Sequence[Collective]) -> str | None:
    """What comes next if the last ones repeat, since steps follow one order: what followed where the same stood before
    it, the longest such place counting. None if there is none."""
    names = [item.what for item in done]
    places = range(len(names) - 1)
    best = max(places, key=lambda place: (_alike(names, place), place), default=None)
    return None if best is None or not _alike(names, best) else names[best + 1]


def _alike(names: Sequence[str], place: int) -> int:
    """How many names up to this place are the same as at the end."""
    length = 0
    while length <= place and names[place - length] == names[-1 - length]:
        length += 1
    return length


def _busy(rank: Rank, waiting: Sequence[Rank]) -> Finding:
    """A rank that is in no collective, and does not go on."""
    others = f"; {_ranks(waiting)} for it" if waiting else ""
    age = max(time.time() - rank.beat.since, 0.0)
    told = f"{age:.0f} s in {_phase(rank)}{_usually(rank)}{others}"
    if not rank.stack:
        return Finding(rank.beat.rank, STUCK, None, f"{told}; it does not even answer")
    if not _waits(rank.stack):
        return Finding(rank.beat.rank, LOADER if rank.beat.phase == "data" else STUCK, rank.line, told)
    threads = rank.stall.threads if rank.stall is not None else {}
    for name, stack in threads.items():
        working = stack and not _waits(stack) and any(map(is_own, stack)) and not name.startswith(_OUR_OWN)
        if working:
            line = str(own_place(stack))
            cause = LOADER if rank.beat.phase == "data" else STUCK
            return Finding(rank.beat.rank, cause, line, f"{told}, waiting for its thread `{name}`")
    return Finding(rank.beat.rank, DEADLOCK, rank.line, f"{told}, waiting for what nobody gives")


def _given_up(rank: Rank, ranks: Mapping[int, Rank], signalled: int) -> Finding:
    """A library ended the process. Within a collective that is how gloo says that the sizes differ."""
    others = [item for item in ranks.values() if item is not rank and item.pending is not None]
    line = own_place(rank.dumped)
    if signalled != 6 or not others or not exchanges(rank.dumped):
        return Finding(
            rank.beat.rank, DEAD, None if line is None else str(line),
            f"a library ended it with signal {signalled} in {_phase(rank)}",
        )  # fmt: skip
    # What this rank brought is lost with it. Where another brought what was not due, that one is at fault.
    strangers = [item for item in others if (due := _due(item.done)) is not None and _what(item) != due]
    odd, right = (strangers[0], rank) if strangers else (rank, others[0])
    same = _same_place(odd.stack or odd.dumped, right.stack or right.dumped)
    return Finding(
        odd.beat.rank, SHAPE if same else SKIPPED, str(line) if odd is rank else odd.line,
        f"rank {rank.beat.rank} gave up in collective {_pending_number(others[0])} at {line}, where rank "
        f"{others[0].beat.rank} is in {_what(others[0])} at {others[0].line}",
    )  # fmt: skip


def _waits(stack: Sequence[Place]) -> bool:
    """Whether a thread waits for another thread or process, and not for a disk, a clock or its own work."""
    top = stack[0]
    if Path(top.file).name in _WAITING_FILES:
        return True
    return _WAITING_CODE.search(linecache.getline(top.file, top.line)) is not None


def _same_place(one: Sequence[Place], other: Sequence[Place]) -> bool:
    """Whether two ranks stand at the same place of the program, called by the same lines. One of the stacks may end
    sooner: it was told by an error."""
    chains = [[str(place) for place in stack if is_own(place)] for stack in (one, other)]
    return all(first == second for first, second in zip(*chains, strict=False))


def _what(rank: Rank) -> str:
    return rank.pending.what if rank.pending is not None else "none"


def _pending_number(rank: Rank) -> int:
    return rank.pending.number if rank.pending is not None else 0


def _is_past(rank: Rank, collective: Collective | None) -> bool:
    """Whether a rank has done this collective, or another one of the same number."""
    if collective is None:
        return False
    return any(item.group == collective.group and item.number >= collective.number for item in rank.done)


def _phase(rank: Rank) -> str:
    return f"phase {rank.beat.phase} of step {rank.beat.step}"


def _usually(rank: Rank) -> str:
    longest = rank.stall.longest if rank.stall is not None else None
    return "" if longest is None else f" (at most {longest:.2g} s so far)"


def _ranks(waiting: Sequence[Rank]) -> str:
    names = ", ".join(str(item.beat.rank) for item in waiting)
    return f"ranks {names} wait" if len(waiting) > 1 else f"rank {names} waits"


def _code(line: str) -> str:
    file, _, rest = line.partition(":")
    number = rest.partition(" ")[0]
    text = linecache.getline(file, int(number)).strip() if number.isdecimal() else ""
    return f": {text}" if text else ""
