"""Stores of comparisons made by hand, for every test of them."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from llmtrainer.data.packed import Compared, Store
from llmtrainer.data.shards import ShardWriter, publish

Ids = Sequence[int]


def compared_store(
    path: Path, comparisons: Sequence[tuple[Ids, Sequence[Ids]]], *, vocabulary: int = 320, shard_tokens: int = 50,
    liked: Sequence[bool] | None = None, margins: Sequence[float | None] | None = None,
) -> Store:  # fmt: skip
    """A store of (prompt, answers), of which every token of an answer counts 1."""
    partial = path.with_name(f".{path.name}.partial")
    partial.mkdir(parents=True)
    writer = ShardWriter(partial, key="hand", dtype=np.dtype("<u2"), shard_tokens=shard_tokens, weighted=True)
    for number, (prompt, answers) in enumerate(comparisons):
        rows = [np.array([*prompt, *answer], dtype=np.uint16) for answer in answers]
        lengths = np.array([len(row) for row in rows], dtype=np.int64)
        weights = [np.array([0.0] * len(prompt) + [1.0] * len(answer), dtype=np.float32) for answer in answers]
        relation = Compared(
            len(rows), len(prompt), None if liked is None else liked[number],
            None if margins is None else margins[number],
        )  # fmt: skip
        zeros = np.zeros_like(lengths)
        writer.add(np.concatenate(rows), lengths, zeros, zeros, np.concatenate(weights), compared=[relation])
    writer.finish(
        {"tokenizer": "none", "vocabulary": vocabulary, "end": 0}, [{"path": "by hand", "bytes": 0, "sha256": ""}]
    )
    publish(partial, path)
    return Store(path)


def random_comparisons(
    sizes: Sequence[tuple[int, ...]], seed: int = 0, vocabulary: int = 320
) -> list[tuple[list[int], list[list[int]]]]:
    """Of each size (tokens of the prompt, tokens of each answer) one, of random ids."""
    draw = np.random.default_rng(seed)
    ids = iter(draw.integers(1, vocabulary, 100_000).tolist())
    return [
        (list(itertools.islice(ids, prompt)), [list(itertools.islice(ids, answer)) for answer in answers])
        for prompt, *answers in sizes
    ]
