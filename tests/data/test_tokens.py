"""Text that was tokenised before: every id where it was, documents cut by the rule that is told, nothing foreign."""

from __future__ import annotations

import gzip
import io
import json
import os
import pickle
import struct
from collections import OrderedDict
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from pyarrow import parquet

from llmtrainer.base.errors import UserError
from llmtrainer.data import tokens as module
from llmtrainer.data.encode import write_store
from llmtrainer.data.open import documents, find
from llmtrainer.data.tokens import Cutter, Vocabulary
from tests.data.worlds import END, ByteTokenizer, load_bytes

A, B, C = [1, 2, 3], [4], [5, 6]
CLOSED = [[*A, END], [*B, END], [*C, END]]
STREAM = [*A, END, *B, END, *C]


def stored(path: Path, content: bytes, **how: Any) -> tuple[list[list[int]], list[str]]:
    """The documents of the store that a file becomes, and what was told about their borders."""
    path.parent.mkdir(exist_ok=True)
    path.write_bytes(content)
    out = path.parent / f".{len(list(path.parent.iterdir()))}"
    told: list[str] = []
    store = write_store(find(path), path, load_bytes, out, tell=lambda rule, path: told.append(rule), **how)
    store.verify()
    characters = [chr(id) for number in range(store.documents) for id in store.read(number).tolist() if id != END]
    assert store.text_bytes == len("".join(characters).encode()), "bytes of the text that the ids stand for"
    return [store.read(number).tolist() for number in range(store.documents)], told


def npy(array: Any) -> bytes:
    sink = io.BytesIO()
    np.save(sink, array, allow_pickle=True)
    return sink.getvalue()


def pt(value: Any) -> bytes:
    sink = io.BytesIO()
    torch.save(value, sink)
    return sink.getvalue()


def table(ids: list[list[int]]) -> bytes:
    sink = io.BytesIO()
    parquet.write_table(pyarrow.table({"n": range(len(ids)), "input_ids": ids}), sink)
    return sink.getvalue()


SOURCES: dict[str, tuple[str, bytes]] = {
    "npy": ("a.npy", npy(np.array(STREAM, dtype=np.uint16))),
    "npy, wide": ("a.npy", npy(np.array(STREAM, dtype=np.int64))),
    "npy, packed": ("a.npy.gz", gzip.compress(npy(np.array(STREAM, dtype=np.uint32)))),
    "tensor": ("a.pt", pt(torch.tensor(STREAM))),
    "tensors": ("a.pt", pt([torch.tensor(A), torch.tensor(B, dtype=torch.int32), torch.tensor([*C, END])])),
    "tensors by name": ("a.pt", pt({"x": torch.tensor(A), "y": torch.tensor(B), "z": torch.tensor(C)})),
    "input_ids": ("a.pt", pt({"input_ids": [A, B, C], "labels": [A, B, C]})),
    "records": ("a.pt", pt([{"input_ids": torch.tensor(item)} for item in (A, B, C)])),
    "pickle": ("a.pkl", pickle.dumps([np.array(A, dtype=np.uint16), B, tuple(C)])),
    "pickle, old": ("a.pickle", pickle.dumps({"input_ids": np.array(STREAM)}, protocol=2)),
    "pickle, ordered": ("a.pkl", pickle.dumps(OrderedDict(a=np.array(A), b=np.array(B), c=np.array(C)), protocol=5)),
    "pickle, in pieces": ("a.pkl", b"".join(map(pickle.dumps, (A, [np.array(B), C])))),
    "pickle, packed in pieces": ("a.pkl.gz", gzip.compress(b"".join(map(pickle.dumps, (A, B, C))))),
    "raw": ("a.bin", struct.pack(f"<{len(STREAM)}H", *STREAM)),
    "raw, packed": ("a.bin.gz", gzip.compress(struct.pack(f"<{len(STREAM)}H", *STREAM))),
}


