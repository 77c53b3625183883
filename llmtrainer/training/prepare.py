"""Text becomes a vocabulary and a token store: by command, or into the cache when a run names raw text."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, Literal

from pydantic import Field

from llmtrainer.base.config import Config
from llmtrainer.base.errors import UserError
from llmtrainer.base.units import Bytes
from llmtrainer.data.comparison_rows import PromptCut
from llmtrainer.data.document import AnyPath, Document, SourceFile
from llmtrainer.data.encode import write_store
from llmtrainer.data.example_rows import Learn
from llmtrainer.data.megatron import write_pair
from llmtrainer.data.open import documents, find, is_container
from llmtrainer.data.packed import Store, is_store
from llmtrainer.tokenizer.tokenizer import load_tokenizer
from llmtrainer.tokenizer.train import train_vocabulary
from llmtrainer.training.cache import built, identity, known_hashes, receipt
from llmtrainer.training.console import bar, say, warn
from llmtrainer.training.figures import amount
from llmtrainer.training.hub import locate
from llmtrainer.training.prepare_examples import prepare_conversations
from llmtrainer.training.prepared import Prepared

VERSION = 1
"""Raised when the same sources and settings would give other bytes: every older key then misses."""
MAXIMUM_MEMORY = Bytes.parse("2 GiB")
SAMPLE_BYTES = 4 * 2**20
"""Text on which a new vocabulary's bytes per token are measured."""
TEXT_FIELDS = ("text", "content")
CONVERSATIONS = frozenset({
    "template", "date", "leave_out", "max_length", "too_long", "cut_side", "cut_end", "max_dropped_share",
    "bad_records", "learn", "gate", "prompt_cut", "max_prompt_length",
})  # fmt: skip
"""Settings of `prepare` that plain text has no use for."""
RawIds = Literal["uint16", "uint32"]

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
    """Where a record's text is: the first of these fields that it has. `title+content`: both, with a newline
    between. `input_ids`: token ids."""

    maximum_memory: Bytes = MAXIMUM_MEMORY
    """Stop reading when learning would need more; how much text was read is reported."""

    allow_truncated: bool = False
    """Accept a file that ends in the middle of a record; what is missing is reported."""

    allow_pickle: bool = False
    """Let a .pkl run whatever code is in it. Only for files of people you trust."""


class Preparation(Config):
    """Turn text into a token store, `llmtrainer prepare corpus/ runs/tokens tokenizer=runs/tokenizer`, or
    conversations: `llmtrainer prepare chats.jsonl runs/chats tokenizer=runs/tokenizer format=auto template=chatml`."""

    words: ClassVar[tuple[str, ...]] = ("data", "out")

    data: str
    """A file, a folder, a glob, an address such as `s3://bucket/corpus/`, or `stdlib:train` (this Python's own
    library). Compressed files are read as they are. Files of token ids (.npy, .pt, .pkl, .bin, Megatron-LM's
    .bin with .idx) are checked against the tokenizer and taken as they are. For `format=megatron` also a store. For
    conversations several files too, with commas between them."""

    out: str
    """The folder to write. Killed at any moment, the same command goes on where it was."""

    tokenizer: str
    """A folder with tokenizer.json, or a hub id: `Qwen/Qwen3-0.6B`."""

    fields: tuple[str, ...] = TEXT_FIELDS
    """Where a record's text is: the first of these fields that it has. `title+content`: both, with a newline
    between. `input_ids`: token ids."""

    workers: int = Field(default=0, ge=0)
    """Processes that tokenise. 0: one per core. Changes no byte of the result."""

    format: str = "store"
    """store: text, as training reads it. megatron: tokens.bin and tokens.idx, what Megatron-LM reads. Anything else
    is for conversations, and says how their files write them: auto (told by the first records), messages,
    conversations, instruction, ...; or for comparisons: comparisons (told by the first records), or
    comparisons.texts, comparisons.ranked, ..."""

    template: str = "auto"
    """For conversations: auto is the tokenizer's own chat template; or a built-in one, such as chatml; or a path to
    a .jinja file."""

    date: str | None = None
    """For conversations: the date that a template with a clock shows, `2026-11-22`."""

    leave_out: tuple[Literal["thinking", "tools"], ...] = ()
    """For conversations: what the template may leave out without being refused."""

    max_length: int = Field(default=2048, ge=2)
    """For conversations: tokens of the longest row."""

    too_long: Literal["drop", "cut", "split", "keep"] = "drop"
    """For conversations: what becomes of a longer row. Comparisons (drop, cut, keep) are cut unless this is set."""

    cut_side: Literal["right", "left"] = "right"
    """Which end a cut takes away."""

    cut_end: Literal["keep", "leave_out"] = "keep"
    """Of an answer that was cut on the right: keep its end token behind what is left of it, or leave it out."""

    max_dropped_share: float = Field(default=0.1, ge=0.0, le=1.0)
    """For conversations: if more than this share of the records is dropped, nothing is written."""

    bad_records: Literal["stop", "drop"] = "stop"
    """For conversations: what a record that cannot be read or rendered does."""

    learn: Learn = "answers"
    """For conversations: which tokens are targets, those of all answers, of the last answer alone, or everything."""

    gate: str | None = None
    """For conversations: the key under which a record names the adapters of a gated mixture that it goes through."""

    prompt_cut: PromptCut = "keep_end"
    """For comparisons: which tokens of a prompt stay that is cut, the last ones or the first."""

    max_prompt_length: int | None = Field(default=None, ge=1)
    """For comparisons: so many tokens stay of a prompt that is cut. Left out: half of `max_length`."""

    raw_ids: RawIds = "uint16"
    """How a raw .bin stores a token id."""

    allow_truncated: bool = False
    """Accept a file that ends in the middle of a record; what is missing is reported."""

    allow_pickle: bool = False
    """Let a .pkl run whatever code is in it. Only for files of people you trust."""


