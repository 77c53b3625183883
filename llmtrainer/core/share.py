"""Which parts of every step's rows are this process's."""

from __future__ import annotations

from typing import NamedTuple


class Share(NamedTuple):
    """Every step's rows are cut into `of` parts with as many micro-batches each; `mine` are this process's, in order.
    A number beyond the parts stands for a part of padding alone, so that this process takes part as often as others.

    Ordinarily there is a part for each process. Where sums must not depend on the processes (`engine.exact`), there
    are as many as virtual shards, and each is computed by itself, whoever computes it.
    """

    mine: tuple[int, ...] = (0,)
    of: int = 1
