"""The store on disk: what was written is read, whatever the shards; what was changed is refused."""

from __future__ import annotations

import json
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from llmtrainer.base.errors import UserError
from llmtrainer.data import packed
from llmtrainer.data.packed import Store, is_store
from tests.data.worlds import counting, make_store

LENGTHS = [10, 7, 1, 30, 22, 5, 64, 3]


@pytest.fixture(params=[1, 20, 50, 10_000], ids="shards of {}".format)
def store(request: pytest.FixtureRequest, tmp_path: Path) -> Store:
    return make_store(tmp_path / "store", counting(LENGTHS), shard_tokens=request.param)


def test_documents_come_back_as_written(store: Store) -> None:
    assert [store.read(index).tolist() for index in range(store.documents)] == counting(LENGTHS)
    assert [store.length(index) for index in range(store.documents)] == LENGTHS
    assert store.read(3, 4, 9).tolist() == counting(LENGTHS)[3][4:9]


def test_any_span_of_the_stream_crosses_shards_unseen(store: Store) -> None:
    stream = [token for document in counting(LENGTHS) for token in document]
    for start in range(0, len(stream) + 1, 3):
        for stop in range(start, len(stream) + 1, 7):
            assert store.span(start, stop).tolist() == stream[start:stop]


def test_two_bytes_an_id_up_to_65536_ids_and_four_beyond(tmp_path: Path) -> None:
    for vocabulary, size in ((65_536, 2), (65_537, 4)):
        store = make_store(tmp_path / str(vocabulary), [[1, vocabulary - 1]], vocabulary=vocabulary)
        assert store.dtype.itemsize == size
        assert (store.path / "tokens-00000.bin").stat().st_size == 2 * size
        assert store.read(0).tolist() == [1, vocabulary - 1]


def test_the_fingerprint_is_of_the_content_and_not_of_the_place(tmp_path: Path) -> None:
    first = make_store(tmp_path / "a", counting(LENGTHS))
    same = make_store(tmp_path / "b", counting(LENGTHS))
    other_border = make_store(tmp_path / "c", counting([11, 6, *LENGTHS[2:]]))
    assert first.fingerprint == same.fingerprint != other_border.fingerprint


@pytest.mark.parametrize("name", ["tokens-00001.bin", "documents.bin"])
def test_a_file_that_is_missing_cut_or_foreign_is_refused_by_name(tmp_path: Path, name: str) -> None:
    store = make_store(tmp_path / "store", counting(LENGTHS), shard_tokens=20)
    path = store.path / name
    content = path.read_bytes()
    for change in (b"", content[:-1], content + b"\0\0", None):
        path.unlink() if change is None else path.write_bytes(change)
        with pytest.raises(UserError) as error:
            Store(store.path)
        assert name in str(error.value.where) and error.value.fix
    path.write_bytes(content)
    (store.path / "tokens-00099.bin").write_bytes(b"\1\0" * 10)
    with pytest.raises(UserError, match="damaged") as error:
        Store(store.path)
    assert "tokens-00099.bin" in str(error.value.where) and "not in the manifest" in str(error.value.why)


def test_verify_finds_a_flipped_bit(tmp_path: Path) -> None:
    store = make_store(tmp_path / "store", counting(LENGTHS))
    heard: list[int] = []
    store.verify(heard.append)
    assert sum(heard) == sum(file["bytes"] for file in store.manifest["files"].values())
    path = store.path / "tokens-00001.bin"
    content = bytearray(path.read_bytes())
    content[5] ^= 1
    path.write_bytes(content)
    with pytest.raises(UserError) as error:
        Store(store.path).verify()
    assert "tokens-00001.bin" in str(error.value.where)


def test_a_folder_that_is_no_store_or_of_another_version_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no token store") as error:
        Store(tmp_path)
    assert "llmtrainer prepare" in str(error.value.fix) and not is_store(tmp_path)
    store = make_store(tmp_path / "store", counting(LENGTHS))
    assert is_store(store.path)
    manifest = json.loads((store.path / "manifest.json").read_text())
    (store.path / "manifest.json").write_text(json.dumps({**manifest, "version": 99}))
    with pytest.raises(UserError, match="format 99"):
        Store(store.path)
    (store.path / "manifest.json").write_text("{}")
    with pytest.raises(UserError, match="no token store"):
        Store(store.path)


def test_another_tokenizer_is_refused(tmp_path: Path) -> None:
    store = make_store(tmp_path / "store", counting(LENGTHS))
    store.require_tokenizer("none", 1000)
    with pytest.raises(UserError, match="another tokenizer"):
        store.require_tokenizer("other", 1000)


def test_what_was_read_stays_when_more_shards_than_maps_are_used(tmp_path: Path) -> None:
    lengths = [2] * 600
    store = make_store(tmp_path / "store", counting(lengths), vocabulary=2000, shard_tokens=1)
    assert len(list(store.path.glob("tokens-*.bin"))) == 600
    assert store.span(0, 1200).tolist() == list(range(1, 1201))
    assert np.array_equal(store.read(0), [1, 2])


@settings(max_examples=60, deadline=None)
@given(numbers=st.lists(st.integers(0, 30), max_size=40).map(sorted), stride=st.integers(1, 9))
def test_a_number_file_is_searched_as_numpy_would(numbers: list[int], stride: int) -> None:
    array = np.array(numbers, dtype="<i8")
    with TemporaryDirectory() as folder, pytest.MonkeyPatch.context() as patch:
        patch.setattr(packed, "_STRIDE", stride)
        array.tofile(Path(folder) / "numbers.bin")
        file = packed.NumberFile(Path(folder) / "numbers.bin")
        assert len(file) == len(array) and file[:].tolist() == numbers
        assert [int(file[place]) for place in range(-len(array), len(array))] == numbers * 2
        assert file[3:7].tolist() == numbers[3:7] and file[7:3].tolist() == []
        for value in range(-1, 32):
            assert file.searchsorted(value) == np.searchsorted(array, value)
            assert file.searchsorted(value, "right") == np.searchsorted(array, value, side="right")
        with pytest.raises(IndexError):
            file[len(array)]
