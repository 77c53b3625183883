"""Tables of text (.csv, .tsv, .arrow, .feather) and records of several fields: the rows as their writer meant them."""

from __future__ import annotations

import csv
import gzip
import io
import json
from pathlib import Path
from typing import Any

import pyarrow
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pyarrow import feather, ipc

from llmtrainer.base.errors import UserError
from llmtrainer.data.document import Document, Reading
from llmtrainer.data.open import documents, find
from llmtrainer.data.readers.csv import Csv

ROWS = [
    ("1", "plain", "A"),
    ("2", 'two\nlines, a "quote" and a comma', "B"),
    ("3", "\u4f60\u597d\ttab \U0001f600", ""),
    ("4", "x" * 200_000, "D"),
]
NAMES = ["id", "text", "title"]


def table_of(delimiter: str) -> bytes:
    sink = io.StringIO(newline="")
    writer = csv.writer(sink, delimiter=delimiter)
    writer.writerows([NAMES, *ROWS])
    return sink.getvalue().encode()


def arrow_of(kind: str) -> bytes:
    table = pyarrow.table({name: [row[place] for row in ROWS] for place, name in enumerate(NAMES)})
    sink = io.BytesIO()
    if kind == "feather":
        feather.write_feather(table, sink, compression="zstd", chunksize=3)
    else:
        with (ipc.new_stream if kind == "stream" else ipc.new_file)(sink, table.schema) as writer:
            writer.write_table(table, max_chunksize=3)
    return sink.getvalue()


TABLES = {
    "a.csv": table_of(","), "a.tsv": table_of("\t"), "marked.csv": b"\xef\xbb\xbf" + table_of(","),
    "stream.arrow": arrow_of("stream"), "file.arrow": arrow_of("file"), "a.feather": arrow_of("feather"),
}  # fmt: skip


def read(path: Path, content: bytes, **how: Any) -> list[Document]:
    path.write_bytes(content)
    return list(documents(find(path), **how))


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("name", TABLES)
def test_every_table_gives_the_text_of_its_rows(tmp_path: Path, name: str, packed: bool) -> None:
    content = gzip.compress(TABLES[name]) if packed else TABLES[name]
    found = read(tmp_path / (name + ".gz" * packed), content)
    assert [document.text for document in found] == [row[1] for row in ROWS]
    assert [document.record for document in found] == [1, 2, 3, 4]
    lines = [2, 3, 5, 6] if name.endswith("sv") else [None] * 4
    assert [document.line for document in found] == lines, "a newline inside quotes is a line of the file"
    joined = read(tmp_path / (name + ".gz" * packed), content, fields=("title+text",))
    assert [document.text for document in joined] == ["\n".join(part for part in row[:0:-1] if part) for row in ROWS]


@settings(max_examples=60, deadline=None)
@given(rows=st.lists(st.lists(st.text(st.characters(exclude_categories=["Cs"])), min_size=2, max_size=2), max_size=5),
       delimiter=st.sampled_from([",", "\t"]), ending=st.sampled_from(["\n", "\r\n"]))  # fmt: skip
def test_whatever_the_csv_library_writes_is_read_back(rows: list[list[str]], delimiter: str, ending: str) -> None:
    sink = io.StringIO(newline="")
    csv.writer(sink, delimiter=delimiter, lineterminator=ending, quoting=csv.QUOTE_ALL).writerows([["a", "b"], *rows])
    name = "x.tsv" if delimiter == "\t" else "x.csv"
    found = Csv().records(io.BytesIO(sink.getvalue().encode()), Path(name), Reading())
    assert [list(record.values()) for record, _ in found] == rows


BAD_TABLES = [
    ("a.csv", b"id,text\n1,a\n2\n", "does not fit", "line 3"),
    ("a.csv", b"id,text\n1,a\n2,b,c\n", "does not fit", "line 3"),
    ("a.csv", b'id,text\n1,"a"b\n', "does not fit", "line 2"),
    ("a.csv", b'id,text\n1,"a\nb"\n2\n', "does not fit", "line 4"),
    ("a.csv", b'id,text\n1,a\n2,"b\n', "breaks off", "line 3"),
    ("a.csv", b"id,text\n1,a\n2", "breaks off", "line 3"),
    ("a.csv", b"id,text\n1,\xff\n", "no UTF-8", "line 2, byte 10"),
    ("a.csv", b"id;text\n1;a\n", "no field `text` or `content`", "line 2"),
    ("a.csv", b"text,text\n1,a\n", "two columns", "line 1"),
    ("a.arrow", b"no arrow at all, but long enough to be one", "table cannot be read", "a.arrow"),
    ("a.arrow", TABLES["stream.arrow"][:-300], "table cannot be read", "a.arrow"),
    ("a.arrow", TABLES["file.arrow"][:-30], "table cannot be read", "a.arrow"),
]


