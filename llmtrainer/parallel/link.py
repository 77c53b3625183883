"""The wire under the hooks: sums over all ranks, one after another, and what they cost."""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch import Tensor


class Link:
    """Sums over all ranks of one process group, which nothing else uses meanwhile."""

    def __init__(self, device: torch.device, group: dist.ProcessGroup | None, size: int) -> None:
        self.device, self.size = device, size
        self._group = group
        self.messages = 0
        self.bytes_sent = 0
        """Numbers handed over so far, times the bytes of each; how often a backend sends each is its business."""

    def sum(self, buffer: Tensor) -> None:
        """Add `buffer` up over all ranks, in place."""
        self.messages += 1
        self.bytes_sent += buffer.numel() * buffer.element_size()
        dist.all_reduce(buffer, group=self._group)

    def takes(self, dtype: torch.dtype) -> bool:
        """Whether the backend can add up numbers of this type. Every rank asks at the same place."""
        try:
            dist.all_reduce(torch.zeros(1, dtype=dtype, device=self.device), group=self._group)
        except (RuntimeError, ValueError, TypeError):
            return False    # refused on this rank alone, before anything was sent
        return True