def prepare(preparation: Preparation) -> Prepared:
    """Write a token store. The same one in the same place is left as it is; another one there is refused."""
    if preparation.format not in ("store", "megatron"):
        return prepare_conversations(preparation)
    if meant := sorted(preparation.model_fields_set & CONVERSATIONS):
        raise UserError(f"`{meant[0]}` is for conversations", fix="format=auto, or leave it out")
    out, workers = Path(preparation.out), preparation.workers
    tokenizer = locate(preparation.tokenizer, weights=False).folder
    if is_store(Path(preparation.data)):
        if preparation.format == "store":
            raise UserError("it is a token store already", where=preparation.data, fix=f"data.train={preparation.data}")
        return _figures(out, _pair_of(Path(preparation.data), tokenizer, out))
    sources = Sources.found(
        preparation.data, preparation.fields, preparation.allow_truncated,
        allow_pickle=preparation.allow_pickle, raw_ids=preparation.raw_ids,
    )  # fmt: skip
    make = _store if preparation.format == "store" else _pair
    return _figures(out, make(sources, tokenizer, out, _store_key(sources, tokenizer, {}), workers))


def train_tokenizer(training: TokenizerTraining) -> Prepared:
    """Learn a vocabulary. The same one in the same place is left as it is; another one there is refused."""
    sources = Sources.found(
        training.data, training.fields, training.allow_truncated, allow_pickle=training.allow_pickle
    )  # fmt: skip
    key = _vocabulary_key(sources, training.vocabulary, training.maximum_memory, {})
    out = Path(training.out)
    reused = _vocabulary(sources, out, key, training.vocabulary, training.maximum_memory)
    return _figures(out, reused)


def prepared(
    data: str, tokenizer: Path, cache: Path, *,
    fields: Sequence[str] = TEXT_FIELDS, workers: int = 0, allow_truncated: bool = False,
    allow_pickle: bool = False, raw_ids: RawIds = "uint16", tell: Say = say,
) -> Path:  # fmt: skip
    """The token store of `data`: itself if it is one, else the one in the cache, made now if need be."""
    if is_store(Path(data)):
        learned = load_tokenizer(tokenizer)
        Store(Path(data)).require_tokenizer(learned.fingerprint, learned.vocabulary)
        return Path(data)
    sources = Sources.found(data, tuple(fields), allow_truncated, allow_pickle=allow_pickle, raw_ids=raw_ids)
    with known_hashes(cache) as hashes:
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
    allow_truncated: bool = False, allow_pickle: bool = False, tell: Say = say,
) -> Path:  # fmt: skip
    """The folder of a vocabulary learned from `data`: the one in the cache, learned now if need be."""
    sources = Sources.found(data, tuple(fields), allow_truncated, allow_pickle=allow_pickle)
    with known_hashes(cache) as hashes:
        key = _vocabulary_key(sources, vocabulary, maximum_memory, hashes)
    folder = cache / "tokenizers" / key[:32]
    if not _vocabulary(sources, folder, key, vocabulary, maximum_memory):
        tell(f"learned a vocabulary of {vocabulary:,} from {data}: {folder}")
    return folder


