"""Gradients sent as float16."""

from __future__ import annotations

import torch

from llmtrainer.parallel.hook import Exchange, Hook
from llmtrainer.parallel.link import Link
from llmtrainer.parallel.narrow import Narrow


class Fp16(Hook):
    """Half the bytes of float32, with 11 significant bits and a narrow range: a gradient above 65,504 becomes
    infinite, and the step is refused or skipped as `optim.on_nonfinite` says; one below 6e-8 becomes 0. Under
    precision=float16 its loss scale covers this too; elsewhere bf16 is the safer half."""

    def start(self, link: Link) -> Exchange:
        return Narrow(torch.float16, link)
