"""The compressors that everybody has: rivals of a model that predicts text."""

from __future__ import annotations

import gzip
import lzma
from collections.abc import Callable, Sequence

import zstandard

COMPRESSORS: dict[str, Callable[[bytes], bytes]] = {
    "gzip": lambda text: gzip.compress(text, 9, mtime=0),
    "xz": lambda text: lzma.compress(text, preset=9),
    "zstd": lambda text: zstandard.ZstdCompressor(level=19, write_checksum=True).compress(text),
}
"""`gzip -9`, `xz -9` and `zstd -19`, each on a whole file."""


def bits_per_byte_of(texts: Sequence[bytes], advance: Callable[[float], None] | None = None) -> dict[str, float]:
    """Compressed bits per byte of text, by compressor: each text is compressed alone. `advance` hears of bytes."""
    total = sum(map(len, texts))
    packed = dict.fromkeys(COMPRESSORS, 0)
    for text in texts:
        for name, compress in COMPRESSORS.items():
            packed[name] += len(compress(text))
        if advance is not None:
            advance(len(text))
    return {name: 8 * size / max(total, 1) for name, size in packed.items()}
