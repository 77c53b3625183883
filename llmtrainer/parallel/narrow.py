"""Gradients sent in sixteen bits."""

from __future__ import annotations

import torch

from llmtrainer.parallel.hook import Bucket, Exchange, Onward
from llmtrainer.parallel.link import Link


class Narrow(Exchange):
    """Rounds what is sent to `dtype` and gives the sums their own type back. The backend adds in `dtype` too, so a
    sum over W ranks is rounded up to W times. Where the backend has no such type, nothing is rounded, and it says
    so."""

    def __init__(self, dtype: torch.dtype, link: Link) -> None:
        self._dtype = dtype if link.takes(dtype) else None
        if self._dtype is None:
            name = str(dtype).removeprefix("torch.")
            self.fallbacks = (f"gradients are sent as they are: the backend of this device cannot add {name}",)

    def __call__(self, bucket: Bucket, onward: Onward) -> None:
        if self._dtype is None or bucket.buffer.dtype == self._dtype:
            onward(bucket)
            return
        sent = bucket.like(bucket.buffer.to(self._dtype))
        onward(sent)
        bucket.buffer.copy_(sent.buffer)
