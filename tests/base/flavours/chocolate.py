"""Another."""

from __future__ import annotations

from tests.base.taste import Cone, Flavour


class Chocolate(Flavour):
    """Dark."""

    cocoa: float = 0.7
    """Share of cocoa."""

    pods: int = 0
    """Also a field of vanilla."""

    cone: Cone = Cone()
    """It may bring its own."""
