"""Files behind an address: the same documents as from the disk, known by what their server says of them."""

from __future__ import annotations

import gzip
import hashlib
import io
import json
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import fsspec
import pyarrow
import pytest
from pyarrow import parquet

from llmtrainer.base.errors import UserError
from llmtrainer.data.document import SourceFile
from llmtrainer.data.encode import write_store
from llmtrainer.data.open import documents, find
from llmtrainer.data.remote import RemoteFile, remote_facts
from tests.data.test_megatron import DOCUMENTS, STORED, write_pair
from tests.data.worlds import load_bytes

TEXTS = [f"text {number}, \u4f60\u597d" for number in range(200)]
LINES = "\n".join(json.dumps({"text": text}) for text in TEXTS).encode()


def table() -> bytes:
    sink = io.BytesIO()
    parquet.write_table(pyarrow.table({"text": TEXTS, "other": list(range(200))}), sink)
    return sink.getvalue()


FILES = {
    "a.jsonl": LINES, "b.jsonl.gz": gzip.compress(LINES), "c.parquet": table(), "d.parquet.gz": gzip.compress(table())
}  # fmt: skip


@pytest.fixture
def memory() -> Iterator[Any]:
    system = fsspec.filesystem("memory")
    system.store.clear()
    yield system
    system.store.clear()


class Server(BaseHTTPRequestHandler):
    """Serves `files`; parts of them where `parts` is true; with ETags where `tags` is."""

    files: dict[str, bytes]
    parts = tags = True
    asked: list[str]

    def do_HEAD(self) -> None:
        self.answer(body=False)

    def do_GET(self) -> None:
        self.answer(body=True)

    def answer(self, body: bool) -> None:
        content = self.files.get(self.path.partition("?")[0].lstrip("/"))
        self.asked.append(f"{self.command} {self.path} {self.headers.get('Range', '')}")
        if content is None:
            self.send_error(404)
            return
        tag = hashlib.md5(content).hexdigest()
        span = self.headers.get("Range") if self.parts else None
        total, status = len(content), 200
        if span:
            start, _, stop = span.removeprefix("bytes=").partition("-")
            first, last = int(start), min(int(stop or total - 1), total - 1)
            content, status = content[first : last + 1], 206
        self.send_response(status)
        self.send_header("Content-Length", str(len(content)))
        if span:
            self.send_header("Content-Range", f"bytes {first}-{last}/{total}")
        if self.parts:
            self.send_header("Accept-Ranges", "bytes")
        if self.tags:
            self.send_header("ETag", f'"{tag}"')
        self.end_headers()
        if body and self.command == "GET":
            self.wfile.write(content)

    def log_message(self, *words: object) -> None:
        pass


