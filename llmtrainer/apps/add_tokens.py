"""add-tokens: a model with more control tokens, as a Hugging Face folder."""

from __future__ import annotations

import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import torch

from llmtrainer.base.config import Config
from llmtrainer.base.errors import UserError
from llmtrainer.base.result import Result
from llmtrainer.models.enlarge import with_rows
from llmtrainer.models.weights import load_policy, save_tensors
from llmtrainer.tokenizer.added import with_tokens
from llmtrainer.tokenizer.template import needed
from llmtrainer.tokenizer.tokenizer import FileTokenizer, load_tokenizer, padded_vocabulary
from llmtrainer.training.models import model_folder
from llmtrainer.training.publishing import appearing, not_read_back, require_fit

BESIDE = ("generation_config.json",)
"""What goes along as it is."""


class TokenAddition(Config):
    """Control tokens for a model that lacks them: each is one id that no text can become, with a row of its own."""

    words: ClassVar[tuple[str, ...]] = ("model", "out", "tokens")

    model: str
    """A run directory (its newest checkpoint), a checkpoint, a Hugging Face folder, or a hub id."""

    out: str
    """The folder to write. It appears whole or not at all; a folder that has these tokens already is left alone."""

    tokens: tuple[str, ...] = ()
    """Names of the tokens: `tokens=['<|user|>','<|assistant|>']`."""

    template: str | None = None
    """A built-in chat template: the tokens that it writes, besides `tokens`."""

    tokenizer: str | None = None
    """A folder or file with the tokenizer, if the model's own has none."""


@dataclass(frozen=True)
class Added(Result):
    """What the model has now."""

    path: str
    added: dict[str, int]
    """Id of each new token."""
    kept: dict[str, int]
    """Id of each token that was there before."""
    vocabulary: int
    """Ids of the tokenizer."""
    rows: int
    """Of the embedding."""

    def text(self) -> str:
        shown = ", ".join(f"{name} = {number:,}" for name, number in self.added.items()) or "nothing"
        lines = [f"{self.path}: added {shown}"]
        if self.kept:
            lines.append("  there before: " + ", ".join(f"{name} = {number:,}" for name, number in self.kept.items()))
        return "\n".join([*lines, f"  {self.vocabulary:,} ids, {self.rows:,} rows of the embedding"])


def add_tokens(settings: TokenAddition) -> Added:
    """Write the folder. Text has the same ids as before, and old rows are the same bits; new rows are the mean of the
    old. UserError where OUT holds something else."""
    names = tuple(dict.fromkeys([*settings.tokens, *(needed(settings.template) if settings.template else ())]))
    if not names:
        raise UserError("there is nothing to add", fix="tokens=['<|user|>'], or template=llama3")
    source, out = model_folder(settings.model), Path(settings.out)
    old = load_tokenizer(settings.tokenizer or source)
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        return _as_it_is(out, old, names)
    new = with_tokens(old, names)
    weights, config = with_rows(source, range(old.vocabulary, new.vocabulary), _rows(source, old, new))
    with appearing(out) as partial:
        save_tensors(weights, config, partial)
        new.save(partial)
        for name in BESIDE:
            if (source / name).is_file():
                shutil.copyfile(source / name, partial / name)
        _prove(partial, weights, new)
    return _told(out, old, new, names, int(config["vocab_size"]))


def _rows(source: Path, old: FileTokenizer, new: FileTokenizer) -> int:
    had = load_policy(source).vocabulary
    require_fit(old, had, source)
    return had if new.vocabulary <= had else padded_vocabulary(new.vocabulary)


def _as_it_is(out: Path, old: FileTokenizer, names: tuple[str, ...]) -> Added:
    """What a folder that is there has to tell, if it is this command's own."""
    try:
        there = load_tokenizer(out)
        rows = load_policy(out).vocabulary
    except UserError:
        there, rows = old, 0
    if rows < old.vocabulary or there.fingerprint != with_tokens(old, names).fingerprint:
        raise UserError(
            "there is something already", where=str(out), why="nothing is overwritten unasked",
            fix="name another folder",
        )
    return _told(out, there, there, names, rows)


def _prove(folder: Path, weights: dict[str, torch.Tensor], tokenizer: FileTokenizer) -> None:
    """Read everything back. UserError, and no folder, if anything is not as it was."""
    wrong = not_read_back(folder, weights)
    rows = load_policy(folder).vocabulary
    if wrong or load_tokenizer(folder).fingerprint != tokenizer.fingerprint or rows < tokenizer.vocabulary:
        raise UserError(
            "the model did not come back as it was", where=str(folder),
            why=", ".join(wrong) or "its tokenizer differs", fix="tell the maintainers",
        )


def _told(out: Path, old: FileTokenizer, new: FileTokenizer, names: tuple[str, ...], rows: int) -> Added:
    fresh: dict[str, Any] = {name: new.control[name] for name in names if name not in old.control}
    before = {name: new.control[name] for name in names if name in old.control}
    return Added(str(out), fresh, before, new.vocabulary, rows)
