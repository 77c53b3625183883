"""Whether the model that an adapter stands beside is still the one that it was trained beside."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

from llmtrainer.base.errors import UserError

BASE_WEIGHTS = "base_weights"
"""The key of a checkpoint's manifest."""
_BLOCK, _BLOCKS = 64 * 1024, 64


def base_facts(base: Path) -> dict[str, Any]:
    """What the manifest of an adapter's checkpoint says about its base."""
    return {BASE_WEIGHTS: digest_of(base)}


def digest_of(folder: Path) -> str:
    """SHA-256 over the size of every file of weights and 64 blocks of it, spread evenly from its first byte to its
    last: a model that was trained on, or rounded, differs in all of them, and gigabytes are known in a moment."""
    digest = hashlib.sha256()
    for file in sorted(folder.glob("*.safetensors")):
        size = file.stat().st_size
        digest.update(f"{size} ".encode())
        with file.open("rb") as stream:
            for number in range(_BLOCKS):
                stream.seek(max(size - _BLOCK, 0) * number // (_BLOCKS - 1))
                digest.update(stream.read(_BLOCK))
    return digest.hexdigest()


def require_same_base(adapter: Path, base: Path) -> None:
    """UserError where an adapter's checkpoint says that its base had other weights. Adapters of other programs say
    nothing."""
    manifest = adapter / "manifest.json"
    told = json.loads(manifest.read_text(encoding="utf-8")).get(BASE_WEIGHTS) if manifest.is_file() else None
    if told is not None and told != digest_of(base):
        raise UserError(
            "the model that the adapter stands beside has other weights than it was trained beside", where=str(base),
            why=f"they changed since {adapter} was written: beside them it is another model",
            fix="put the model back as it was; a copy of it elsewhere: `base_model_name_or_path` in "
            f"{adapter / 'adapter_config.json'}",
        )