@pytest.fixture
def server() -> Iterator[tuple[str, type[Server]]]:
    handler = type("Handler", (Server,), {"files": dict(FILES), "asked": []})
    httpd = ThreadingHTTPServer(("127.0.0.1", 0), handler)
    thread = threading.Thread(target=httpd.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    yield f"http://127.0.0.1:{httpd.server_address[1]}", handler
    httpd.shutdown()
    thread.join()
    httpd.server_close()


def texts(files: list[SourceFile]) -> list[str]:
    return [document.text for document in documents(files)]


def test_a_folder_a_pattern_and_a_file_behind_an_address_are_found_in_order(memory: Any) -> None:
    for part in (2, 10, 1):
        memory.pipe(f"/corpus/part-{part}.jsonl", json.dumps(str(part)).encode())
    memory.pipe("/corpus/readme.unknown", b"x")
    for address in ("memory://corpus", "memory://corpus/", "memory://corpus/*.jsonl"):
        files = find(address)
        assert [str(file.path) for file in files] == [f"memory:///corpus/part-{part}.jsonl" for part in (1, 2, 10)]
        assert texts(files) == ["1", "2", "10"] and [file.bytes for file in files] == [3, 3, 4]
    with pytest.raises(UserError, match=r"no file `memory://corpus/part-3\.jsonl`"):
        find("memory://corpus/part-3.jsonl")
    with pytest.raises(UserError, match="no documents in"):
        find("memory://corpus/*.parquet")


def test_a_name_with_signs_of_a_pattern_is_read_as_it_stands(memory: Any) -> None:
    memory.pipe("/signs/a[1].jsonl", b'{"text": "one"}\n')
    memory.pipe("/signs/a1.jsonl", b'{"text": "two"}\n')
    assert texts(find("memory://signs/a[1].jsonl")) == ["one"]
    assert texts(find("memory://signs/a[0-9].jsonl")) == ["two"]


@pytest.mark.parametrize("name", FILES)
def test_every_format_streams_from_memory(memory: Any, name: str) -> None:
    memory.pipe(f"/x/{name}", FILES[name])
    assert texts(find(f"memory://x/{name}")) == TEXTS


@pytest.mark.parametrize("parts", [True, False])
@pytest.mark.parametrize("name", FILES)
def test_every_format_streams_over_http(server: tuple[str, type[Server]], name: str, parts: bool) -> None:
    address, handler = server
    handler.parts = parts
    found = find(f"{address}/{name}?token=1")
    assert texts(found) == TEXTS
    if parts:
        assert found[0].bytes == len(FILES[name])


def test_a_fault_names_address_and_line(memory: Any) -> None:
    memory.pipe("/x/a.jsonl", b'"a"\n{"words": 1}\n')
    with pytest.raises(UserError, match="no field `text`") as error:
        texts(find("memory://x/a.jsonl"))
    assert "memory://" in str(error.value.where) and "line 2" in str(error.value.where)


def test_the_manifest_says_what_the_server_vouches_for_or_a_hash(
    memory: Any, server: tuple[str, type[Server]], tmp_path: Path
) -> None:
    address, handler = server
    memory.pipe("/x/a.jsonl", LINES)
    files = [*find("memory://x/a.jsonl"), *find(f"{address}/a.jsonl")]
    store = write_store(files, tmp_path, load_bytes, tmp_path / "store")
    first, second = store.manifest["sources"]
    assert first["bytes"] == second["bytes"] == len(LINES)
    assert first["sha256"] == hashlib.sha256(LINES).hexdigest(), "memory has no identity, so it was hashed"
    assert second["identity"] == "etag:" + hashlib.md5(LINES).hexdigest()
    again = write_store(files, tmp_path, load_bytes, tmp_path / "store")
    assert again.fingerprint == store.fingerprint
    handler.files["a.jsonl"] = b'"changed"\n'
    with pytest.raises(UserError, match="something else"):
        write_store([*files[:1], *find(f"{address}/a.jsonl")], tmp_path, load_bytes, tmp_path / "store")


def test_a_remote_file_that_changes_while_it_is_read_is_noticed(
    server: tuple[str, type[Server]], tmp_path: Path
) -> None:
    address, handler = server
    files = find(f"{address}/a.jsonl")

    def change(count: int) -> None:
        handler.files["a.jsonl"] = LINES + b"\n"

    with pytest.raises(UserError, match="changed while it was read"):
        write_store(files, tmp_path, load_bytes, tmp_path / "store", batch_bytes=100, report=change)


def test_only_what_is_read_is_fetched_of_a_table(server: tuple[str, type[Server]]) -> None:
    address, handler = server
    sink = io.BytesIO()
    noise = [hashlib.sha512(str(number).encode()).hexdigest() * 8 for number in range(30_000)]
    parquet.write_table(pyarrow.table({"other": noise, "text": ["x"] * 30_000}), sink, compression="none")
    handler.files["big.parquet"] = sink.getvalue()
    assert len(sink.getvalue()) > 25_000_000 and len(texts(find(f"{address}/big.parquet"))) == 30_000
    fetched = 0
    for line in handler.asked:
        if line.startswith("GET") and "bytes=" in line:
            start, _, stop = line.partition("bytes=")[2].partition("-")
            fetched += int(stop) - int(start) + 1
    assert 0 < fetched < len(sink.getvalue()) * 0.7


def test_of_a_folder_behind_an_address_only_what_a_local_one_gives_is_read(memory: Any, tmp_path: Path) -> None:
    files = {
        "a.jsonl": b'{"text": "a"}', ".hidden.jsonl": b'{"text": "hidden"}', ".git/b.jsonl": b'{"text": "b"}',
        "prepared.json": b'{"text": "receipt"}', "pytorch_model.bin": bytes(range(40)),
    }  # fmt: skip
    for name, content in files.items():
        memory.pipe(f"/mix/{name}", content)
        (tmp_path / "mix" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "mix" / name).write_bytes(content)
    for address in ("memory://mix", str(tmp_path / "mix")):
        told: list[str] = []
        assert [file.path.name for file in find(address, told.append)] == ["a.jsonl"]
        assert len(told) == 1 and "pytorch_model.bin" in told[0]


def test_megatrons_pair_is_read_from_afar(memory: Any, tmp_path: Path) -> None:
    prefix = write_pair(tmp_path / "pair", DOCUMENTS, 8)
    for suffix in (".bin", ".idx"):
        memory.pipe(f"/m/pair{suffix}", prefix.with_suffix(suffix).read_bytes())
        memory.pipe(f"/packed/PAIR{suffix.upper()}.gz", gzip.compress(prefix.with_suffix(suffix).read_bytes()))
    for address in ("memory://m/pair.bin", "memory://m/pair.idx", "memory://m", "memory://packed/*.BIN.gz"):
        store = write_store(find(address), tmp_path, load_bytes, tmp_path / hashlib.md5(address.encode()).hexdigest())
        assert [store.read(number).tolist() for number in range(store.documents)] == STORED
        assert len(store.manifest["sources"]) == 2


def test_a_protocol_without_its_package_names_the_package(monkeypatch: pytest.MonkeyPatch) -> None:
    def missing(url: str, **how: object) -> None:
        raise ImportError("Install s3fs to access S3")

    monkeypatch.setattr(fsspec.core, "url_to_fs", missing)
    with pytest.raises(UserError, match="`s3://` needs the package `s3fs`") as error:
        find("s3://bucket/corpus/")
    assert error.value.fix == "pip install s3fs"
    monkeypatch.undo()
    with pytest.raises(UserError, match="no protocol `s4://`"):
        find("s4://bucket/corpus/")


@pytest.mark.parametrize(("told", "identity"), [
    ({"size": 5, "ETag": '"abc-2"', "LastModified": "now"}, "etag:abc-2"),
    ({"size": 5, "lfs": {"sha256": "00ff"}, "blob_id": "1"}, "sha256:00ff"),
    ({"size": 5, "lfs": None, "blob_id": "1"}, "blob_id:1"),
    ({"size": 5, "md5Hash": "x=="}, "md5hash:x=="),
    ({"size": 5, "created": 1}, None),
])  # fmt: skip
def test_the_surest_thing_that_a_server_tells_is_taken(
    memory: Any, monkeypatch: pytest.MonkeyPatch, told: dict[str, Any], identity: str | None
) -> None:
    monkeypatch.setattr(type(memory), "info", lambda self, path: told)
    facts = remote_facts(RemoteFile("memory://x/a.jsonl"))
    assert (facts.bytes, facts.identity) == (5, identity)


def test_a_server_that_is_not_there_is_the_users_to_mend() -> None:
    with pytest.raises(UserError) as error:
        find("http://127.0.0.1:9/a.jsonl")
    assert "127.0.0.1:9" in str(error.value)


def test_a_remote_file_has_the_names_that_readers_ask_for() -> None:
    file = RemoteFile("https://host/a/part-1.jsonl.zst?x=1.2/3")
    assert (file.name, file.suffix, file.suffixes) == ("part-1.jsonl.zst", ".zst", [".jsonl", ".zst"])
    assert str(RemoteFile("s3://b.bin/b.bin?x=b.bin").with_name("b.idx")) == "s3://b.bin/b.idx?x=b.bin"
    assert remote_facts.__doc__
