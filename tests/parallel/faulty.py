"""A job with one fault in it, for tests: `python faulty.py` reads one JSON request a line and forks its ranks.

Forked, because importing torch takes longer than most faults take to be found. A rank trains a small model by hand:
data, a sum over ranks, forward, backward with DDP's all-reduce, a sum of figures, a step of the optimizer.
"""

from __future__ import annotations

import json
import os
import queue
import resource
import signal
import sys
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.distributed as dist
from torch import Tensor, nn

from llmtrainer.base import outcome
from llmtrainer.base.heartbeat import Heartbeat
from llmtrainer.parallel.recorder import last_collectives


@dataclass(frozen=True)
class Fault:
    """What goes wrong, on which rank, in which step."""

    kind: str
    rank: int = 1
    step: int = 5
    ranks: int = 2


class Job:
    """One rank."""

    def __init__(self, fault: Fault, folder: Path, rank: int) -> None:
        self.fault, self.folder, self.rank = fault, folder, rank
        self.step = 0
        self.lock = threading.Lock()

    def due(self, *kinds: str) -> bool:
        """Whether one of these faults is to happen here and now."""
        if self.fault.kind in kinds and self.rank == self.fault.rank and self.step == self.fault.step:
            (self.folder / "happened").touch()
            return True
        return False

    def sum(self, values: Tensor) -> Tensor:
        dist.all_reduce(values)
        return values

    def data(self) -> Tensor:
        if self.due("slow loader"):
            time.sleep(600)  # FAULT slow loader
        if self.due("busy loader"):
            while True:  # FAULT busy loader
                self.step += 0
        if self.due("deadlocked loader"):
            self.deadlocked_loader()
        if self.due("slow worker"):
            self.slow_worker()
        if self.due("killed"):
            os.kill(os.getpid(), signal.SIGKILL)  # FAULT killed
        if self.due("halted"):
            os.kill(os.getpid(), signal.SIGSTOP)  # FAULT halted
        return torch.randn(4, 8)

    def deadlocked_loader(self) -> None:
        rows: queue.Queue[int] = queue.Queue()
        with self.lock:
            worker = threading.Thread(target=self.starved, args=(rows,), name="loader", daemon=True)
            worker.start()
            rows.get()  # FAULT deadlocked loader

    def starved(self, rows: queue.Queue[int]) -> None:
        with self.lock:
            rows.put(1)

    def slow_worker(self) -> None:
        rows: queue.Queue[int] = queue.Queue()
        threading.Thread(target=self.slowly, args=(rows,), name="loader", daemon=True).start()
        rows.get()

    def slowly(self, rows: queue.Queue[int]) -> None:
        time.sleep(600)  # FAULT slow worker
        rows.put(1)

    def counts(self) -> Tensor:
        if self.due("skipped sum"):
            return torch.ones(3)
        return self.sum(torch.ones(5 if self.due("other shape") else 3))

    def figures(self) -> Tensor:
        if self.due("skipped figures"):
            return torch.ones(2)
        return self.sum(torch.ones(40_000 if self.due("larger shape") else 2, dtype=torch.float64))

    def update(self) -> None:
        if self.due("deadlock"):
            self.lock.acquire()
            self.lock.acquire()  # FAULT deadlock
        if self.due("extra sum"):
            self.sum(torch.ones(1))  # FAULT extra sum
        if self.due("out of memory"):
            soft = 2 * 2**30 + _virtual()
            resource.setrlimit(resource.RLIMIT_AS, (soft, soft))
            torch.ones(2**40, dtype=torch.uint8)  # FAULT out of memory
        if self.due("aborted"):
            os.abort()  # FAULT aborted
        if self.due("raised"):
            raise KeyError("no such thing")  # FAULT raised

    def save(self) -> None:
        if self.due("full disk"):
            with Path("/dev/full").open("w") as file:
                file.write("x" * 100_000)  # FAULT full disk
        if self.due("stuck save"):
            time.sleep(600)  # FAULT stuck save

    def run(self) -> None:
        model = nn.parallel.DistributedDataParallel(nn.Linear(8, 4))
        with Heartbeat(self.folder / "heartbeats", self.rank, self.fault.ranks, last_collectives) as heart:
            for self.step in range(1, 9):
                heart.beat("data", self.step)
                rows = self.data()
                self.counts()
                heart.beat("forward", self.step)
                loss = model(rows).square().sum()
                heart.beat("backward", self.step)
                loss.backward()
                heart.beat("optimizer", self.step)
                self.figures()
                self.update()
                heart.beat("save", self.step)
                self.save()


def _virtual() -> int:
    return int(Path("/proc/self/statm").read_text().split()[0]) * os.sysconf("SC_PAGE_SIZE")


def begin(request: dict[str, object], rank: int, folder: Path) -> None:
    """Be one rank, in a forked process."""
    fault = Fault(**request)  # type: ignore[arg-type]
    os.setsid()
    os.environ.update(
        RANK=str(rank), WORLD_SIZE=str(fault.ranks), LLMTRAINER_OUTCOMES=str(folder / "ranks"),
        MASTER_ADDR="127.0.0.1", GLOO_SOCKET_IFNAME="lo",
    )  # fmt: skip
    stream = os.open(folder / f"rank-{rank}.log", os.O_WRONLY | os.O_CREAT)
    os.dup2(stream, 1)
    os.dup2(stream, 2)
    outcome.begin()
    try:
        store = dist.FileStore(str(folder / "store"), fault.ranks)
        dist.init_process_group("gloo", store=store, rank=rank, world_size=fault.ranks)
        Job(fault, folder, rank).run()
        outcome.end(0, "")
    except BaseException as error:
        outcome.end(1, f"a defect of ours: {type(error).__name__}: {error}", error=outcome.described(error))
        os._exit(1)
    os._exit(0)


def requests() -> Iterator[tuple[dict[str, object], Path]]:
    for line in sys.stdin:
        data = json.loads(line)
        yield data["fault"], Path(data["folder"])


def main() -> None:
    """Fork the ranks of every request, and answer with their process numbers. All die with this process."""
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)
    children: list[int] = []
    for request, folder in requests():
        pids = []
        for rank in range(int(str(request["ranks"]))):
            child = os.fork()
            if child == 0:
                begin(request, rank, folder)
            pids.append(child)
        children += pids
        print(json.dumps(pids), flush=True)
    for child in children:
        try:
            os.kill(child, signal.SIGKILL)
        except ProcessLookupError:
            continue


if __name__ == "__main__":
    main()
