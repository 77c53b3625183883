"""Megatron-LM's pairs: what we write an independent reader reads, and what an independent writer wrote we read."""

from __future__ import annotations

import gzip
import struct
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest

from llmtrainer.base.errors import UserError
from llmtrainer.data import megatron
from llmtrainer.data.encode import write_store
from llmtrainer.data.open import find
from llmtrainer.data.packed import Store
from tests.data.test_open import PACK
from tests.data.worlds import END, load_bytes, make_store

CODES = {1: "B", 2: "b", 3: "h", 4: "i", 5: "q", 8: "H"}


def read_pair(prefix: Path) -> tuple[list[tuple[int, ...]], list[int]]:
    """(sequences, document borders) by the published layout, number by number."""
    index, content = prefix.with_suffix(".idx").read_bytes(), prefix.with_suffix(".bin").read_bytes()
    assert index[:9] == b"MMIDIDX\x00\x00" and struct.unpack("<Q", index[9:17]) == (1,)
    code, sequences, borders = index[17], *struct.unpack("<QQ", index[18:34])
    at = 34
    lengths = struct.unpack_from(f"<{sequences}i", index, at)
    places = struct.unpack_from(f"<{sequences}q", index, at := at + 4 * sequences)
    documents = struct.unpack_from(f"<{borders}q", index, at := at + 8 * sequences)
    assert len(index) == at + 8 * borders
    letter = CODES[code]
    places_of = zip(lengths, places, strict=True)
    return [struct.unpack_from(f"<{length}{letter}", content, at) for length, at in places_of], list(documents)


def write_pair(prefix: Path, documents: Sequence[Sequence[Sequence[int]]], code: int, modes: bool = False) -> Path:
    """Documents of sequences, as Megatron-LM's own builder lays them out."""
    sequences = [sequence for document in documents for sequence in document]
    letter = CODES[code]
    size = struct.calcsize(letter)
    lengths = [len(sequence) for sequence in sequences]
    places = [size * sum(lengths[:number]) for number in range(len(lengths))]
    borders = [sum(len(document) for document in documents[:number]) for number in range(len(documents) + 1)]
    prefix.with_suffix(".bin").write_bytes(
        b"".join(struct.pack(f"<{len(sequence)}{letter}", *sequence) for sequence in sequences)
    )
    prefix.with_suffix(".idx").write_bytes(
        b"MMIDIDX\x00\x00" + struct.pack("<QBQQ", 1, code, len(lengths), len(borders))
        + struct.pack(f"<{len(lengths)}i", *lengths) + struct.pack(f"<{len(places)}q", *places)
        + struct.pack(f"<{len(borders)}q", *borders) + (b"\0" * len(lengths) if modes else b"")
    )  # fmt: skip
    return prefix


DOCUMENTS = [[[1, 2, 3], [4, END]], [[5]], [[]], [[6, 7], [8], [9, 10, END]]]
STORED = [[1, 2, 3, 4, END], [5, END], [END], [6, 7, 8, 9, 10, END]]


@pytest.mark.parametrize("modes", [False, True])
@pytest.mark.parametrize("code", [3, 4, 5, 8])
def test_a_pair_becomes_a_store_with_its_documents(tmp_path: Path, code: int, modes: bool) -> None:
    (tmp_path / "pair").mkdir()
    prefix = write_pair(tmp_path / "pair" / "text_document", DOCUMENTS, code, modes)
    for number, name in enumerate([prefix, prefix.with_suffix(".bin"), prefix.with_suffix(".idx"), prefix.parent]):
        files = find(name)
        assert sorted(file.path.name for file in files) == ["text_document.bin", "text_document.idx"]
        told: list[str] = []
        store = write_store(
            files, tmp_path, load_bytes, tmp_path / "out" / str(number),
            tell=lambda rule, path, told=told: told.append(rule),
        )
        assert told == ["documents are as the .idx says"]
        assert [store.read(document).tolist() for document in range(store.documents)] == STORED


SPELLED = [
    (".bin.gz", ".idx.gz"), (".bin.zst", ".idx.zst"), (".bin", ".idx.xz"), (".bin.bz2", ".idx"), (".BIN", ".IDX"),
    (".BIN", ".idx"), (".bin", ".IDX"), (".BIN.gz", ".IDX.gz"),
]  # fmt: skip


@pytest.mark.parametrize("endings", SPELLED, ids=" ".join)
def test_a_pair_is_known_packed_and_in_capitals(tmp_path: Path, endings: tuple[str, str]) -> None:
    prefix, folder = write_pair(tmp_path / "p", DOCUMENTS, 8), tmp_path / "pair"
    folder.mkdir()
    for ending in endings:
        plain = prefix.with_suffix(ending[:4].lower()).read_bytes()
        (folder / f"corpus.v1{ending}").write_bytes(PACK[ending[4:].lower()](plain))
    names = [folder, folder / f"corpus.v1{endings[0]}", folder / f"corpus.v1{endings[1]}", folder / "corpus.v1"]
    for number, name in enumerate(names):
        files = find(name)
        assert [file.path.name for file in files] == [f"corpus.v1{ending}" for ending in endings]
        store = write_store(files, tmp_path, load_bytes, tmp_path / "out" / str(number))
        assert [store.read(document).tolist() for document in range(store.documents)] == STORED


