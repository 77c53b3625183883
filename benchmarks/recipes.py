"""What our side of the training benchmarks has in common: the recipe, and the data that a user names."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from turns import Figures


def written(folder: Path, name: str, wish: Any, rate: float, **parts: Any) -> str:
    """The path of a recipe: SmolLM2 with float32 masters, AdamW at a constant rate, nothing saved; `parts`
    are what a benchmark says beside or instead."""
    from ruamel.yaml import YAML

    recipe: Mapping[str, Any] = {
        "run": str(folder / f"run-{name}"), "model": {"start_from": str(wish.model)}, "tokenizer": str(wish.model),
        "cache": str(folder / "cache"),
        "optim": {
            "rule": {"kind": "adamw", "weight_decay": 0.0, "betas": [0.9, 0.999], "epsilon": 1e-8},
            "schedule": {"kind": "constant", "peak": rate, "warmup": "0 steps"}, "clip": 1.0,
        },
        "engine": {
            "kind": "single", "device": wish.device, "compile": not wish.eager, "cuda_graphs": wish.device == "cuda",
        },
        "precision": wish.precision, "duration": "1000000 steps", "save": {"every": "never"}, **parts,
    }  # fmt: skip
    path = folder / f"{name}.yaml"
    with path.open("w") as file:
        YAML().dump(recipe, file)
    return str(path)


def data_of(wish: Any, name: str) -> Path | None:
    """--data, else the file of that name in the folder that BENCH_DATA names."""
    if wish.data is None and (folder := os.environ.get("BENCH_DATA")):
        return Path(folder, name)
    return None if wish.data is None else Path(wish.data)


def settings_of(folder: Path, wish: Any, data: Path) -> Figures:
    """What both sides are told."""
    return {"data": str(data), "model": str(wish.model), "scratch": str(folder / "trl")}
