"""Text becomes a vocabulary and a token store: by command, or into the cache when a run names raw text.

The cache is keyed by content. A key is the SHA-256 over the source files (suffix, bytes and SHA-256 of
each, in order) and everything else that decides the result; names and places do not count, so a folder may
be moved. A file is not hashed again while its path, size and modification time in nanoseconds are those it
had when it was hashed. What lies under a key is whole: it was written aside and renamed at its end. Several
processes may ask at once: one builds, the others wait for it.
"""

from __future__ import annotations

import fcntl
import hashlib
import json
import os
import shutil
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

from pydantic import Field

from llmtrainer.base.config import Config
from llmtrainer.base.errors import UserError
from llmtrainer.base.result import Result
from llmtrainer.base.rundir import sync_folder
from llmtrainer.base.units import Bytes
from llmtrainer.data.document import Document, SourceFile
from llmtrainer.data.encode import write_store
from llmtrainer.data.open import documents, find
from llmtrainer.data.packed import Store, is_store, sha256_of
from llmtrainer.tokenizer.tokenizer import load_tokenizer
from llmtrainer.tokenizer.train import train_vocabulary
from llmtrainer.training.console import bar, say, warn
from llmtrainer.training.figures import amount
from llmtrainer.training.hub import locate

VERSION = 1
"""Raised when the same sources and settings would give other bytes: every older key then misses."""
RECEIPT = "prepared.json"
MAXIMUM_MEMORY = Bytes.parse("2 GiB")
SAMPLE_BYTES = 4 * 2**20
"""Text on which a new vocabulary's bytes per token are measured."""
CONTAINERS = (".gz", ".zst", ".xz", ".bz2", ".parquet", ".json", ".jsonl")
TEXT_FIELDS = ("text", "content")

Say = Callable[[str], None]


class TokenizerTraining(Config):
    """Learn a byte-level vocabulary: `llmtrainer train-tokenizer corpus/ runs/tokenizer vocabulary=32000`."""

    words: ClassVar[tuple[str, ...]] = ("data", "out")

    data: str
    """A file, a folder, a glob, or `stdlib:train` (this Python's own library). Compressed files are read as
    they are."""

    out: str
    """The folder to write: tokenizer.json and what transformers needs beside it."""

    vocabulary: int = Field(default=32_000, ge=269)
    """Number of ids, control ids included. The 256 bytes and 13 control ids are always among them."""

    fields: tuple[str, ...] = TEXT_FIELDS
    """Where a record's text is: the first of these fields that it has."""

    maximum_memory: Bytes = MAXIMUM_MEMORY
    """Stop reading when learning would need more; how much text was read is reported."""

    allow_truncated: bool = False
    """Accept a file that ends in the middle of a record; what is missing is reported."""


class Preparation(Config):
    """Turn text into a token store: `llmtrainer prepare corpus/ runs/tokens tokenizer=runs/tokenizer`."""

    words: ClassVar[tuple[str, ...]] = ("data", "out")

    data: str
    """A file, a folder, a glob, or `stdlib:train` (this Python's own library). Compressed files are read as
    they are."""

    out: str
    """The folder to write. Killed at any moment, the same command goes on where it was."""

    tokenizer: str
    """A folder with tokenizer.json, or a hub id: `Qwen/Qwen3-0.6B`."""

    fields: tuple[str, ...] = TEXT_FIELDS
    """Where a record's text is: the first of these fields that it has."""

    workers: int = Field(default=0, ge=0)
    """Processes that tokenise. 0: one per core. Changes no byte of the result."""

    allow_truncated: bool = False
    """Accept a file that ends in the middle of a record; what is missing is reported."""


@dataclass(frozen=True)
class Prepared(Result):
    """Figures of a token store, or of a vocabulary."""

    path: str
    tokens: int
    """Of the store. Of a vocabulary: of the first text it learned from, at most 4 MiB."""
    documents: int
    vocabulary: int
    bytes_per_token: float
    reused: bool
    """Whether it was there already."""


def prepare(preparation: Preparation) -> Prepared:
    """Write a token store. The same one in the same place is left as it is; another one there is refused."""
    sources = Sources.found(preparation.data, preparation.fields, preparation.allow_truncated)
    out, tokenizer = Path(preparation.out), locate(preparation.tokenizer, weights=False).folder
    reused = _store(sources, tokenizer, out, _store_key(sources, tokenizer, {}), preparation.workers)
    return _figures(out, reused)


def train_tokenizer(training: TokenizerTraining) -> Prepared:
    """Learn a vocabulary. The same one in the same place is left as it is; another one there is refused."""
    sources = Sources.found(training.data, training.fields, training.allow_truncated)
    key = _vocabulary_key(sources, training.vocabulary, training.maximum_memory, {})
    out = Path(training.out)
    reused = _vocabulary(sources, out, key, training.vocabulary, training.maximum_memory)
    return _figures(out, reused)


def prepared(
    data: str, tokenizer: Path, cache: Path, *,
    fields: Sequence[str] = TEXT_FIELDS, workers: int = 0, allow_truncated: bool = False, tell: Say = say,
) -> Path:  # fmt: skip
    """The token store of `data`: itself if it is one, else the one in the cache, made now if need be."""
    if is_store(Path(data)):
        learned = load_tokenizer(tokenizer)
        Store(Path(data)).require_tokenizer(learned.fingerprint, learned.vocabulary)
        return Path(data)
    sources = Sources.found(data, tuple(fields), allow_truncated)
    with _known_hashes(cache) as hashes:
        key = _store_key(sources, tokenizer, hashes)
    folder = cache / "tokens" / key[:32]
    if _store(sources, tokenizer, folder, key, workers):
        tell(f"the tokens of {data} are prepared already: {folder}")
    else:
        tell(f"prepared {data}, {len(sources.files):,} files, {amount(sources.bytes, 'bytes')}: {folder}")
    return folder


