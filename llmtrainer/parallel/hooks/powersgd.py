"""PowerSGD."""

from __future__ import annotations

from collections.abc import Mapping
from typing import ClassVar, Literal

from pydantic import Field

from llmtrainer.base.errors import UserError
from llmtrainer.parallel.hook import Exchange, Hook
from llmtrainer.parallel.link import Link
from llmtrainer.parallel.low_rank import Choice, LowRank


class Powersgd(Hook):
    """Sends a gradient matrix of n x m numbers as two factors of n x rank and m x rank (Vogels 2019,
    arXiv:1905.13727). What they leave out is added to the next step's gradient, so that it is late and not lost."""

    known_elsewhere: ClassVar[Mapping[str, str]] = {
        "matrix_approximation_rank": "rank", "start_powerSGD_iter": "start_step", "use_error_feedback":
        "error_feedback", "use_fixed_Q": "q: fixed", "min_compression_rate": "min_compression",
    }  # fmt: skip

    rank: int = Field(default=32, ge=1)
    """Columns of each factor; a matrix with a shorter side gets that many."""

    min_compression: float = Field(default=2.0, gt=0.0)
    """A matrix is sent whole unless its factors have this many times fewer numbers."""

    largest_side: int = Field(default=60_000, ge=1)
    """A matrix with a longer side is sent whole: embedding and head, whose gradients have few rows that count."""

    start_step: int = Field(default=100, ge=0)
    """Steps of whole gradients before the first is compressed: early gradients change fast, and there is no factor to
    begin from."""

    q: Literal["warm", "fixed", "fresh"] = "warm"
    """Where each step's product begins: at the factor of the step before, at the same random columns every time, or
    at new ones."""

    error_feedback: bool = True
    """Add what was left out to the next gradient. Without it, it is lost, and so may be the way down."""

    error_in_gradient: bool = False
    """Keep what was left out where the next gradient is added up, instead of beside it: a copy of the gradients less
    during forward and backward. The same bits where a step is one micro-batch."""

    seed: int = 0
    """Of the random columns, which are a function of it and the parameter's name."""

    def require(self, precision: str, early: bool) -> None:
        if self.error_in_gradient and not self.error_feedback:
            raise UserError(
                "there is no place for an error that is not kept", where="engine.hook",
                why="error_in_gradient says where error_feedback keeps it",
                fix="engine.hook.error_feedback=true, or engine.hook.error_in_gradient=false",
            )
        if self.error_in_gradient and precision == "float16":
            raise UserError(
                "errors cannot stay in gradients that carry a loss scale", where="engine.hook.error_in_gradient",
                why="the scale changes from step to step, and an overflow would take the errors with it",
                fix="engine.hook.error_in_gradient=false, or precision=bfloat16",
            )

        if self.error_in_gradient and early:
            raise UserError(
                "errors in the gradients' place and updates during backward do not go together",
                where="engine.hook.error_in_gradient, engine.step_in_backward",
                why="what an update needs would lie where the error does",
                fix="engine.hook.error_in_gradient=false, or engine.step_in_backward=false",
            )

    def start(self, link: Link) -> Exchange:
        return LowRank(
            Choice(self.rank, self.min_compression, self.largest_side), link.size, start_step=self.start_step,
            q=self.q, feedback=self.error_feedback, in_gradient=self.error_in_gradient, seed=self.seed,
        )
