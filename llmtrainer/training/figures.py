"""Numbers as people read them: amounts, spans of time, time left."""

from __future__ import annotations


def number(value: float) -> str:
    """Counts with thousands separators, other figures with at least four digits."""
    if isinstance(value, int) or value.is_integer():
        return f"{value:,.0f}"
    return f"{value:,.4f}" if abs(value) < 100 else f"{value:,.1f}"


def count(value: int, noun: str) -> str:
    """`1 document`, `1,200 documents`."""
    return f"{value:,} {noun}" + ("" if value == 1 else "s")


def amount(value: float, unit: str) -> str:
    """`1,200 documents`; bytes as kB, MB or GB with three figures."""
    if unit != "bytes":
        return f"{value:,.0f} {unit}"
    for name, size in (("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if value >= 0.9995 * size:  # what rounds up to the next unit is told in it
            return f"{value / size:.3g} {name}" if value < 999.5 * size else f"{value / size:,.0f} {name}"
    return f"{value:,.0f} bytes"


def short(value: float) -> str:
    """Three figures and K, M, B or T: 1.25M."""
    for name, size in (("T", 1e12), ("B", 1e9), ("M", 1e6), ("K", 1e3)):
        if value >= 0.9995 * size:
            return f"{value / size:.3g}{name}"
    return f"{value:.0f}"


def span(seconds: float) -> str:
    """`4.2 s`, `3:07` (minutes and seconds), `2:03:07` (hours)."""
    if seconds < 60:
        return f"{seconds:.1f} s"
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes}:{rest:02d}" if minutes < 60 else f"{minutes // 60}:{minutes % 60:02d}:{rest:02d}"


def remaining(seconds: float, share: float) -> str | None:
    """Time left, given the share (0 to 1) that took `seconds`; None before there is a pace."""
    if seconds <= 0 or share <= 0:
        return None
    left = seconds / share * (1.0 - share)
    return f"0:{round(left):02d}" if left < 59.5 else span(max(left, 60.0))