@pytest.mark.parametrize("name", SOURCES)
def test_every_source_of_ids_becomes_the_same_documents(tmp_path: Path, name: str) -> None:
    found, _ = stored(tmp_path / "x" / SOURCES[name][0], SOURCES[name][1])
    assert found == CLOSED


def test_rows_of_a_matrix_are_documents(tmp_path: Path) -> None:
    rows = [[1, 2, 3], [4, END, 6], [7, 8, END]]
    expected = [[1, 2, 3, END], [4, END, 6, END], [7, 8, END]]
    assert stored(tmp_path / "a.npy", npy(np.array(rows, dtype=np.uint16))) == (expected, ["a row is a document"])
    assert stored(tmp_path / "a.pt", pt(torch.tensor(rows)))[0] == expected


@pytest.mark.parametrize("name", ["a.jsonl", "a.parquet"])
def test_a_field_input_ids_holds_ids(tmp_path: Path, name: str) -> None:
    lines = "\n".join(json.dumps({"input_ids": ids}) for ids in (A, B, C)).encode()
    content = lines if name == "a.jsonl" else table([A, B, C])
    assert stored(tmp_path / name, content, fields=("input_ids",))[0] == CLOSED
    with pytest.raises(UserError, match="text is a list"):
        stored(tmp_path / "b.jsonl", b'{"text": [1, 2]}')


CUTS = [
    ([1, 2, END, 3, END], [[1, 2, END], [3, END]], "a document ends with id 256"),
    ([1, 2, END, 3], [[1, 2, END], [3, END]], "a document ends with id 256"),
    ([1, END, END, 3], [[1, END], [END], [3, END]], "a document ends with id 256"),
    ([END, 1, 2, END, 3], [[1, 2, END], [3, END]], "a document begins with id 256, which is put behind it"),
    ([1, 2, 3], [[1, 2, 3, END]], "one document a file"),
    ([255, 1, 2, 255, 3], [[255, 1, 2, END], [255, 3, END]], "a document begins with id 255"),
    ([255, 1, END, 2], [[255, 1, END, 2, END]], "one document a file"),
]
"""Ids of a file, of which 255 and 256 are control ids -> documents, and the rule."""


@pytest.mark.parametrize("size", [1, 2, 3, 100])
@pytest.mark.parametrize(("ids", "expected", "rule"), CUTS, ids=range(len(CUTS)))
def test_documents_are_cut_by_the_rule_that_the_file_gives_away(
    ids: list[int], expected: list[list[int]], rule: str, size: int
) -> None:
    vocabulary = Vocabulary(257, END, frozenset([255, END]))
    cutter = Cutter(vocabulary)
    stretches = [np.array(ids[start : start + size], dtype=np.int64) for start in range(0, len(ids), size)]
    found = [[*vocabulary.opened(document).tolist(), END] for document in cutter.cut(stretches, "here")]
    assert (found, cutter.rule) == (expected, rule)


@settings(max_examples=100, deadline=None)
@given(ids=st.lists(st.sampled_from([1, 2, 255, END]), min_size=1, max_size=30), size=st.integers(1, 7))
def test_cutting_loses_no_id_but_an_end_at_the_front(ids: list[int], size: int) -> None:
    stretches = [np.array(ids[start : start + size], dtype=np.int64) for start in range(0, len(ids), size)]
    found = [document.tolist() for document in Cutter(Vocabulary(257, END, frozenset([255, END]))).cut(stretches, "")]
    assert [id for document in found for id in document] == (ids[1:] if ids[0] == END else ids)


def test_the_rule_is_told_for_each_file(tmp_path: Path) -> None:
    raw = struct.pack(f"<{len(STREAM)}H", *STREAM)
    assert stored(tmp_path / "a.bin", raw)[1] == ["a document ends with id 256"]
    assert stored(tmp_path / "b.npy", npy(np.array(A)))[1] == ["one document a file"]
    assert stored(tmp_path / "c.pt", pt([torch.tensor(A)]))[1] == ["a record is a document"]