@dataclass(frozen=True)
class Sources:
    """Text files and how they are read."""

    name: str
    files: tuple[SourceFile, ...]
    fields: tuple[str, ...]
    allow_truncated: bool
    allow_pickle: bool = False
    raw_ids: RawIds = "uint16"

    @classmethod
    def found(
        cls, data: str, fields: tuple[str, ...], allow_truncated: bool, *, allow_pickle: bool = False,
        raw_ids: RawIds = "uint16",
    ) -> Sources:  # fmt: skip
        return cls(data, tuple(find(data, warn)), fields, allow_truncated, allow_pickle, raw_ids)

    @property
    def bytes(self) -> int:
        """As they lie on the disk."""
        return sum(file.bytes for file in self.files)

    @property
    def text_bytes(self) -> int | None:
        """For a bar's end: what a container holds is not known before it is read."""
        return None if any(is_container(file.path) for file in self.files) else self.bytes

    def documents(self) -> Iterator[Document]:
        return documents(
            self.files, fields=self.fields, allow_truncated=self.allow_truncated, allow_pickle=self.allow_pickle,
            warn=warn,
        )  # fmt: skip

    def content(self, hashes: dict[str, Any]) -> dict[str, Any]:
        """What a key is made of."""
        return {
            "version": VERSION,
            "fields": self.fields,
            "allow_truncated": self.allow_truncated,
            "raw_ids": self.raw_ids,
            "files": [[_suffixes(file), file.bytes, identity(file.path, hashes)] for file in self.files],
        }


def _store(sources: Sources, tokenizer: Path, out: Path, key: str, workers: int) -> bool:
    return built(out, key, lambda folder: _facts_of(_written(sources, tokenizer, folder, workers)))


def _pair(sources: Sources, tokenizer: Path, out: Path, key: str, workers: int) -> bool:
    """Megatron-LM's pair of files; the store that it is written from lies beside it until then."""

    def build(folder: Path) -> dict[str, Any]:
        store = _written(sources, tokenizer, folder / "store", workers)
        _write_pair(store, folder)
        shutil.rmtree(store.path)
        return _facts_of(store)

    return built(out, _digest({"megatron": key}), build)


def _pair_of(path: Path, tokenizer: Path, out: Path) -> bool:
    store, learned = Store(path), load_tokenizer(tokenizer)
    store.require_tokenizer(learned.fingerprint, learned.vocabulary)

    def build(folder: Path) -> dict[str, Any]:
        folder.mkdir(exist_ok=True)
        _write_pair(store, folder)
        return _facts_of(store)

    return built(out, _digest({"megatron": store.fingerprint}), build)


def _write_pair(store: Store, folder: Path) -> None:
    with bar("megatron", store.tokens * store.dtype.itemsize, "bytes") as advance:
        write_pair(store, folder / "tokens", advance)


def _written(sources: Sources, tokenizer: Path, folder: Path, workers: int) -> Store:
    rules: set[str] = set()

    def told_apart(rule: str, path: AnyPath) -> None:
        if rule not in rules:
            rules.add(rule)
            say(f"token ids: {rule} ({path}{', and others like it' if len(sources.files) > 1 else ''})")

    with bar("tokens", sources.text_bytes, "bytes") as advance:
        return write_store(
            sources.files, tokenizer, load_tokenizer, folder,
            workers=workers or os.cpu_count() or 1, fields=sources.fields,
            allow_truncated=sources.allow_truncated, allow_pickle=sources.allow_pickle, raw_ids=sources.raw_ids,
            report=advance, warn=warn, tell=told_apart,
        )  # fmt: skip


def _facts_of(store: Store) -> dict[str, Any]:
    return {
        "vocabulary": store.vocabulary,
        "tokens": store.tokens,
        "documents": store.documents,
        "bytes_per_token": store.text_bytes / max(store.tokens, 1),
    }


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

    return built(out, key, build)


def _suffixes(file: SourceFile) -> str:
    return "".join(file.path.suffixes[-2:])


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
