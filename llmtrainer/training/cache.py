"""A cache keyed by content: what lies under a key is whole, is made once, and by one process.

A key is the SHA-256 over the source files (suffix, bytes and SHA-256 of each, in order) and everything else that
decides the result; names and places do not count, so a folder may be moved. A file is not hashed again while its
path, size and modification time in nanoseconds are those it had when it was hashed. What lies under a key was
written aside and renamed at its end. Several processes may ask at once: one builds, the others wait for it.
"""

from __future__ import annotations

import fcntl
import json
import os
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from llmtrainer.base.errors import UserError
from llmtrainer.base.rundir import sync_folder
from llmtrainer.data.document import AnyPath
from llmtrainer.data.encode import identity_of
from llmtrainer.data.open import RECEIPT
from llmtrainer.data.remote import RemoteFile


def receipt(folder: Path) -> dict[str, Any]:
    """What was noted when it was made: key, vocabulary, tokens, documents, bytes_per_token."""
    facts: dict[str, Any] = json.loads((folder / RECEIPT).read_text())
    return facts


def built(out: Path, key: str, build: Callable[[Path], dict[str, Any]]) -> bool:
    """Make the folder `out` by `build`, unless it is there. Returns whether it was.

    Built under a hidden name that holds the key, so that a killed build of the same thing goes on and one of
    something else is thrown away; the receipt comes last but for the rename.
    """
    if _is_there(out, key):
        return True
    work = out.with_name(f".{out.name}.partial")
    with _one_builder(work):
        if _is_there(out, key):
            shutil.rmtree(work)
            return True
        for entry in work.iterdir():
            if key[:16] not in entry.name:
                shutil.rmtree(entry) if entry.is_dir() else entry.unlink()
        folder = work / key[:16]
        facts = build(folder)
        note = folder / RECEIPT
        note.write_text(json.dumps({"key": key, **facts}, indent=2) + "\n")
        with note.open("rb") as handle:
            os.fsync(handle.fileno())
        folder.rename(out)
        sync_folder(out.parent)
        shutil.rmtree(work)
    return False


def _is_there(out: Path, key: str) -> bool:
    if not out.exists() or (out.is_dir() and not any(out.iterdir())):
        return False
    if (out / RECEIPT).is_file() and receipt(out)["key"] == key:
        return True
    raise UserError(
        "there is something else already",
        where=str(out),
        why="it was not made from the same text with the same settings, and nothing is overwritten",
        fix=f"choose another folder: out={out}-2",
    )


@contextmanager
def _one_builder(work: Path) -> Iterator[None]:
    """Own `work` until the block ends; the kernel lets go of it with the process."""
    while True:
        work.mkdir(parents=True, exist_ok=True)
        handle = os.open(work, os.O_RDONLY)
        fcntl.flock(handle, fcntl.LOCK_EX)
        # Whoever had it before may have finished and deleted it: then this lock is on a folder nobody sees.
        if work.exists() and work.stat().st_ino == os.fstat(handle).st_ino:
            break
        os.close(handle)
    try:
        yield
    finally:
        os.close(handle)


@contextmanager
def known_hashes(cache: Path) -> Iterator[dict[str, Any]]:
    """The hashes of files that were not touched since, kept in the cache."""
    path = cache / "hashes.json"
    try:
        known = json.loads(path.read_text())["files"]
    except (OSError, ValueError, KeyError, TypeError):
        known = {}
    before = dict(known)
    yield known
    if known != before:
        cache.mkdir(parents=True, exist_ok=True)
        aside = path.with_name(f".hashes.{os.getpid()}")
        aside.write_text(json.dumps({"files": known}))
        aside.rename(path)


def identity(path: AnyPath, known: dict[str, Any]) -> str:
    """What a file's content is known by; a file of this machine is not hashed again while nobody touched it."""
    if isinstance(path, RemoteFile):
        (found,) = identity_of(path).values()
        return found
    state = path.stat()
    name, seen = str(path.absolute()), [state.st_size, state.st_mtime_ns]
    if name not in known or known[name][:2] != seen:
        known[name] = [*seen, *identity_of(path).values()]
    return str(known[name][2])