@pytest.mark.parametrize(("name", "where"), [
    ("a.npy", "token 5"), ("a.bin", "token 5"), ("a.pt", "record 2, token 2"), ("a.pkl", "record 2, token 2"),
])  # fmt: skip
def test_an_id_beyond_the_vocabulary_is_refused_with_its_place(tmp_path: Path, name: str, where: str) -> None:
    ids = [[1, 2, 3], [4, 257]]
    flat = [id for document in ids for id in document]
    content = {
        "a.npy": npy(np.array(flat, dtype=np.uint64)), "a.bin": struct.pack("<5H", *flat), "a.pkl": pickle.dumps(ids),
        "a.pt": pt([torch.tensor(item) for item in ids]),
    }[name]  # fmt: skip
    with pytest.raises(UserError, match="id 257 is not in the vocabulary") as error:
        stored(tmp_path / name, content)
    assert str(tmp_path / name) in str(error.value.where) and where in str(error.value.where)
    assert "tokenizer=" in str(error.value.fix)


def test_a_negative_id_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="id -100 is not in the vocabulary"):
        stored(tmp_path / "a.npy", npy(np.array([1, -100], dtype=np.int64)))
    with pytest.raises(UserError, match="id 18,446,744,073,709,551,615"):
        stored(tmp_path / "a.npy", npy(np.array([1, 2**64 - 1], dtype=np.uint64)))


def test_a_raw_file_of_four_byte_ids_is_noticed_and_read_when_told(tmp_path: Path) -> None:
    ids = [*range(1, 100), END]
    content = struct.pack("<100I", *ids)
    with pytest.raises(UserError, match="ids of four bytes") as error:
        stored(tmp_path / "a.bin", content)
    assert "raw_ids=uint32" in str(error.value.fix)
    assert stored(tmp_path / "a.bin", content, raw_ids="uint32")[0] == [ids]
    with pytest.raises(UserError, match="breaks off inside a token id"):
        stored(tmp_path / "b.bin", content[:-1])


