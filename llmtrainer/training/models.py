"""A trained model from wherever it lies: a run directory, a checkpoint, or a Hugging Face folder."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from llmtrainer.base.errors import UserError
from llmtrainer.base.rundir import RunDir
from llmtrainer.core.precision import DTYPES
from llmtrainer.models.decoder import Decoder
from llmtrainer.models.weights import load_policy
from llmtrainer.parallel.engines.single import find_device
from llmtrainer.tokenizer import tokenizer as tokenizers
from llmtrainer.tokenizer.tokenizer import FileTokenizer
from llmtrainer.training.average import FOLDER

Precision = Literal["auto", "bfloat16", "float16", "float32", "float64"]


@dataclass(frozen=True)
class Opened:
    """A model that is ready to be used, with dropout off."""

    folder: Path
    """Where its weights are."""
    policy: Decoder
    tokenizer: FileTokenizer
    precision: str


def open_model(
    path: str | Path, precision: Precision = "auto", device: str = "auto", tokenizer: str | None = None
) -> Opened:
    """A model and its tokenizer on a device. `auto` computes in the type the checkpoint was trained in, so that
    a loss can be compared with that of the training; float32 for a folder that does not say.

    UserError if there is no model, or the tokenizer has ids that the model has no row for.
    """
    folder = model_folder(Path(path))
    chosen = _precision_of(folder) if precision == "auto" else precision
    place = find_device(device, chosen)
    words = tokenizers.load_tokenizer(tokenizer if tokenizer is not None else folder)
    policy = load_policy(folder, DTYPES[chosen])
    if words.vocabulary > policy.vocabulary:
        raise UserError(
            f"the tokenizer has {words.vocabulary:,} ids and the model rows for {policy.vocabulary:,}",
            where=f"model {folder}, tokenizer {tokenizer or folder}",
            why="text would become ids that the model does not know",
            fix="name the tokenizer that the model was trained with: tokenizer=FOLDER",
        )
    policy.eval()
    return Opened(folder, policy.to(place), words, chosen)


def load_model(path: str | Path, precision: Precision = "float32", device: str = "cpu") -> Decoder:
    """The model of a run directory (its newest checkpoint), of a checkpoint or of a Hugging Face folder."""
    folder = model_folder(Path(path))
    chosen = _precision_of(folder) if precision == "auto" else precision
    return load_policy(folder, DTYPES[chosen]).to(find_device(device, chosen))


def load_tokenizer(path: str | Path) -> FileTokenizer:
    """The tokenizer of a folder that holds one, or of a run's newest checkpoint."""
    return tokenizers.load_tokenizer(model_folder(Path(path)))


def model_folder(path: Path) -> Path:
    """A run directory stands for its newest checkpoint, `ema` below it for the moving average there; any other
    folder for itself."""
    if path.name == FOLDER and not path.is_dir() and _is_run(path.parent):
        return RunDir(path.parent).newest_checkpoint() / FOLDER
    return RunDir(path).newest_checkpoint() if _is_run(path) else path


def _is_run(path: Path) -> bool:
    run = RunDir(path)
    return run.checkpoints.is_dir() or (run.recipe.is_file() and not (path / "manifest.json").is_file())


def _precision_of(folder: Path) -> str:
    """What the checkpoint's manifest says it was trained in."""
    manifest = (folder.parent if folder.name == FOLDER else folder) / "manifest.json"
    told = json.loads(manifest.read_text(encoding="utf-8")).get("precision") if manifest.is_file() else None
    return told if told in DTYPES else "float32"
