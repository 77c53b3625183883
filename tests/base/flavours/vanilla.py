"""The default."""

from __future__ import annotations

from tests.base.taste import Flavour


class Vanilla(Flavour):
    """Plain, and good.

    A second paragraph.
    """

    pods: int = 1
    """How many."""