class Trap:
    """Writes a file when it is unpickled."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, (str(self.path),)


@pytest.mark.parametrize("protocol", [0, 2, 5])
def test_a_pickle_runs_code_only_when_that_was_allowed(tmp_path: Path, protocol: int) -> None:
    content = pickle.dumps([A, Trap(tmp_path / "sprung")], protocol=protocol)
    with pytest.raises(UserError, match=r"wants to run `posix\.mkdir`") as error:
        stored(tmp_path / "a.pkl", content)
    assert "allow_pickle=true" in str(error.value.fix) and not (tmp_path / "sprung").exists()
    (tmp_path / "sprung").rmdir() if (tmp_path / "sprung").exists() else None
    with pytest.raises(UserError, match="a document is a NoneType"):
        stored(tmp_path / "a.pkl", content, allow_pickle=True)
    assert (tmp_path / "sprung").exists()


def test_a_tensor_file_never_runs_code(tmp_path: Path) -> None:
    for how in ({}, {"allow_pickle": True}):
        with pytest.raises(UserError, match="not made of tensors"):
            stored(tmp_path / "a.pt", pt([torch.tensor(A), Trap(tmp_path / "sprung")]), **how)
    assert not (tmp_path / "sprung").exists()


REFUSED = [
    ("a.npy", npy(np.array([[1], "x"], dtype=object)), "type object"),
    ("a.npy", npy(np.array([1.5])), "type float64"),
    ("a.npy", npy(np.zeros((2, 2, 2), dtype=np.int64)), "3 dimensions"),
    ("a.npy", npy(np.asfortranarray(np.ones((2, 3), dtype=np.int64))), "column by column"),
    ("a.npy", npy(np.arange(9))[:-3], "breaks off"),
    ("a.npy", b"no array", "cannot be read"),
    ("a.npy", npy(np.arange(9)) * 2, "something stands behind the array"),
    ("a.npy.gz", gzip.compress(npy(np.arange(9)) + b"x"), "something stands behind the array"),
    ("a.pt", pt(torch.tensor(A)) * 2, "bytes stand in front of the tensors"),
    ("a.pt", pt([torch.ones(3, dtype=torch.bfloat16)]), "type float64"),
    ("a.pt", pt(torch.tensor(A))[:-40], "not made of tensors"),
    ("a.pt", pt([[1, "x"]]), "a document is a list"),
    ("a.pt", pt([[1, 2**70]]), "a token id is 1,180,591,620,717,411,303,424"),
    ("a.pt", pt(torch.tensor(A[0]).to_sparse()), "sparse or nested"),
    ("a.pkl", pickle.dumps([[1, -2**65]]), "a token id is -36,893,488,147,419,103,232"),
    ("a.pkl", pickle.dumps([1.5]), "a document is a float"),
    ("a.pkl", pickle.dumps(A)[:-3], "pickle cannot be read"),
]


@pytest.mark.parametrize(("name", "content", "what"), REFUSED, ids=range(len(REFUSED)))
def test_what_holds_no_documents_is_refused(tmp_path: Path, name: str, content: bytes, what: str) -> None:
    with pytest.raises(UserError, match=what) as error:
        stored(tmp_path / name, content)
    assert str(tmp_path / name) in str(error.value.where) and error.value.fix


def test_texts_in_arrays_tensors_files_and_pickles_are_texts(tmp_path: Path) -> None:
    texts = ["one", "zw\u00f6lf"]
    sources = {
        "a.npy": npy(np.array(texts)), "a.pt": pt({"text": texts, "id": [1, 2]}), "a.pkl": pickle.dumps(texts),
        "b.pkl": pickle.dumps([{"text": text, "id": 1} for text in texts]),
    }  # fmt: skip
    for name, content in sources.items():
        (tmp_path / name).write_bytes(content)
        assert [document.text for document in documents(find(tmp_path / name))] == texts


def test_ids_are_no_text_to_learn_a_vocabulary_from(tmp_path: Path) -> None:
    (tmp_path / "a.bin").write_bytes(struct.pack("<3H", *A))
    with pytest.raises(UserError, match="token ids where text is wanted"):
        list(documents(find(tmp_path / "a.bin")))


def test_among_texts_a_file_of_ids_is_left_out_and_that_is_told(tmp_path: Path) -> None:
    (tmp_path / "model.pt").write_bytes(pt(torch.tensor(A)))
    assert [file.path.name for file in find(tmp_path)] == ["model.pt"]
    (tmp_path / "a.txt").write_text("text")
    (tmp_path / "prepared.json").write_text("{}")
    told: list[str] = []
    assert [file.path.name for file in find(tmp_path, told.append)] == ["a.txt"]
    assert len(told) == 1 and "model.pt" in told[0]


def test_a_document_without_end_is_refused_before_memory_is_full(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "LONGEST", 100)
    with pytest.raises(UserError, match="no end within 100 ids"):
        stored(tmp_path / "a.npy", npy(np.ones(200, dtype=np.uint16)))


def test_processes_do_not_change_a_byte_of_a_store_of_ids_and_text(tmp_path: Path) -> None:
    random = np.random.default_rng(0)
    ids = random.integers(0, 257, size=5000)
    np.save(tmp_path / "a.npy", ids)
    (tmp_path / "b.jsonl").write_text("\n".join(json.dumps(f"text {number}") for number in range(50)))
    files = [*find(tmp_path / "a.npy"), *find(tmp_path / "b.jsonl")]
    fingerprints = {
        write_store(
            files, tmp_path, load_bytes, tmp_path / f"{workers}-{size}", workers=workers, batch_bytes=size,
            shard_tokens=700,
        ).fingerprint
        for workers, size in ((0, 2**20), (0, 64), (2, 500))
    }  # fmt: skip
    assert len(fingerprints) == 1
    assert ByteTokenizer.end == END