@pytest.mark.parametrize(("name", "content", "what", "where"), BAD_TABLES, ids=range(len(BAD_TABLES)))
def test_a_fault_in_a_table_is_named_by_file_and_line(
    tmp_path: Path, name: str, content: bytes, what: str, where: str
) -> None:
    with pytest.raises(UserError, match=what) as error:
        read(tmp_path / name, content)
    assert str(tmp_path / name) in str(error.value.where) and where in str(error.value.where)
    assert error.value.fix
    warned: list[str] = []
    if what == "breaks off":
        found = read(tmp_path / name, content, allow_truncated=True, warn=warned.append)
        assert [document.text for document in found] == ["a"] and len(warned) == 1


@pytest.mark.parametrize("name", TABLES)
def test_a_table_without_the_column_names_those_it_has(tmp_path: Path, name: str) -> None:
    with pytest.raises(UserError, match="no field `body`") as error:
        read(tmp_path / name, TABLES[name], fields=("body",))
    assert "`id`, `text`, `title`" in str(error.value.why)


def test_a_table_is_decoded_without_the_columns_that_nobody_asked_for(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[list[int]] = []
    open_stream = ipc.open_stream

    def spy(source: Any, *, options: Any = None) -> Any:
        asked.append(options.included_fields if options else [])
        return open_stream(source, options=options)

    monkeypatch.setattr(ipc, "open_stream", spy)
    read(tmp_path / "a.arrow", TABLES["stream.arrow"], fields=("title",))
    assert asked == [[], [2]], "once for the names, once for the one column"


def test_title_and_content_are_one_text_with_a_newline_between(tmp_path: Path) -> None:
    records = [
        {"gid": 0, "id": 0, "title": "T", "content": "C", "desc": "D", "others": {}},
        {"gid": 1, "id": 1, "title": "", "content": "C2"},
        {"gid": 2, "id": 2, "title": None, "content": "C3\n"},
        {"gid": 3, "id": 3, "content": "C4"},
    ]
    content = "\n".join(map(json.dumps, records)).encode()
    fields = ("title+content", "content")
    found = read(tmp_path / "a.jsonl", content, fields=fields)
    assert [document.text for document in found] == ["T\nC", "C2", "C3\n", "C4"]
    with pytest.raises(UserError, match="no field `title\\+content`") as error:
        read(tmp_path / "a.jsonl", content, fields=("title+content",))
    assert "line 4" in str(error.value.where)
    (first, *_) = read(tmp_path / "a.jsonl", content, fields=("title+desc+content", "content"))
    assert first.text == "T\nD\nC"
    odd = read(tmp_path / "odd.jsonl", b'{"a+b": "x", "a": "y", "b": "z"}', fields=("a+b",))
    assert odd[0].text == "x", "a field that is really called so"
    with pytest.raises(UserError, match="text is a number") as error:
        read(tmp_path / "n.jsonl", b'{"question": "q", "answer": 4}', fields=("question+answer",))
    assert "field `answer`" in str(error.value.where)


def test_numbered_shards_are_one_corpus_in_the_order_of_their_numbers(tmp_path: Path) -> None:
    import zstandard

    lines = [json.dumps({"text": f"line {number}"}) + "\n" for number in range(100)]
    for part in range(10):
        packed = zstandard.compress("".join(lines[10 * part : 10 * part + 10]).encode())
        (tmp_path / f"part-{part + 1}.jsonl.zst").write_bytes(packed)
    for name in (tmp_path, f"{tmp_path}/*.jsonl.zst"):
        files = find(name)
        assert [file.path.name for file in files] == [f"part-{part + 1}.jsonl.zst" for part in range(10)]
        assert [document.text for document in documents(files)] == [f"line {number}" for number in range(100)]
