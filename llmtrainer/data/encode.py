"""Documents -> token store, by several processes; killed at any moment it goes on and ends with the same bytes."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable, Generator, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from dataclasses import dataclass, field
from functools import partial
from itertools import chain
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
from numpy.typing import NDArray

from llmtrainer.base.errors import UserError
from llmtrainer.data.document import AnyPath, Document, Reading, SourceFile, Tokens
from llmtrainer.data.made_once import store_made_once
from llmtrainer.data.open import contents
from llmtrainer.data.packed import Store, dtype_for, sha256_of
from llmtrainer.data.remote import RemoteFile, remote_facts, remote_sha256
from llmtrainer.data.shards import ShardWriter
from llmtrainer.data.tokens import Vocabulary
from llmtrainer.data.workers import worked_by, worked_here

if TYPE_CHECKING:    # core imports torch, which a process that only tokenises would wait for in vain
    from llmtrainer.core.protocols import Tokenizer

LoadTokenizer = Callable[[Path], "Tokenizer"]

SHARD_TOKENS = 2**26
"""128 MiB of two-byte ids: what a kill can cost at most, and a count of files that a folder bears."""
_BATCH_DOCUMENTS = 2**14


def write_store(
    files: Sequence[SourceFile],
    tokenizer_folder: Path,
    load_tokenizer: LoadTokenizer,
    out: Path,
    *,
    workers: int = 0,
    batch_bytes: int = 2**20,
    shard_tokens: int = SHARD_TOKENS,
    fields: tuple[str, ...] = ("text", "content"),
    errors: Literal["strict", "replace"] = "strict",
    allow_truncated: bool = False,
    allow_pickle: bool = False,
    raw_ids: Literal["uint16", "uint32"] = "uint16",
    report: Callable[[int], None] | None = None,
    warn: Callable[[str], None] | None = None,
    tell: Callable[[str, AnyPath], None] | None = None,
) -> Store:
    """Tokenise every document of the files, in order, each between the tokenizer's begin id, if any, and its end.

    Files of token ids are checked against the vocabulary; `tell` hears (how their documents were told apart, file).

    The bytes of the store are a function of files, tokenizer, reading settings and `shard_tokens` alone: not of
    `workers` (0: in this process), not of `batch_bytes` of text that a process gets at a time, not of how often it
    was killed. `out` appears by a rename once it is whole; if it is there and was made of the same, nothing is done.
    `load_tokenizer` is a function that other processes can import. `report` hears bytes of text.
    Raises UserError for text that cannot be read, another store at `out`, a full disk or a worker that died; what
    was written stays and is used by the next try.
    """
    tokenizer = load_tokenizer(tokenizer_folder)
    facts = {"tokenizer": tokenizer.fingerprint, "vocabulary": tokenizer.vocabulary, "end": tokenizer.end}
    states, sources = hashed(files)
    key = digest_of([facts, shard_tokens, fields, errors, allow_truncated, raw_ids, sources])

    def write(aside: Path) -> None:
        writer = ShardWriter(aside, key=key, dtype=dtype_for(tokenizer.vocabulary), shard_tokens=shard_tokens)
        reading = Reading(fields, errors, allow_truncated, warn, allow_pickle, raw_ids)
        read = partial(contents, vocabulary=Vocabulary.of(tokenizer), reading=reading, tell=tell)
        try:
            batches = _batches(files, states, writer.counts(len(files)), batch_bytes, read)
            here = workers == 0 or sum(file.bytes for file in files) <= batch_bytes
            make = partial(_encoder, load_tokenizer, tokenizer_folder)
            encoded = worked_here(batches, make) if here else worked_by(workers, batches, make)
            _write_all(writer, encoded, report)
            _require_documents(writer, files)
            writer.finish({"key": key, **facts}, sources)
        finally:
            writer.abandon()

    return store_made_once(out, key, write)


@dataclass
class _Batch:
    """Texts, or the ids of some, that go to a process together, with the source of each."""

    contents: list[str | NDArray[np.int64]] = field(default_factory=list)
    sources: list[int] = field(default_factory=list)


Encoded = tuple[NDArray[Any], NDArray[np.int64], NDArray[np.int64]]
"""Ids of several documents end to end, the number of ids of each, and the UTF-8 bytes of its text."""


def _write_all(
    writer: ShardWriter, encoded: Generator[tuple[_Batch, Encoded]], report: Callable[[int], None] | None
) -> None:
    heard = report if report is not None else lambda count: None
    if writer.text_bytes:
        heard(writer.text_bytes)    # what an earlier try has done
    with closing(encoded):    # an error here ends the processes at once, not when the traceback is forgotten
        for batch, (ids, lengths, sizes) in encoded:
            writer.append(ids, lengths, np.array(batch.sources), sizes)
            heard(int(sizes.sum()))


def _batches(
    files: Sequence[SourceFile], states: list[State], done: list[int], batch_bytes: int,
    read: Callable[[Sequence[SourceFile]], Iterator[Document | Tokens]],
) -> Iterator[_Batch]:
    """What is left to do behind the `done` documents of each file."""
    last = max((source for source, count in enumerate(done) if count), default=0)
    batch, held = _Batch(), 0
    for source in range(last, len(files)):
        for document in read([files[source]]):
            if document.record <= done[source]:
                continue
            batch.contents.append(document.text if isinstance(document, Document) else document.ids)
            batch.sources.append(source)
            held += document.bytes if isinstance(document, Document) else document.ids.nbytes
            if held >= batch_bytes or len(batch.contents) >= _BATCH_DOCUMENTS:
                yield batch
                batch, held = _Batch(), 0
        if state_of(files[source].path) != states[source]:
            raise UserError(
                "a file changed while it was read",
                where=str(files[source].path),
                why="the store would hold some of its old text and some of its new",
                fix="let the file come to rest, then run the same command again",
            )
    if batch.contents:
        yield batch


def _encoder(load_tokenizer: LoadTokenizer, folder: Path) -> Callable[[_Batch], Encoded]:
    tokenizer = load_tokenizer(folder)
    return lambda batch: _encode(tokenizer, batch.contents)


def _encode(tokenizer: Tokenizer, contents: list[str | NDArray[np.int64]]) -> Encoded:
    # One by one: `encode_batch` would start a thread per core in each of the processes.
    # Ids that another program wrote are taken as they are; a text begins as the tokenizer begins one.
    begin = [] if tokenizer.begin is None else [tokenizer.begin]
    documents = [begin + tokenizer.encode(item) if isinstance(item, str) else item.tolist() for item in contents]
    sizes = [
        len((item if isinstance(item, str) else tokenizer.decode(ids, skip_control=True)).encode())
        for item, ids in zip(contents, documents, strict=True)
    ]
    lengths = np.array([len(ids) + 1 for ids in documents], dtype=np.int64)
    end = (tokenizer.end,)
    flat = chain.from_iterable(chain(ids, end) for ids in documents)
    ids = np.fromiter(flat, dtype=np.uint32, count=int(lengths.sum()))
    assert ids.max(initial=0) < tokenizer.vocabulary, "the tokenizer gave an id beyond its vocabulary"
    return ids.astype(dtype_for(tokenizer.vocabulary)), lengths, np.array(sizes, dtype=np.int64)


State = tuple[int | str | None, ...]
"""What changes when a file does."""


def hashed(files: Sequence[SourceFile]) -> tuple[list[State], list[dict[str, Any]]]:
    """(size and time, manifest entry) of each file; hashing leaves Python's lock alone, so threads help."""
    with ThreadPoolExecutor(min(8, os.cpu_count() or 1)) as threads:
        states = [state_of(file.path) for file in files]
        identities = list(threads.map(lambda file: identity_of(file.path), files))
    sources = [
        {"path": str(file.path), "bytes": state[0], **identity}
        for file, state, identity in zip(files, states, identities, strict=True)
    ]
    return states, sources


def state_of(path: AnyPath) -> State:
    """Size and time of a file, or what its server says of it; asked anew each time."""
    if isinstance(path, RemoteFile):
        facts = remote_facts(path)
        return facts.bytes, facts.identity
    found = path.stat()
    return found.st_size, found.st_mtime_ns


def identity_of(path: AnyPath) -> dict[str, str]:
    """What a file's content is known by: its SHA-256, or what its server vouches for instead (`identity`)."""
    if not isinstance(path, RemoteFile):
        return {"sha256": sha256_of(path)}
    identity = remote_facts(path).identity
    return {"identity": identity} if identity else {"sha256": remote_sha256(path)}


def digest_of(facts: list[Any]) -> str:
    return hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()


def _require_documents(writer: ShardWriter, files: Sequence[SourceFile]) -> None:
    if writer.documents == 0:
        raise UserError(
            "there is no document to tokenise",
            where=", ".join(str(file.path) for file in files[:3]) or "no file was given",
            fix="name text that is not empty",
        )
