"""Rotary frequencies worked out channel by channel from the published formulas, as an oracle for tests."""

from __future__ import annotations

import math
from typing import Any

import numpy as np

KINDS: dict[str, dict[str, Any]] = {
    "linear": {"kind": "linear", "factor": 4.0},
    "dynamic": {"kind": "dynamic", "factor": 4.0, "original_context": 8},
    "yarn": {"kind": "yarn", "factor": 4.0, "original_context": 64},
    "yarn with every setting": {
        "kind": "yarn", "factor": 8.0, "original_context": 40, "beta_fast": 6.0, "beta_slow": 0.5, "truncate": False,
        "mscale": 1.3, "mscale_all_dim": 0.7,
    },
    "yarn with its own attention factor": {
        "kind": "yarn", "factor": 2.0, "original_context": 64, "attention_factor": 1.25,
    },
    "llama3": {"kind": "llama3", "factor": 8.0, "original_context": 64},
    "llama3 with another ramp": {
        "kind": "llama3", "factor": 3.0, "original_context": 100, "low_freq_factor": 2.0, "high_freq_factor": 9.0,
    },
}  # fmt: skip
"""Settings under which, in a model of a few channels, some frequencies are slowed and some are not."""


def frequencies(size: int, theta: float, scaling: dict[str, Any] | None, length: int) -> tuple[np.ndarray, float]:
    """Radians per position [R/2] in a text of `length` tokens, and the factor of cosines and sines."""
    s = dict(scaling or {"kind": "plain"})
    kind, factor, original = s.pop("kind"), s.get("factor", 1.0), s.get("original_context", 0)
    if kind == "dynamic" and length > original:
        theta = theta * (factor * length / original - factor + 1) ** (size / (size - 2))
    found, magnitude = [], 1.0
    for pair in range(size // 2):
        plain = 1.0 / math.pow(theta, 2 * pair / size)
        wavelength = 2 * math.pi / plain
        if kind == "linear":
            plain /= factor
        elif kind == "llama3":
            low, high = s.get("low_freq_factor", 1.0), s.get("high_freq_factor", 4.0)
            if wavelength > original / low:
                plain /= factor
            elif wavelength > original / high:
                smooth = (original / wavelength - low) / (high - low)
                plain = (1 - smooth) * plain / factor + smooth * plain
        elif kind == "yarn":
            plain = yarn(pair, plain, size, theta, s)
        found.append(plain)
    if kind == "yarn":
        magnitude = s.get("attention_factor") or (
            (0.1 * s.get("mscale", 1.0) * math.log(factor) + 1)
            / (0.1 * s["mscale_all_dim"] * math.log(factor) + 1 if "mscale_all_dim" in s else 1.0)
        )
    return np.array(found), magnitude


def yarn(pair: int, plain: float, size: int, theta: float, s: dict[str, Any]) -> float:
    ends = []
    for turns in (s.get("beta_fast", 32.0), s.get("beta_slow", 1.0)):
        # The pair whose wavelength is original_context / turns.
        ends.append(size / 2 * math.log(s["original_context"] / (turns * 2 * math.pi), theta))
    start, stop = ends
    if s.get("truncate", True):
        start, stop = math.floor(start), math.ceil(stop)
    start, stop = max(start, 0), min(stop, size - 1)
    interpolated = min(max((pair - start) / (stop - start), 0.0), 1.0)
    return plain * (1 - interpolated) + plain / s["factor"] * interpolated


def table(
    position: np.ndarray, size: int, theta: float, scaling: dict[str, Any] | None, length: int
) -> tuple[np.ndarray, np.ndarray]:
    """cos, sin [..., R/2] in float64."""
    radians, magnitude = frequencies(size, theta, scaling, length)
    angle = position[..., None].astype(np.float64) * radians
    return np.cos(angle) * magnitude, np.sin(angle) * magnitude
