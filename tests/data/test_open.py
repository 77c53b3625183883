"""Any path -> documents: the same whatever the container, and every fault named by file and line."""

from __future__ import annotations

import bz2
import gzip
import io
import json
import lzma
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow
import pyarrow.ipc
import pytest
import zstandard
from hypothesis import given, settings
from hypothesis import strategies as st
from pyarrow import parquet

from llmtrainer.base.errors import UserError
from llmtrainer.data.compression import SUFFIXES
from llmtrainer.data.document import Document, Reading
from llmtrainer.data.open import documents, find
from llmtrainer.data.readers import json as json_reader

RECORDS = [
    {"id": 1, "text": "plain"},
    {"id": 2, "text": "two\nlines, a \"quote\", a \\ and a ] } { ["},
    {"id": 3, "text": "\u4f60\u597d \U0001f600", "more": {"deep": [1, [2, {"x": None}]]}},
    {"id": 4, "text": ""},
    {"id": 5, "text": "x" * 5000},
]
TEXTS = [str(record["text"]) for record in RECORDS]

MEMBER: dict[str, Callable[[bytes], bytes]] = {
    "": bytes, ".gz": gzip.compress, ".zst": zstandard.compress, ".xz": lzma.compress, ".bz2": bz2.compress
}  # fmt: skip
PACK: dict[str, Callable[[bytes], bytes]] = {
    suffix: lambda content, member=member: member(content[:50]) + member(content[50:])  # type: ignore[misc]
    for suffix, member in MEMBER.items()
}
"""Two members or frames each: what `cat a.gz b.gz` makes is a legal file."""


def table() -> bytes:
    sink = io.BytesIO()
    parquet.write_table(pyarrow.table({"id": [1, 2, 3, 4, 5], "text": TEXTS}), sink, row_group_size=2)
    return sink.getvalue()


def stream_of_table() -> bytes:
    sink = io.BytesIO()
    whole = pyarrow.table({"text": TEXTS})
    with pyarrow.ipc.new_stream(sink, whole.schema) as stream:
        stream.write_table(whole)
    return sink.getvalue()


CONTENT: dict[str, bytes] = {
    "lines.jsonl": "\n".join(json.dumps(record, ensure_ascii=False) for record in RECORDS).encode(),
    "blank.ndjson": "\n\n".join(json.dumps(record) for record in RECORDS).encode() + b"\r\n\n",
    "array.json": json.dumps(RECORDS).encode(),
    "pretty.json": json.dumps(RECORDS, indent=2, ensure_ascii=False).encode(),
    "values.json": "\n".join(json.dumps(record, indent=1) for record in RECORDS).encode(),
    "marked.json": b"\xef\xbb\xbf" + json.dumps(RECORDS).encode(),
    "marked.jsonl": b"\xef\xbb\xbf" + b"\n".join(json.dumps(record).encode() for record in RECORDS),
    "strings.json": json.dumps(TEXTS).encode(),
    "table.parquet": table(),
}


def read(path: Path, **how: Any) -> list[Document]:
    return list(documents(find(path), **how))


def write(path: Path, content: bytes | str) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return path


@pytest.mark.parametrize("packed", ["", *SUFFIXES])
@pytest.mark.parametrize("name", CONTENT)
def test_every_container_holds_the_same_documents(tmp_path: Path, name: str, packed: str) -> None:
    found = read(write(tmp_path / (name + packed), PACK[packed](CONTENT[name])))
    assert [document.text for document in found] == TEXTS
    assert [document.record for document in found] == [1, 2, 3, 4, 5]
    assert [document.bytes for document in found] == [len(text.encode()) for text in TEXTS]
    assert {document.file.name for document in found} == {name + packed}


def test_a_document_knows_its_line(tmp_path: Path) -> None:
    lines = {"lines.jsonl": [1, 2, 3, 4, 5], "blank.ndjson": [1, 3, 5, 7, 9], "pretty.json": [2, 6, 10, 25, 29]}
    for name, expected in lines.items():
        content = CONTENT[name]
        path = write(tmp_path / name, content)
        assert [document.line for document in read(path)] == expected
        if name == "pretty.json":
            starts = [number for number, line in enumerate(content.splitlines(), 1) if line == b"  {"]
            assert starts == expected
    assert {document.line for document in read(write(tmp_path / "t.parquet", table()))} == {None}


