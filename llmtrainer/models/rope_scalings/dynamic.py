"""A base that grows with the text (dynamic NTK)."""

from __future__ import annotations

from pydantic import Field
from torch import Tensor

from llmtrainer.models.rotary import RopeScaling, plain_frequencies


class Dynamic(RopeScaling):
    """In a text of n tokens, n > original_context, the base is theta * (factor * n / original_context - (factor -
    1))^(R / (R - 2)): the slowest frequency is then divided by about factor * n / original_context - (factor - 1),
    and the fastest stays. Shorter texts are read as without scaling.

    n is the length of the token's own document in training and evaluation. In generation it is the length that the
    longest text of the batch may grow to (prompt and new tokens), from its first token on: keys that were turned by
    one base never meet queries that were turned by another.
    """

    factor: float = Field(ge=1.0)
    """How strongly the base grows with a text beyond original_context."""
    original_context: int = Field(gt=0)
    """Tokens up to which nothing changes: the context of the first training."""

    @property
    def grows_beyond(self) -> int | None:
        return self.original_context

    def frequencies(self, size: int, theta: float, length: int) -> Tensor:
        excess = self.factor * max(length, self.original_context) / self.original_context - (self.factor - 1.0)
        return plain_frequencies(size, theta * excess ** (size / (size - 2)))
