"""A trained model from wherever it lies: a run directory, a checkpoint, or a Hugging Face folder."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch

from llmtrainer.base.errors import UserError
from llmtrainer.base.rundir import RunDir
from llmtrainer.core.precision import DTYPES
from llmtrainer.models.foreign_loading import load_foreign
from llmtrainer.models.hugging_face import OWN, READABLE
from llmtrainer.models.peft_format import CONFIG as ADAPTER_CONFIG
from llmtrainer.models.peft_format import head_of, is_adapter, load_adapter, read_config
from llmtrainer.models.stored import Policy
from llmtrainer.models.weights import load_policy
from llmtrainer.parallel.device import find_device
from llmtrainer.tokenizer import tokenizer as tokenizers
from llmtrainer.tokenizer.tokenizer import FileTokenizer
from llmtrainer.training.average import FOLDER
from llmtrainer.training.base_weights import require_same_base
from llmtrainer.training.hub import Located, locate

Precision = Literal["auto", "bfloat16", "float16", "float32", "float64"]


@dataclass(frozen=True)
class Opened:
    """A model that is ready to be used, with dropout off."""

    folder: Path
    """Where its weights are."""
    policy: Policy
    tokenizer: FileTokenizer
    precision: str


def open_model(
    path: str | Path, precision: Precision = "auto", device: str = "auto", tokenizer: str | None = None
) -> Opened:
    """A model, to be read and never trained, and its tokenizer on a device. `auto` computes in the type the checkpoint
    was trained in, so that a loss can be compared with that of the training; float32 for a folder that does not say.

    UserError if there is no model, or the tokenizer has ids that the model has no row for.
    """
    folder = model_folder(path)
    if not folder.is_dir():
        raise no_model(path)
    chosen = _precision_of(folder) if precision == "auto" else precision
    place = find_device(device, chosen)
    words = tokenizers.load_tokenizer(
        tokenizer_folder(folder) if tokenizer is None else locate(tokenizer, weights=False).folder
    )
    # A class of transformers would round elsewhere than it does in training.
    policy = load_whole(folder, DTYPES[chosen], frozen=is_ours(folder))
    if words.vocabulary > policy.vocabulary:
        raise UserError(
            f"the tokenizer has {words.vocabulary:,} ids and the model rows for {policy.vocabulary:,}",
            where=f"model {folder}, tokenizer {tokenizer or folder}",
            why="text would become ids that the model does not know",
            fix="name the tokenizer that the model was trained with: tokenizer=FOLDER",
        )
    policy.eval()
    return Opened(folder, policy.to(place), words, chosen)


def no_model(path: str | Path) -> UserError:
    """What is said where a name leads to no model."""
    there = Path(path).is_dir()
    return UserError(
        f"no model `{path}`",
        why="there is no config.json in that folder" if there else f"there is no such folder in {Path.cwd()}",
        fix="name a run directory, a checkpoint, a Hugging Face folder or a hub id: HuggingFaceTB/SmolLM2-135M",
    )


def load_model(path: str | Path, precision: Precision = "float32", device: str = "cpu") -> Policy:
    """The model of a run directory (its newest checkpoint), of a checkpoint, of a Hugging Face folder or of a
    hub id."""
    folder = model_folder(path)
    chosen = _precision_of(folder) if precision == "auto" else precision
    return load_whole(folder, DTYPES[chosen]).to(find_device(device, chosen))


def load_whole(folder: Path, compute: torch.dtype, *, frozen: bool = False) -> Policy:
    """The model of a folder; of an adapter's folder, its base with the adapter beside it. What none of our families
    describes is opened by transformers, and reads one document at a time. `frozen`: see load_base."""
    if not is_adapter(folder):
        return load_base(folder, compute, frozen=frozen)
    policy = load_base(base_of(folder), compute, frozen=True)
    insert_adapter(policy, folder)
    return policy


def insert_adapter(policy: Policy, folder: Path, dropout: float | None = None) -> None:
    """Put the adapter of a folder beside a policy, with the head that was trained with it. `dropout`: instead of the
    one it was trained with."""
    found = read_config(folder)[0]
    (found if dropout is None else found.model_copy(update={"dropout": dropout})).insert(policy)
    head = head_of(folder)
    if head is not None and policy.score is None:
        policy.attach(head)
    load_adapter(policy, folder)


def load_base(folder: Path, compute: torch.dtype, *, frozen: bool = False) -> Policy:
    """A whole model, of one of our families if one describes it. frozen: nothing of it will ever be trained."""
    if is_ours(folder):
        return load_policy(folder, compute, frozen=frozen)
    return load_foreign(folder, compute, frozen=frozen, apart=True)


def is_ours(folder: Path) -> bool:
    """Whether a family of ours describes the model of a folder; also of one that cannot be read, so that ours says
    what is wrong with it."""
    try:
        told = json.loads((folder / "config.json").read_text(encoding="utf-8"))
        return OWN in told or told.get("model_type", READABLE[0]) in READABLE
    except (OSError, ValueError, AttributeError):
        return True


def base_of(folder: Path) -> Path:
    """The folder of the model that an adapter stands beside. UserError if it is not named, or not there."""
    told = f"`base_model_name_or_path` in {folder / ADAPTER_CONFIG}"
    name = read_config(folder)[1]
    if name is None:
        raise UserError(
            "the adapter does not say which model it belongs to", where=str(folder),
            why="a few numbers beside a matrix mean something only with that matrix", fix=f"write it: {told}",
        )
    found = Path(name) if Path(name).is_absolute() else model_folder(name)
    if not found.is_dir():
        raise UserError(
            f"the model that the adapter belongs to is not there: {name}", where=str(folder),
            why="an adapter's folder holds the adapter alone", fix=f"put it back, or correct {told}",
        )
    if is_adapter(found):
        raise UserError(
            "the adapter belongs to another adapter", where=told, why="one stands beside a model here",
            fix=f"merge that one first: llmtrainer merge {found} out=FOLDER",
        )
    require_same_base(folder, found)
    return found


def tokenizer_folder(folder: Path) -> Path:
    """Where the tokenizer of a model's folder is: an adapter that was saved without one has its base's."""
    return folder if not is_adapter(folder) or (folder / "tokenizer.json").is_file() else base_of(folder)


def load_tokenizer(path: str | Path) -> FileTokenizer:
    """The tokenizer of a folder that holds one, of a run's newest checkpoint, or of a hub id."""
    return tokenizers.load_tokenizer(model_folder(path, weights=False))


