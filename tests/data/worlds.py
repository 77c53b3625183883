"""Small corpora, a byte tokenizer and stores made by hand, for every test of data."""

from __future__ import annotations

import hashlib
import itertools
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np

from llmtrainer.data.packed import Store
from llmtrainer.data.shards import ShardWriter, publish

END = 256


class ByteTokenizer:
    """Ids are the bytes of the text; 256 is the end. Satisfies core.protocols.Tokenizer and can be pickled."""

    vocabulary = 257
    end = END
    begin: int | None = None
    pad = END
    control: Mapping[str, int] = {"<|endoftext|>": END}
    fingerprint = hashlib.sha256(b"bytes").hexdigest()

    def encode(self, text: str) -> list[int]:
        return list(text.encode())

    def encode_continuation(self, text: str) -> list[int]:
        return self.encode(text)

    def encode_batch(self, texts: Sequence[str]) -> list[list[int]]:
        return [self.encode(text) for text in texts]

    def decode(self, ids: Sequence[int], *, skip_control: bool = False) -> str:
        end = "" if skip_control else "<|endoftext|>"
        return "".join(end if id == END else chr(id) for id in ids)

    def pieces(self, ids: Sequence[int]) -> list[str]:
        return [self.decode([id]) for id in ids]

    def save(self, folder: Path) -> None:
        (folder / "tokenizer.json").write_text("{}")


def load_bytes(folder: Path) -> ByteTokenizer:
    return ByteTokenizer()


def make_store(
    path: Path, documents: Sequence[Sequence[int]], *, vocabulary: int = 1000, shard_tokens: int = 50,
    weights: Sequence[Sequence[float]] | None = None, tokenizer: str = "none",
) -> Store:  # fmt: skip
    """A store of these documents; ids are taken as given, end ids included, and so are the weights of the tokens."""
    partial = path.with_name(f".{path.name}.partial")
    partial.mkdir(parents=True)
    dtype = np.dtype("<u2" if vocabulary <= 65536 else "<u4")
    writer = ShardWriter(partial, key="by hand", dtype=dtype, shard_tokens=shard_tokens, weighted=weights is not None)
    ids = np.concatenate([np.asarray(document, dtype=dtype) for document in documents])
    lengths = np.array([len(document) for document in documents], dtype=np.int64)
    zeros = np.zeros_like(lengths)
    if weights is None:
        writer.append(ids, lengths, zeros, zeros)
    else:
        writer.add(ids, lengths, zeros, zeros, np.concatenate([np.asarray(row, dtype=np.float32) for row in weights]))
    writer.finish(
        {"tokenizer": tokenizer, "vocabulary": vocabulary, "end": 0},
        [{"path": "by hand", "bytes": 0, "sha256": ""}],
    )
    publish(partial, path)
    return Store(path)


def counting(lengths: Sequence[int]) -> list[list[int]]:
    """Documents of these lengths whose tokens count up from 1 over all of them, so that a token names its place."""
    edges = np.concatenate([[0], np.cumsum(lengths)])
    return [list(range(start + 1, stop + 1)) for start, stop in itertools.pairwise(edges)]
