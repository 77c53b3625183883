"""Carries buckets through a hook one after another, while backward goes on."""

from __future__ import annotations

import queue
import threading
from collections.abc import Callable, Mapping

import torch
import torch.distributed as dist
from torch import Tensor

from llmtrainer.parallel.engines.single import HOOK
from llmtrainer.parallel.hook import Bucket, Hook, part_of
from llmtrainer.parallel.link import Link

RANKS = HOOK + "ranks"


class Courier:
    """One hook at work. Buckets come in the same order on every rank, and are carried in that order: on a CPU by one
    thread with a process group of its own, on CUDA on one stream. So the messages of a hook have one order too,
    however many it sends for a bucket; callbacks of futures, which run when they run, send none.
    """

    def __init__(self, hook: Hook, device: torch.device, rank: int, size: int) -> None:
        self._device, self._rank, self._size = device, rank, size
        on_cuda = device.type == "cuda"
        self.link = Link(device, dist.new_group(backend="nccl" if on_cuda else "gloo"), size)
        self.exchange = hook.start(self.link)
        self.bytes_given = 0
        """Of the gradients so far, as they came."""
        self._told = (0, 0)
        self._failure: BaseException | None = None
        self._stream = torch.cuda.Stream(device) if on_cuda else None
        self._waiting: queue.SimpleQueue[Callable[[], None] | None] = queue.SimpleQueue()
        self._thread = None if on_cuda else threading.Thread(target=self._work, name="gradients", daemon=True)
        if self._thread is not None:
            self._thread.start()

    def carry(self, bucket: Bucket) -> torch.futures.Future[Tensor]:
        """The bucket's buffer, once it holds sums over all ranks."""
        self.bytes_given += bucket.buffer.numel() * bucket.buffer.element_size()
        if self._stream is None:
            done: torch.futures.Future[Tensor] = torch.futures.Future()
            self._waiting.put(lambda: self._carried(bucket, done))
            return done
        done = torch.futures.Future(devices=[self._device])     # type: ignore[list-item]  # torch takes devices too
        self._stream.wait_stream(torch.cuda.current_stream(self._device))
        with torch.cuda.stream(self._stream):
            bucket.buffer.record_stream(self._stream)
            self._carried(bucket, done)
        return done

    def require_delivered(self) -> None:
        """Raise what went wrong on the way, as itself."""
        failure, self._failure = self._failure, None
        if failure is not None:
            raise failure

    def state(self) -> dict[str, Tensor]:
        """What the hook remembers: on rank 0 of all ranks, on another of this one. Every rank asks."""
        shared, own = self.exchange.shared_state(), self.exchange.own_state()
        if not shared and not own:
            return {}
        found = {f"{HOOK}shared.{name}": value for name, value in shared.items()}
        for name in sorted(own):
            for rank, value in enumerate(self._gathered(own[name])):
                found[f"{HOOK}rank{rank}.{name}"] = value
            found[f"{HOOK}rank{self._rank}.{name}"] = own[name]
        return found | {RANKS: torch.tensor(self._size, dtype=torch.int64)}

    def load_state(self, state: Mapping[str, Tensor]) -> None:
        """Continue from what `state` gave on rank 0; or, with as many ranks, on this one. With another number of
        ranks, each takes an equal share of what all ranks had together."""
        shared = {name: value.to(self._device) for name, value in part_of(state, f"{HOOK}shared.").items()}
        own = part_of(state, f"{HOOK}rank{self._rank}.")
        if RANKS in state and int(state[RANKS]) != self._size:
            ranks = [part_of(state, f"{HOOK}rank{rank}.") for rank in range(int(state[RANKS]))]
            own = {
                name: sum((rank[name].double() for rank in ranks[1:]), value.double()).to(value.dtype) / self._size
                for name, value in ranks[0].items()
            }
        self.exchange.load_state(shared, {name: value.to(self._device) for name, value in own.items()})

    def told(self) -> dict[str, float]:
        """What was sent since it was last asked: MiB of this rank, and how many times more the gradients are."""
        given, sent = self.bytes_given - self._told[0], self.link.bytes_sent - self._told[1]
        self._told = (self.bytes_given, self.link.bytes_sent)
        return {"hook/mib_sent": sent / 2**20, "hook/compression": given / sent} if sent else {}

    def close(self) -> None:
        if self._thread is not None:
            self._waiting.put(None)
            self._thread.join()
            self._thread = None

    def _work(self) -> None:
        while (work := self._waiting.get()) is not None:
            work()

    def _carried(self, bucket: Bucket, done: torch.futures.Future[Tensor]) -> None:
        try:
            with torch.no_grad():
                if self._failure is None:
                    self.exchange(bucket, lambda sent: self.link.sum(sent.buffer))
        except BaseException as error:      # raised by require_delivered; a future would make another error of it
            self._failure = error
        done.set_result(bucket.buffer)

    def _gathered(self, value: Tensor) -> list[Tensor]:
        """Every rank's, on rank 0; nothing elsewhere."""
        mine = value.detach().to("cpu").contiguous()
        into = [torch.empty_like(mine) for _ in range(self._size)] if self._rank == 0 else None
        dist.gather(mine, into, dst=0)
        return into or []