@pytest.mark.parametrize("packed", ["", *SUFFIXES])
def test_a_text_file_is_one_document_byte_for_byte(tmp_path: Path, packed: str) -> None:
    text = "def f():\r\n\treturn '\u4f60'\n" * 10
    (found,) = read(write(tmp_path / ("code.py" + packed), PACK[packed](text.encode())))
    assert found == Document(text, tmp_path / ("code.py" + packed), 1, 1, len(text.encode()))


values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(), inner, max_size=4), max_leaves=12,
)  # fmt: skip


@settings(max_examples=150, deadline=None)
@given(records=st.lists(values, max_size=6), block=st.integers(1, 40), indent=st.sampled_from([None, 0, 3]),
       ascii_only=st.booleans())  # fmt: skip
def test_an_array_in_blocks_equals_the_array_at_once(
    records: list[Any], block: int, indent: int | None, ascii_only: bool
) -> None:
    content = json.dumps(records, indent=indent, ensure_ascii=ascii_only).encode(errors="surrogatepass")
    if b"\xed" in content:    # half a character, which no UTF-8 file holds
        return
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(json_reader, "_BLOCK", block)
        stream = json_reader._Values(io.BytesIO(content), Path("a.json"), Reading())
        assert [value for value, _ in stream.records()] == records


BAD: list[tuple[str, bytes, str, str]] = [
    ("a.jsonl", b'{"text": "a"}\n{"text": }\n{"text": "c"}\n', "no JSON", "line 2"),
    ("a.jsonl", b'{"text": "a"}\n[1, 2]\n', "text is a list", "line 2"),
    ("a.jsonl", b'{"text": "a"}\n\n{"words": 1, "id": 2}\n', "no field `text` or `content`", "line 3"),
    ("a.jsonl", b'{"text": "a"}\n{"text": null}\n', "text is null", "line 2, field `text`"),
    ("a.jsonl", b'{"text": "a"}\n{"text": "\xff"}\n', "no UTF-8", "line 2, byte 24"),
    ("a.jsonl", b'{"text": "\\ud83d"}\n', "half a character", "line 1"),
    ("a.jsonl", b'{"text": "a"} {"text": "b"}\n', "no JSON", "line 1"),
    ("a.json", b'[{"text": "a"},\n{"text": "b"\n}\n{"text": "c"}]', "no JSON", "line 4"),
    ("a.json", b'[{"text": "a"},\n\n,{"text": "b"}]', "no JSON", "line 3"),
    ("a.json", b'[{"text": "a"},\n]', "no JSON", "line 2"),
    ("a.json", b'[{"text": "a\nb"}]', "no JSON", "line 1"),
    ("a.json", b'[{"text": "a"}]\n[{"text": "b"}]', "no JSON", "line 2"),
    ("a.json", b'[{"text": "a"},\n{"text": "b"]}]', "no JSON", "line 2"),
    ("a.json", b'[{"text": "a"},\n}]', "no JSON", "line 2"),
    ("a.json", b'{"text": "a"}\n]', "no JSON", "line 2"),
    ("a.json", b'[{"text": "a"},\n{"text": "\xe4\xbd"}]', "no UTF-8", "line 2, byte 26"),
    ("a.json", b'[{"text": "a"},\n{\n"text": 1}]', "a number", "line 2"),
    ("a.json", b"[" + b'{"text":' * 9_000 + b"1" + b"}" * 9_000 + b"]", "no JSON", "line 1"),
    ("a.txt", b"fine\nnot\xe9 fine", "no UTF-8", "line 2, byte 8"),
    ("a.txt.gz", gzip.compress(b"fine\nnot\xe9 fine"), "no UTF-8", "line 2, byte 8"),
    ("a.parquet", b"PAR1 and nothing else", "table cannot be read", "a.parquet"),
    ("a.parquet", table()[:-30], "table cannot be read", "a.parquet"),
    ("a.arrow", stream_of_table() * 2, "something stands behind the table", "a.arrow"),
    ("a.jsonl.gz", b"this is no gzip", "damaged", "a.jsonl.gz"),
    ("a.jsonl.zst", b"this is no zstd", "damaged", "a.jsonl.zst"),
    ("a.jsonl.xz", b"this is no xz at all", "damaged", "a.jsonl.xz"),
    ("a.jsonl.bz2", b"this is no bz2 at all", "damaged", "a.jsonl.bz2"),
    ("a.jsonl.gz", gzip.compress(b'"a"\n') + b"and more", "damaged", "a.jsonl.gz"),
    ("a.jsonl.zst", zstandard.compress(b'"a"\n') + b"and more", "damaged", "a.jsonl.zst"),
    ("a.jsonl.xz", lzma.compress(b'"a"\n') + b"and some more", "damaged", "a.jsonl.xz"),
    ("a.jsonl.bz2", bz2.compress(b'"a"\n') + b"and more", "damaged", "a.jsonl.bz2"),
    ("a.jsonl.gz", b"", "breaks off", "a.jsonl.gz"),
]


