"""Let the file say what it is."""

from __future__ import annotations

from llmtrainer.core.example import Comparison
from llmtrainer.data.format import ComparisonFormat


class Auto(ComparisonFormat):
    """Tell the format of each file by its first records; where none or several fit, ask for its name."""

    def matches(self, record: object) -> bool:
        return False    # it stands for another, and never for itself

    def example(self, record: object) -> Comparison:
        raise AssertionError("`auto` becomes another format before a record is read")