def test_a_pair_whose_files_would_miss_each_other_is_refused(tmp_path: Path) -> None:
    prefix = write_pair(tmp_path / "p", DOCUMENTS, 8)
    (tmp_path / "p.idx.GZ").write_bytes(gzip.compress(prefix.with_suffix(".idx").read_bytes()))
    prefix.with_suffix(".idx").unlink()
    for path in (tmp_path, tmp_path / "p.idx.GZ"):
        with pytest.raises(UserError, match="not named alike"):
            find(path)


def test_a_packed_index_that_is_cut_or_damaged_is_refused_by_its_own_name(tmp_path: Path) -> None:
    prefix = write_pair(tmp_path / "p", DOCUMENTS, 8)
    packed = gzip.compress(prefix.with_suffix(".idx").read_bytes())
    prefix.with_suffix(".idx").unlink()
    for content, what in ((packed[:-9], "dataset cannot be read"), (b"no gzip", "damaged"), (b"", "cannot be read")):
        (tmp_path / "p.idx.gz").write_bytes(content)
        for lenient in (False, True):    # half an index says nothing of any document
            with pytest.raises(UserError, match=what) as error:
                write_store(find(prefix), tmp_path, load_bytes, tmp_path / "out", allow_truncated=lenient)
            assert "p.idx.gz" in str(error.value.where)


@pytest.mark.parametrize("vocabulary", [1000, 70_000])
def test_what_is_written_an_independent_reader_reads(
    tmp_path: Path, vocabulary: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(megatron, "_BLOCK", 7)    # several blocks of everything, with odd borders
    random = np.random.default_rng(0)
    documents = [
        [*random.integers(1, vocabulary, size=random.integers(0, 40)).tolist(), 0] for _ in range(60)
    ]
    store = make_store(tmp_path / "store", documents, vocabulary=vocabulary, shard_tokens=100)
    megatron.write_pair(store, tmp_path / "pair")
    assert read_pair(tmp_path / "pair") == ([tuple(document) for document in documents], list(range(61)))
    assert tmp_path.joinpath("pair.idx").read_bytes()[17] == (8 if vocabulary == 1000 else 4)


def test_a_store_comes_back_from_its_pair(tmp_path: Path) -> None:
    documents = [[*range(1, length), END] for length in (5, 1, 40, 17)]
    store = make_store(tmp_path / "store", documents, vocabulary=257, shard_tokens=20)
    (tmp_path / "pair").mkdir()
    megatron.write_pair(store, tmp_path / "pair" / "tokens")
    again = write_store(find(tmp_path / "pair"), tmp_path, load_bytes, tmp_path / "again")
    assert [again.read(number).tolist() for number in range(4)] == documents
    assert isinstance(again, Store)



def test_a_pair_that_does_not_fit_together_is_refused(tmp_path: Path) -> None:
    prefix = write_pair(tmp_path / "p", DOCUMENTS, 8)
    whole_index, whole_bin = prefix.with_suffix(".idx").read_bytes(), prefix.with_suffix(".bin").read_bytes()
    cases = {
        "no index": (b"MMXDIDX\0\0" + whole_index[9:], whole_bin, "first bytes"),
        "version": (whole_index[:9] + struct.pack("<Q", 2) + whole_index[17:], whole_bin, "version 2"),
        "fractions": (whole_index[:17] + b"\x07" + whole_index[18:], whole_bin, "numbered 7"),
        "cut index": (whole_index[:-5], whole_bin, "its counts make"),
        "cut bin": (whole_index, whole_bin[:-2], "there are less"),
        "longer bin": (whole_index, whole_bin + b"\0\0", "there are more"),
        "lengths": (whole_index[:34] + struct.pack("<i", 2) + whole_index[38:], whole_bin, "one behind the other"),
        "borders": (whole_index[:-8] + struct.pack("<q", 9), whole_bin, "do not cover"),
    }
    for index, content, why in cases.values():
        prefix.with_suffix(".idx").write_bytes(index)
        prefix.with_suffix(".bin").write_bytes(content)
        with pytest.raises(UserError, match="indexed dataset cannot be read") as error:
            write_store(find(prefix), tmp_path, load_bytes, tmp_path / "out")
        assert why in str(error.value.why) and str(tmp_path / "p") in str(error.value.where)
    prefix.with_suffix(".bin").unlink()
    with pytest.raises(UserError, match=r"an \.idx without its \.bin"):
        find(prefix.with_suffix(".idx"))
