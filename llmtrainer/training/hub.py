"""Models and tokenizers by a hub id: `owner/name` or `owner/name@revision`, where no folder has that name."""

from __future__ import annotations

import functools
import json
import re
from dataclasses import dataclass
from pathlib import Path

from llmtrainer.base.errors import UserError
from llmtrainer.training.console import say

TOKENIZER = (
    "tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json", "chat_template.jinja",
    "vocab.json", "merges.txt", "tokenizer.model", "spiece.model", "*.tiktoken", "tekken.json",
)  # fmt: skip
INDEX, ONE_FILE = "model.safetensors.index.json", "model.safetensors"
MODEL = ("config.json", "generation_config.json", INDEX, *TOKENIZER)
"""What is fetched besides weights: descriptions and vocabularies, never code, never a pickle."""

_ID = re.compile(r"(?P<id>[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*)(?:@(?P<revision>[\w.-]+(?:/[\w.-]+)*))?", re.ASCII)


@dataclass(frozen=True)
class Located:
    """Where a name leads."""

    folder: Path
    origin: str
    """The name itself, or owner/name@commit of what was fetched: it will mean the same tomorrow."""


def locate(name: str | Path, *, weights: bool) -> Located:
    """The folder that a name means. What exists on this machine wins, and a Path is always of this machine.

    An id is fetched into the hub library's own cache: its descriptions and its tokenizer, and with `weights` the
    safetensors files too. Once in a process, so that it cannot change in between. The library reads HF_ENDPOINT,
    HF_HOME, HF_TOKEN and HF_HUB_OFFLINE. UserError if it cannot be had.
    """
    found = _ID.fullmatch(name) if isinstance(name, str) else None
    if found is None or Path(name).exists():
        return Located(Path(name), str(name))
    return _fetched(found["id"], found["revision"], weights)


@functools.cache
def _fetched(repository: str, revision: str | None, weights: bool) -> Located:
    folder = _snapshot(repository, revision, MODEL if weights else TOKENIZER)
    commit = folder.name    # the library names a snapshot by its commit
    if weights:
        _snapshot(repository, commit, (ONE_FILE,))
        if not (folder / ONE_FILE).is_file():
            _snapshot(repository, commit, _weight_files(folder))
    origin = f"{repository}@{commit}"
    say(f"{'model' if weights else 'tokenizer'} {origin}: {folder}")
    return Located(folder, origin)


def _weight_files(folder: Path) -> tuple[str, ...]:
    """The files that the index names. Other weights of the repository are other formats of the same ones."""
    if not (folder / INDEX).is_file():
        return (ONE_FILE,)
    index = json.loads((folder / INDEX).read_text(encoding="utf-8"))
    return tuple(sorted(set(index["weight_map"].values())))


def _snapshot(repository: str, revision: str | None, patterns: tuple[str, ...]) -> Path:
    name = repository if revision is None else f"{repository}@{revision}"
    try:
        from huggingface_hub import constants, errors, snapshot_download
    except ImportError:
        raise UserError(
            f"there is no folder `{name}`, and a hub id needs another package",
            fix="pip install 'llmtrainer[hf]', or name a folder",
        ) from None
    try:
        return Path(snapshot_download(repository, revision=revision, allow_patterns=list(patterns)))
    except errors.GatedRepoError:
        raise UserError(
            f"`{name}` is only for those who were let in", where=constants.ENDPOINT,
            why="its owner asks to agree to terms first",
            fix="agree to them on the page of the model, then: hf auth login",
        ) from None
    except errors.RevisionNotFoundError:
        raise UserError(
            f"`{repository}` has no revision `{revision or constants.DEFAULT_REVISION}`", where=constants.ENDPOINT,
            fix=f"a branch, a tag or a commit: {repository}@main",
        ) from None
    except (errors.RepositoryNotFoundError, errors.HFValidationError):
        raise UserError(
            f"`{name}` is neither a folder here nor a model there", where=constants.ENDPOINT,
            why="the hub shows private models only to those who are logged in",
            fix="name a folder, or the id as the hub writes it; for a private model: hf auth login",
        ) from None
    except Exception as error:      # the HTTP client below has errors of its own, and each generation another client
        raise UserError(
            f"`{name}` is no folder here, and it could not be fetched", where=constants.ENDPOINT,
            why=str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__,
            fix="HF_ENDPOINT=https://hf-mirror.com and the same command, for a mirror; or download the model by hand "
            "and name its folder",
        ) from error