@pytest.mark.parametrize(("name", "content", "what", "where"), BAD, ids=range(len(BAD)))
def test_a_fault_is_named_by_file_and_line(tmp_path: Path, name: str, content: bytes, what: str, where: str) -> None:
    with pytest.raises(UserError, match=what) as error:
        read(write(tmp_path / name, content))
    assert str(tmp_path / name) in str(error.value.where) and where in str(error.value.where)
    assert error.value.fix
    with pytest.raises(UserError) if "breaks off" not in what else pytest.MonkeyPatch.context():
        read(tmp_path / name, allow_truncated=True)    # forgives an early end, nothing else


@pytest.mark.parametrize("packed", ["", *SUFFIXES])
@pytest.mark.parametrize("name", ["lines.jsonl", "array.json"])
def test_a_file_that_breaks_off_is_refused_or_read_to_its_last_whole_record(
    tmp_path: Path, name: str, packed: str
) -> None:
    noise = os.urandom(2500).hex()    # a text that cannot be packed to nothing, so that cuts fall inside it
    texts = [*TEXTS[:-1], noise]
    content = PACK[packed](CONTENT[name].replace(b"x" * 5000, noise.encode()))
    # The first bytes of a second member are where a library may take a cut for an end, or for rubbish.
    seam = len(MEMBER[packed](CONTENT[name][:50]))
    seams = range(len(content) - seam - 6, len(content) - seam) if packed else ()
    for cut in {*range(1, 40), *range(40, len(content), 127), *range(len(content) - 250, len(content), 3),
                *seams}:
        path = write(tmp_path / (name + packed), content[: len(content) - cut])
        warned: list[str] = []
        found = read(path, allow_truncated=True, warn=warned.append)
        assert [document.text for document in found] == texts[: len(found)]
        try:
            strict = read(path)
        except UserError as error:
            assert str(path) in str(error.where) and "allow_truncated=true" in str(error.fix)
            assert len(warned) == 1 and str(path) in warned[0]
        else:    # cut behind a whole line: nobody can know
            assert not packed and name == "lines.jsonl" and strict == found and not warned


def test_a_truncated_last_line_is_reported_by_its_number(tmp_path: Path) -> None:
    path = write(tmp_path / "a.jsonl", b'{"text": "a"}\n{"text": "b"}\n{"text": "c')
    with pytest.raises(UserError, match="last line breaks off") as error:
        read(path)
    assert error.value.where == f"{path}, line 3"
    cut_in_character = write(tmp_path / "b.jsonl", '{"text": "a"}\n{"text": "\u4f60'.encode()[:-1])
    with pytest.raises(UserError, match="last line breaks off"):
        read(cut_in_character)


