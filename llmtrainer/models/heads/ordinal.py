"""A model of graded texts: one number, and where its line is cut into classes."""

from __future__ import annotations

from pydantic import Field

from llmtrainer.core.protocols import Head


class Ordinal(Head):
    """A score as of `score`, and cut points between which its classes lie; both are learned, and the cut points stay
    in their order."""

    classes: int = Field(default=2, ge=2)
    """K: a score belongs to one of the classes 0 to K - 1, between K - 1 cut points."""

    @property
    def cuts(self) -> int:
        return self.classes - 1
