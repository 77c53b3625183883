"""A hook that waits as long as a thin link would take: the last of a chain, beside the wire."""

from __future__ import annotations

import time

from pydantic import Field

from llmtrainer.parallel.hook import Bucket, Hook, Onward


class Wait(Hook):
    """Each process of two sends as many bytes as the bucket has: half of it to be added up, half of the sums."""

    bytes_per_second: float = Field(default=12.5e6, gt=0.0)
    """Of the link."""

    def exchange(self, bucket: Bucket, onward: Onward) -> None:
        time.sleep(bucket.buffer.numel() * bucket.buffer.element_size() / self.bytes_per_second)
        onward(bucket)