def model_folder(path: str | Path, *, weights: bool = True) -> Path:
    """A run directory stands for its newest checkpoint, `ema` below it for the moving average there; any other
    folder for itself. A hub id is fetched, without its weights if they are not wanted."""
    return locate_model(path, weights=weights).folder


def locate_model(path: str | Path, *, weights: bool = True) -> Located:
    """As `model_folder`, with the name of where it came from."""
    # Asked first: `run/ema` need not exist, and could be an id by its looks.
    below = Path(path)
    if below.name == FOLDER and not below.is_dir() and _is_run(below.parent):
        return Located(RunDir(below.parent).newest_checkpoint() / FOLDER, str(path))
    found = locate(path, weights=weights)
    return Located(RunDir(found.folder).newest_checkpoint(), found.origin) if _is_run(found.folder) else found


def tokenizer_class(folder: Path) -> str | None:
    """The class that the tokenizer_config.json of a folder names: what transformers should read it with."""
    file = folder / "tokenizer_config.json"
    found = json.loads(file.read_text(encoding="utf-8")).get("tokenizer_class") if file.is_file() else None
    return found if isinstance(found, str) else None


def _is_run(path: Path) -> bool:
    """Whether a folder is a run's, be it of one that was stopped before its first checkpoint, or never began."""
    run = RunDir(path)
    begun = run.recipe.is_file() or (run.events.is_file() and not (path / "config.json").is_file())
    return run.checkpoints.is_dir() or (begun and not (path / "manifest.json").is_file())


def _precision_of(folder: Path) -> str:
    """What the checkpoint's manifest says it was trained in."""
    manifest = (folder.parent if folder.name == FOLDER else folder) / "manifest.json"
    told = json.loads(manifest.read_text(encoding="utf-8")).get("precision") if manifest.is_file() else None
    return told if told in DTYPES else "float32"
