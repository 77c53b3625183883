"""Gradients sent as bfloat16."""

from __future__ import annotations

import torch

from llmtrainer.parallel.hook import Exchange, Hook
from llmtrainer.parallel.link import Link
from llmtrainer.parallel.narrow import Narrow


class Bf16(Hook):
    """Half the bytes of float32, with its range and 8 significant bits: gradients travel as bfloat16 and are added in
    it. Nothing can overflow that did not before."""

    def start(self, link: Link) -> Exchange:
        return Narrow(torch.bfloat16, link)