def test_a_record_without_end_is_refused_before_memory_is_full(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(json_reader, "LONGEST", 1000)
    monkeypatch.setattr(json_reader, "_BLOCK", 100)
    for name, content in (("a.jsonl", b'{"text": "' + b"x" * 5000), ("a.json", b'[{"text": "' + b"x" * 5000)):
        with pytest.raises(UserError, match="no end within"):
            read(write(tmp_path / name, content))


def test_the_field_is_the_first_that_a_record_has(tmp_path: Path) -> None:
    path = write(tmp_path / "a.jsonl", b'{"content": "b", "text": "a"}\n{"content": "c"}\n"bare"\n')
    assert [document.text for document in read(path)] == ["a", "c", "bare"]
    assert [document.text for document in read(path, fields=("content",))] == ["b", "c", "bare"]
    with pytest.raises(UserError, match="no field `body`") as error:
        read(path, fields=("body",))
    assert "it has: `content`, `text`" in str(error.value.why)


def test_a_table_without_the_column_names_those_it_has(tmp_path: Path) -> None:
    path = write(tmp_path / "a.parquet", table())
    with pytest.raises(UserError, match="no field `body`") as error:
        read(path, fields=("body",))
    assert "`id`, `text`" in str(error.value.why)
    with pytest.raises(UserError, match="text is a number") as error:
        read(path, fields=("id",))
    assert "record 1" in str(error.value.where)


def test_foreign_bytes_are_replaced_only_when_asked(tmp_path: Path) -> None:
    path = write(tmp_path / "a.txt", b"caf\xe9")
    (found,) = read(path, errors="replace")
    assert found.text == "caf\ufffd" and found.bytes == 6


def test_a_folder_is_read_in_the_order_of_names(tmp_path: Path) -> None:
    for name in ("b/2.txt", "b/10.txt", "a.txt", "a/z.md", "B.txt", ".hidden.txt", ".git/x.txt", "c.bin", "d"):
        write(tmp_path / "data" / name, name)
    os.symlink(tmp_path / "data", tmp_path / "data" / "b" / "loop")
    warned: list[str] = []
    found = find(tmp_path / "data", warned.append)
    names = [file.path.relative_to(tmp_path / "data").as_posix() for file in found]
    assert names == ["B.txt", "a/z.md", "a.txt", "b/2.txt", "b/10.txt"]
    assert [file.bytes for file in found] == [len(name) for name in names]
    assert len(warned) == 1 and "2 files" in warned[0] and "c.bin" in warned[0]


def test_a_pattern_names_files(tmp_path: Path) -> None:
    for name in ("a/1.jsonl.gz", "a/2.jsonl.gz", "b/1.jsonl.gz", "a/1.txt"):
        write(tmp_path / name, gzip.compress(b'"x"'))
    assert [file.path.as_posix() for file in find(f"{tmp_path}/a/*.gz")] == [
        f"{tmp_path}/a/1.jsonl.gz", f"{tmp_path}/a/2.jsonl.gz"
    ]  # fmt: skip
    assert len(find(f"{tmp_path}/**/*.gz")) == 3
    assert len(find(write(tmp_path / "odd[1].txt", "x"))) == 1, "a name that exists is no pattern"


def test_a_path_that_is_not_there_suggests_its_neighbour(tmp_path: Path) -> None:
    write(tmp_path / "corpus.jsonl", b'"x"')
    with pytest.raises(UserError, match="no file or folder") as error:
        find(tmp_path / "corpu.jsonl")
    assert "corpus.jsonl" in str(error.value.fix)
    with pytest.raises(UserError, match="no file or folder"):
        find(tmp_path / "nowhere" / "x.txt")
    with pytest.raises(UserError, match="no documents in"):
        find(f"{tmp_path}/*.txt")
    (tmp_path / "empty").mkdir()
    with pytest.raises(UserError, match="no documents in"):
        find(tmp_path / "empty")
    with pytest.raises(UserError, match="no reader") as error:
        find(write(tmp_path / "a.jsnl", b""))
    assert "jsonl" in str(error.value.fix)


def test_a_file_that_vanished_or_may_not_be_read_is_the_users_to_mend(tmp_path: Path) -> None:
    files = find(write(tmp_path / "a.txt", b"x"))
    (tmp_path / "a.txt").unlink()
    with pytest.raises(UserError, match="no file"):
        list(documents(files))
