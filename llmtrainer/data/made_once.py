"""A token store that is made once: it appears whole, and whoever asks again for the same finds it."""

from __future__ import annotations

import errno
import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from llmtrainer.base.errors import UserError
from llmtrainer.data.packed import MANIFEST, Store
from llmtrainer.data.shards import locked, partial_of, publish


def store_made_once(out: Path | str, key: str, write: Callable[[Path], None]) -> Store:
    """The store of this key at `out`: what is there, or what `write` makes in the folder that it is given, which then
    gets the name `out`. Killed at any moment, the next call gives `write` the same folder with what it had written.

    Raises UserError where something else is at `out`, another process is writing, or the disk is full.
    """
    out = Path(out)
    aside = partial_of(out)
    out.parent.mkdir(parents=True, exist_ok=True)
    with _disk_full_explained(aside), locked(aside):
        if _is_complete(out, key):
            aside.rmdir()
            return Store(out)
        _require_free(out)
        if not _is_complete(aside, key):
            write(aside)
        publish(aside, out)
    return Store(out)


def _is_complete(folder: Path, key: str) -> bool:
    """Whether the folder holds the whole store of this key. A manifest is written last, so it vouches for the rest."""
    try:
        return bool(json.loads((folder / MANIFEST).read_bytes())["key"] == key)
    except (OSError, ValueError, KeyError, TypeError):
        return False


def _require_free(out: Path) -> None:
    if out.exists() and not (out.is_dir() and not any(out.iterdir())):
        raise UserError(
            "there is something else already",
            where=str(out),
            why="it is not the store of this text and tokenizer, and nothing is overwritten",
            fix=f"rm -r {out}, or write to another folder",
        )


@contextmanager
def _disk_full_explained(partial: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            raise UserError(
                "the disk is full",
                where=str(partial),
                why=error.strerror,
                fix="make room, then run the same command again: it goes on where it was",
            ) from error
        raise
