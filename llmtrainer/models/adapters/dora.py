"""Weight-decomposed low-rank adapters: LoRA learns the direction of every row, a number beside it the length."""

from __future__ import annotations

from typing import ClassVar

from llmtrainer.models.adapters.lora import Lora


class Dora(Lora):
    """Every adapted matrix W becomes m (W + s B A) / ||W + s B A||, row by row (arXiv:2402.09353). Often better than
    LoRA of the same rank; a step costs about a third more."""

    directed: ClassVar[bool] = True
