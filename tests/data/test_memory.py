"""Memory does not grow with the corpus: 200 MB files are streamed, 10 M documents are indexed, in child processes."""

from __future__ import annotations

import gzip
import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pyarrow
import pytest
import zstandard
from pyarrow import parquet

from llmtrainer.data.packed import MANIFEST

ROOT = Path(__file__).parents[2]
RECORDS = 10_000
TEXT = ("Memory is bounded by a record and a block, \u4f60\u597d. " * 420)[:20_000]


def text(number: int) -> str:
    return f"{number} {TEXT}"


def pieces(array: bool) -> Iterator[bytes]:
    yield b"[" if array else b""
    for number in range(RECORDS):
        separator = b"" if number == 0 else b"," if array else b"\n"
        yield separator + json.dumps({"id": number, "text": text(number)}, ensure_ascii=False).encode()
    yield b"]" if array else b"\n"


def write_large(path: Path) -> None:
    if path.suffix == ".parquet":
        # One row group, not packed: a reader that fetches or decodes a group at a time would need all of it. A page
        # is what a reader cannot do without; the writer looks at its size (1 MiB) once a batch.
        column = pyarrow.array([text(number) for number in range(RECORDS)])
        parquet.write_table(
            pyarrow.table({"text": column}), path,
            row_group_size=RECORDS, use_dictionary=False, compression="none",
            write_batch_size=32,
        )    # fmt: skip
        return
    if path.suffix == ".arrow":
        schema = pyarrow.schema({"text": pyarrow.string()})
        with pyarrow.ipc.new_stream(str(path), schema) as table:
            for first in range(0, RECORDS, 100):
                rows = [text(number) for number in range(first, first + 100)]
                table.write_batch(pyarrow.record_batch([rows], schema=schema))
        return
    with path.open("wb") as file:
        if path.suffix == ".csv":
            file.write(b"id,text\n")
            file.writelines(f'{number},"{text(number)}"\n'.encode() for number in range(RECORDS))
        elif path.suffix == ".gz":
            with gzip.GzipFile(fileobj=file, mode="wb", compresslevel=1) as packed:
                packed.writelines(pieces(False))
        elif path.suffix == ".zst":
            with zstandard.ZstdCompressor(level=1).stream_writer(file) as stream:
                for piece in pieces(False):
                    stream.write(piece)
        else:
            file.writelines(pieces(path.suffix == ".json"))


# Not getrusage: its maximum outlives exec, so a child would begin with the peak of the process that started it.
PEAK = """
from pathlib import Path
def peak():
    return int(Path("/proc/self/status").read_text().split("VmHWM:")[1].split()[0]) // 1024
"""

READ = PEAK + """
import hashlib, sys
from llmtrainer.data.open import documents, find
import pyarrow.parquet                             # a library's own size is no growth
files, before, count, digest = find(sys.argv[1]), peak(), 0, hashlib.sha256()
for document in documents(files):
    digest.update(document.text.encode())
    count += 1
print(count, digest.hexdigest(), peak() - before)
"""


def child(code: str, *words: str) -> list[str]:
    done = subprocess.run(
        [sys.executable, "-c", code, *words], cwd=ROOT, capture_output=True, text=True, timeout=280
    )
    assert done.returncode == 0, done.stderr
    return done.stdout.split()


needs_proc = pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="the peak is read from /proc")


@needs_proc
@pytest.mark.parametrize("name", ["a.json", "a.jsonl", "a.jsonl.gz", "a.jsonl.zst", "a.parquet", "a.csv", "a.arrow"])
def test_200_megabytes_are_read_in_less_than_50(tmp_path: Path, name: str) -> None:
    import hashlib

    write_large(tmp_path / name)
    expected = hashlib.sha256()
    for number in range(RECORDS):
        expected.update(text(number).encode())
    count, digest, grown = child(READ, str(tmp_path / name))
    (tmp_path / name).unlink()
    assert (int(count), digest) == (RECORDS, expected.hexdigest())
    assert int(grown) < 50, f"{grown} MiB"


DRAW = PEAK + """
import sys
from llmtrainer.data.packed import Store
from llmtrainer.data.source import DiskSource
here, before = Path(sys.argv[1]), peak()
for policy in ("stream", "split"):
    source = DiskSource(Store(here), sequence_length=16, rows_per_step=64, tokens_per_batch=1024, seed=0,
                        policy=policy, held_out=0.1, cache=here.parent / "cache", prefetch=False)
    for step in range(60):
        source.batches(step * 1000)
print(source.rows_per_epoch, peak() - before)
"""

CUT = PEAK + """
import sys
from llmtrainer.data.packed import Store
from llmtrainer.data.budget_source import BudgetSource
here, before = Path(sys.argv[1]), peak()
source = BudgetSource(Store(here), sequence_length=16, tokens_per_step=512, tokens_per_batch=64, seed=0,
                      held_out=0.1, cache=here.parent / "cache", prefetch=False, rank=1, world_size=4)
for step in range(60):
    source.batches(step * 1000)
print(source.rows_per_step, peak() - before)
"""


@needs_proc
def test_an_index_of_10_million_documents_stays_on_the_disk(tmp_path: Path) -> None:
    documents, length = 10_000_000, 5
    store = tmp_path / "store"
    store.mkdir()
    (np.arange(documents + 1, dtype="<i8") * length).tofile(store / "documents.bin")
    np.ones(documents * length, dtype="<u2").tofile(store / "tokens-00000.bin")
    files = {name: {"bytes": (store / name).stat().st_size, "sha256": ""} for name in
             ("tokens-00000.bin", "documents.bin")}  # fmt: skip
    manifest = {
        "version": 1, "dtype": "<u2", "tokenizer": "", "vocabulary": 2, "end": 0, "documents": documents,
        "tokens": documents * length, "text_bytes": 0, "sources": [], "files": files,
    }  # fmt: skip
    (store / MANIFEST).write_text(json.dumps(manifest))
    rows, grown = child(DRAW, str(store))
    assert abs(int(rows) / documents - 0.9) < 0.01
    assert int(grown) < 40, f"{grown} MiB"
    rows, grown = child(CUT, str(store))
    assert int(rows) == 512 / (length - 1)
    assert int(grown) < 40, f"{grown} MiB"
