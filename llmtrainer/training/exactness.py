"""What the bits of an exact run depend on besides its rows: kept in every checkpoint, compared where a run goes on.

With `engine.exact` the number of processes changes no bit. Other things would: the manifest tells them as `exact`. What
the user chose is refused where it differs from what the run began with; another machine is only told.
"""

from __future__ import annotations

import hashlib
import platform
from collections.abc import Callable, Mapping
from typing import Any

import torch

from llmtrainer.base.errors import UserError
from llmtrainer.core.protocols import Engine
from llmtrainer.training.dataset import Opened
from llmtrainer.training.recipe import Recipe
from llmtrainer.training.resume import Resumption

HOST = ("processor", "instructions", "library")
"""What nobody chose."""


def exact_facts(
    recipe: Recipe, engine: Engine, precision: str, arranged: Mapping[str, str], rows: Opened,
    resumption: Resumption | None, warn: Callable[[str], None],
) -> dict[str, Any]:
    """What the manifest says of an exact run, held against what the run began with; nothing of any other run. UserError
    where the rows cannot be cut into shards."""
    found = fingerprint_of(recipe, engine, precision, arranged)
    if found and rows.train is None:
        raise UserError(
            "a policy's own answers are not cut into virtual shards", where="engine.exact, data.kind",
            why="how they are put together depends on the process that wrote them",
            fix="engine.exact=false; or rows on disk: data.kind=examples, preferences or documents",
        )
    require_same_sums(resumption, found, recipe.allow, warn)
    return {"exact": found} if found else {}


def fingerprint_of(recipe: Recipe, engine: Engine, precision: str, arranged: Mapping[str, str]) -> dict[str, str]:
    """By name; empty where sums are not exact."""
    # As plain values: what decides nothing else shall not count as read.
    config, data, rule = recipe.engine.plain(), recipe.data.plain(), recipe.optim.rule.plain()
    if not config.get("exact"):
        return {}
    chosen = {
        "virtual_shards": engine.share.of, "threads": torch.get_num_threads(), "precision": precision,
        "compile": config.get("compile"), "optimizer": f"{rule['kind']}:{rule.get('implementation', '')}",
        "tokens_per_batch": data["tokens_per_batch"], "share_prompt": data.get("share_prompt"),
        **arranged,
    }
    machine = {
        "processor": platform.processor() or platform.machine(),
        "instructions": torch.backends.cpu.get_cpu_capability(),
        "library": f"torch {torch.__version__} {hashlib.sha256(torch.__config__.show().encode()).hexdigest()[:16]}",
    }
    return {name: str(value) for name, value in {**chosen, **machine}.items()}


def require_same_sums(
    resumption: Resumption | None, now: Mapping[str, str], allow: tuple[str, ...], warn: Callable[[str], None]
) -> None:
    """Refuse to go on with other sums than the run began with, unless `engine.exact` is allowed to change; say so
    where the machine is another one, or where a run is exact no longer or only from here on."""
    if resumption is None:
        return
    before: Mapping[str, Any] = resumption.manifest.get("exact") or {}
    if not before or not now:
        if before or now:
            since = "no longer exact from here on" if before else "exact from here on, and was not before"
            warn(f"this run is {since}: its weights depend on the processes that took part without engine.exact")
        return
    changed = [name for name in sorted({*before, *now}) if before.get(name) != now.get(name)]
    chosen = [name for name in changed if name not in HOST]
    told = "; ".join(f"{name} was {before.get(name)} and is {now.get(name)}" for name in changed)
    if chosen and "engine.exact" not in allow:
        raise UserError(
            f"an exact run goes on with another {', '.join(chosen)}", where=str(resumption.folder / "manifest.json"),
            why=f"its weights would have other bits than those of the run that began: {told}",
            fix="undo the change; or allow=[engine.exact], and the run is equal to rounding from here on",
        )
    if changed:
        warn(f"the sums of this exact run may round otherwise from here on: {told}")
