"""What the Trainer of transformers, and those made of it, tell about their steps; for the peers' environment."""

from __future__ import annotations

import time
from dataclasses import dataclass, field
from typing import Any


@dataclass
class Told:
    """One entry a step."""

    losses: list[float] = field(default_factory=list)
    seconds: list[float] = field(default_factory=list)


def clock() -> tuple[Any, Told]:
    """A callback for a Trainer that logs every step, and where it writes."""
    from transformers import TrainerCallback

    told = Told()

    class Clock(TrainerCallback):    # type: ignore[misc]
        def on_step_begin(self, *_: Any, **__: Any) -> None:
            self.started = time.perf_counter()

        def on_step_end(self, *_: Any, **__: Any) -> None:
            told.seconds.append(time.perf_counter() - self.started)

        def on_log(self, *_: Any, logs: dict[str, float], **__: Any) -> None:
            told.losses.extend([logs["loss"]] if "loss" in logs else [])

    return Clock(), told
