"""deepspeed-config: known set-ups of DeepSpeed as files, for other trainers, and what to write here instead."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

from pydantic import Field

from llmtrainer.base.config import Config
from llmtrainer.base.errors import UserError
from llmtrainer.base.result import Result
from llmtrainer.base.text import did_you_mean, write_yaml
from llmtrainer.parallel.zero_settings import PRESETS, Preset, is_installed, problems


class DeepspeedConfig(Config):
    """Which set-up, and where to."""

    words: ClassVar[tuple[str, ...]] = ("preset",)

    preset: str | None = None
    """stage0, stage1, stage2, stage2_off_o (float16); ds_stage1, ds_stage2, ds_stage3, ds_stage3_offload (bfloat16,
    clipped at 1). Left out: all of them."""

    out: str = "deepspeed-configs"
    """Folder for NAME.json, which DeepSpeed reads, and NAME.yaml, which accelerate reads."""

    processes: int | None = Field(default=None, ge=1)
    """How many accelerate is to start; left out, what the set-up had."""


@dataclass(frozen=True)
class Written(Result):
    """The files, and the same as words of a recipe."""

    files: tuple[str, ...]
    recipes: dict[str, str]
    checked_by: str
    """Whose rules the files were held to."""

    def json(self) -> dict[str, Any]:
        return {"files": list(self.files), "recipes": self.recipes, "checked_by": self.checked_by}

    def text(self) -> str:
        lines = [f"{name}: llmtrainer train RECIPE.yaml {words}" for name, words in self.recipes.items()]
        return "\n".join([f"{len(self.files)} files, checked by {self.checked_by}: {', '.join(self.files)}", *lines])


def deepspeed_config(request: DeepspeedConfig) -> Written:
    """Write and check them. DeepSpeed need not be installed; where it is, its own rules are asked too."""
    name = request.preset
    if name is not None and name not in PRESETS:
        raise UserError(
            f"there is no set-up `{name}`", why=f"there are: {', '.join(PRESETS)}",
            fix=did_you_mean(name, list(PRESETS)),
        )
    chosen: Mapping[str, Preset] = PRESETS if name is None else {name: PRESETS[name]}
    folder = Path(request.out)
    folder.mkdir(parents=True, exist_ok=True)
    files = [path for name, preset in chosen.items() for path in _written(folder, name, preset, request.processes)]
    theirs = is_installed()
    if theirs:
        _ask_deepspeed(chosen)
    checked_by = "our table of DeepSpeed's keys" + (" and DeepSpeed itself" if theirs else "")
    return Written(tuple(map(str, files)), {name: preset.words for name, preset in chosen.items()}, checked_by)


def _written(folder: Path, name: str, preset: Preset, processes: int | None) -> list[Path]:
    settings, file = preset.deepspeed(), folder / f"{name}.json"
    found = problems(settings)
    assert not found, found
    file.write_text(json.dumps(settings, indent=2) + "\n", encoding="utf-8")
    described = preset.accelerate(str(file), processes or preset.processes)
    file.with_suffix(".yaml").write_text(write_yaml(described), encoding="utf-8")
    return [file, file.with_suffix(".yaml")]


def _ask_deepspeed(chosen: Mapping[str, Preset]) -> None:
    from deepspeed.runtime.zero.config import DeepSpeedZeroConfig

    for preset in chosen.values():
        DeepSpeedZeroConfig(**preset.zero.settings())