def trained_tokenizer(
    data: str, vocabulary: int, cache: Path, *,
    fields: Sequence[str] = TEXT_FIELDS, maximum_memory: Bytes = MAXIMUM_MEMORY,
    allow_truncated: bool = False, tell: Say = say,
) -> Path:  # fmt: skip
    """The folder of a vocabulary learned from `data`: the one in the cache, learned now if need be."""
    sources = Sources.found(data, tuple(fields), allow_truncated)
    with _known_hashes(cache) as hashes:
        key = _vocabulary_key(sources, vocabulary, maximum_memory, hashes)
    folder = cache / "tokenizers" / key[:32]
    if not _vocabulary(sources, folder, key, vocabulary, maximum_memory):
        tell(f"learned a vocabulary of {vocabulary:,} from {data}: {folder}")
    return folder


def receipt(folder: Path) -> dict[str, Any]:
    """What was noted when it was made: key, vocabulary, tokens, documents, bytes_per_token."""
    facts: dict[str, Any] = json.loads((folder / RECEIPT).read_text())
    return facts


@dataclass(frozen=True)
class Sources:
    """Text files and how they are read."""

    name: str
    files: tuple[SourceFile, ...]
    fields: tuple[str, ...]
    allow_truncated: bool

    @classmethod
    def found(cls, data: str, fields: tuple[str, ...], allow_truncated: bool) -> Sources:
        return cls(data, tuple(find(data, warn)), fields, allow_truncated)

    @property
    def bytes(self) -> int:
        """As they lie on the disk."""
        return sum(file.bytes for file in self.files)

    @property
    def text_bytes(self) -> int | None:
        """For a bar's end: what a container holds is not known before it is read."""
        plain = all(Path(file.path).suffix not in CONTAINERS for file in self.files)
        return self.bytes if plain else None

    def documents(self) -> Iterator[Document]:
        return documents(self.files, fields=self.fields, allow_truncated=self.allow_truncated, warn=warn)

    def content(self, hashes: dict[str, Any]) -> dict[str, Any]:
        """What a key is made of."""
        return {
            "version": VERSION,
            "fields": self.fields,
            "allow_truncated": self.allow_truncated,
            "files": [[_suffixes(file), file.bytes, _sha256(Path(file.path), hashes)] for file in self.files],
        }


def _store(sources: Sources, tokenizer: Path, out: Path, key: str, workers: int) -> bool:
    def build(folder: Path) -> dict[str, Any]:
        with bar("tokens", sources.text_bytes, "bytes") as advance:
            write_store(
                sources.files, tokenizer, load_tokenizer, folder,
                workers=workers or os.cpu_count() or 1, fields=sources.fields,
                allow_truncated=sources.allow_truncated, report=advance, warn=warn,
            )  # fmt: skip
        store = Store(folder)
        return {
            "vocabulary": store.vocabulary,
            "tokens": store.tokens,
            "documents": store.documents,
            "bytes_per_token": store.text_bytes / max(store.tokens, 1),
        }

    return _built(out, key, build)


def _vocabulary(sources: Sources, out: Path, key: str, size: int, maximum_memory: Bytes) -> bool:
    def build(folder: Path) -> dict[str, Any]:
        sample: list[str] = []
        count = {"documents": 0, "sample": 0}

        def texts() -> Iterator[str]:
            for document in sources.documents():
                count["documents"] += 1
                if count["sample"] < SAMPLE_BYTES:
                    sample.append(document.text)
                    count["sample"] += document.bytes
                yield document.text

        with bar("vocabulary", sources.text_bytes, "bytes") as advance:
            learned = train_vocabulary(
                texts(), size, maximum_memory=maximum_memory, report=advance, warn=warn
            )  # fmt: skip
        shutil.rmtree(folder, ignore_errors=True)  # half of an earlier try
        learned.save(folder)
        tokens = sum(map(len, learned.encode_batch(sample)))
        return {
            "vocabulary": learned.vocabulary,
            "tokens": tokens,
            "documents": count["documents"],
            "bytes_per_token": count["sample"] / max(tokens, 1),
        }

    return _built(out, key, build)


def _built(out: Path, key: str, build: Callable[[Path], dict[str, Any]]) -> bool:
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
def _known_hashes(cache: Path) -> Iterator[dict[str, Any]]:
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


def _sha256(path: Path, known: dict[str, Any]) -> str:
    state = path.stat()
    name, seen = str(path.absolute()), [state.st_size, state.st_mtime_ns]
    if name not in known or known[name][:2] != seen:
        known[name] = [*seen, sha256_of(path)]
    found: str = known[name][2]
    return found


def _suffixes(file: SourceFile) -> str:
    return "".join(Path(file.path).suffixes[-2:])


def _digest(content: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


def _store_key(sources: Sources, tokenizer: Path, hashes: dict[str, Any]) -> str:
    return _digest({**sources.content(hashes), "tokenizer": load_tokenizer(tokenizer).fingerprint})


def _vocabulary_key(sources: Sources, size: int, maximum_memory: Bytes, hashes: dict[str, Any]) -> str:
    return _digest({**sources.content(hashes), "vocabulary": size, "maximum_memory": maximum_memory.count})


def _figures(out: Path, reused: bool) -> Prepared:
    facts = receipt(out)
    return Prepared(
        str(out), facts["tokens"], facts["documents"], facts["vocabulary"], facts["bytes_per_token"], reused
    )
