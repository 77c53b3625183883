"""Gradients as they are."""

from __future__ import annotations

from llmtrainer.parallel.hook import Bucket, Hook, Onward


class NoHook(Hook):
    """Gradients are added up as they are."""

    def exchange(self, bucket: Bucket, onward: Onward) -> None:
        onward(bucket)
