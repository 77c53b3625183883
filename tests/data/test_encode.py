"""Text -> store: the ids of the documents one by one, whatever the processes, batches, shards and kills."""

from __future__ import annotations

import errno
import hashlib
import json
import os
import select
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from llmtrainer.base.errors import UserError
from llmtrainer.data import shards
from llmtrainer.data.document import SourceFile
from llmtrainer.data.encode import write_store
from llmtrainer.data.open import documents, find
from llmtrainer.data.packed import Store
from llmtrainer.data.shards import locked, partial_of
from tests.data.worlds import END, ByteTokenizer, load_bytes

ROOT = Path(__file__).parents[2]
WORDS = ["alpha ", "beta\n", "\u4f60\u597d", "  if x:\n", "\U0001f600", "gamma. "]


def make_text(folder: Path, files: int = 4, records: int = 25, seed: int = 0) -> Path:
    random = np.random.default_rng(seed)
    folder.mkdir(parents=True)
    for number in range(files):
        lines = [
            json.dumps({"text": "".join(random.choice(WORDS, size=random.integers(0, 40)))}) for _ in range(records)
        ]
        (folder / f"part-{number}.jsonl").write_text("\n".join(lines) + "\n", encoding="utf-8")
    (folder / "plain.txt").write_text("one document, the whole file", encoding="utf-8")
    return folder


def contents(folder: Path) -> dict[str, str]:
    return {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in sorted(folder.iterdir())}


def test_the_store_holds_every_document_and_its_end(tmp_path: Path) -> None:
    files = find(make_text(tmp_path / "text"))
    heard: list[int] = []
    store = write_store(files, tmp_path, load_bytes, tmp_path / "store", shard_tokens=700, report=heard.append)
    texts = [document.text for document in documents(files)]
    assert [store.read(index).tolist() for index in range(store.documents)] == [
        [*text.encode(), END] for text in texts
    ]
    assert sum(heard) == store.text_bytes == sum(len(text.encode()) for text in texts)
    manifest = store.manifest
    assert [source["documents"] for source in manifest["sources"]] == [25, 25, 25, 25, 1]
    for source in manifest["sources"]:
        content = Path(source["path"]).read_bytes()
        assert source["bytes"] == len(content) and source["sha256"] == hashlib.sha256(content).hexdigest()
    assert (manifest["dtype"], manifest["vocabulary"], manifest["end"]) == ("<u2", 257, END)
    assert manifest["tokenizer"] == ByteTokenizer.fingerprint and store.tokens == sum(map(len, texts_ids(texts)))
    assert len(manifest["files"]) > 5, "several shards, or the test proves little"
    store.verify()
    assert {path.name for path in store.path.iterdir()} == {"manifest.json", *manifest["files"]}
    assert store.origin(26) == f"{tmp_path / 'text' / 'part-1.jsonl'}, document 2"


def texts_ids(texts: list[str]) -> list[list[int]]:
    return [[*text.encode(), END] for text in texts]


def load_bytes_with_begin(folder: Path) -> ByteTokenizer:
    tokenizer = ByteTokenizer()
    tokenizer.begin = 255
    return tokenizer


def test_a_document_stands_between_the_begin_and_the_end_of_a_tokenizer_that_has_both(tmp_path: Path) -> None:
    files = find(make_text(tmp_path / "text", files=1, records=5))
    store = write_store(files, tmp_path, load_bytes_with_begin, tmp_path / "store")
    assert [store.read(index).tolist() for index in range(store.documents)] == [
        [255, *document.text.encode(), END] for document in documents(files)
    ]


def test_processes_batches_and_repetition_do_not_change_a_byte(tmp_path: Path) -> None:
    files = find(make_text(tmp_path / "text"))
    for number, (workers, batch_bytes) in enumerate([(0, 2**20), (0, 1), (0, 333), (2, 500)]):
        write_store(
            files, tmp_path, load_bytes, tmp_path / str(number),
            workers=workers, batch_bytes=batch_bytes, shard_tokens=700,
        )  # fmt: skip
    expected = contents(tmp_path / "0")
    assert all(contents(tmp_path / str(number)) == expected for number in range(1, 4))


def test_the_same_store_in_the_same_place_is_left_as_it_is(tmp_path: Path) -> None:
    files = find(make_text(tmp_path / "text"))
    out = tmp_path / "store"
    write_store(files, tmp_path, load_bytes, out)
    before = {path: path.stat().st_mtime_ns for path in out.iterdir()}
    (out / "note.json").write_text("somebody else's")
    assert write_store(files, tmp_path, load_bytes, out).fingerprint == Store(out).fingerprint
    assert {path: path.stat().st_mtime_ns for path in before} == before
    assert not partial_of(out).exists()
    (tmp_path / "text" / "plain.txt").write_text("changed")
    with pytest.raises(UserError, match="something else") as error:
        write_store(find(tmp_path / "text"), tmp_path, load_bytes, out)
    assert error.value.where == str(out) and error.value.fix
    assert {path: path.stat().st_mtime_ns for path in before} == before


def storm(tmp_path: Path, lives: list[list[int]]) -> list[int]:
    """Run each list of lives in a folder of its own; the lines each last life ran."""
    lines = []
    for number, numbers in enumerate(lives):
        (tmp_path / str(number)).mkdir()
        os.symlink(tmp_path / "text", tmp_path / str(number) / "text")
        lines.append(" ".join([str(tmp_path / str(number)), *map(str, numbers)]))
    (tmp_path / "lives").write_text("\n".join(lines))
    done = subprocess.run(
        [sys.executable, "-m", "tests.data.storm", str(tmp_path / "lives")],
        cwd=ROOT, capture_output=True, text=True, timeout=240,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    return [int(line) for line in done.stdout.split()]


def without_paths(folder: Path) -> dict[str, str]:
    """Hashes of a store that was made under another name, so that only names of sources (and the key) differ."""
    manifest = json.loads((folder / "manifest.json").read_text())
    del manifest["key"]
    for source in manifest["sources"]:
        source["path"] = Path(source["path"]).name
    return {**contents(folder), "manifest.json": json.dumps(manifest)}


def test_killed_at_any_line_and_run_again_the_bytes_are_the_same(tmp_path: Path) -> None:
    make_text(tmp_path / "text", files=3, records=10)
    first = tmp_path / "first"
    first.mkdir()
    (total,) = storm(first_text(first, tmp_path), [[]])
    random = np.random.default_rng(0)
    once = [[int(line)] for line in np.linspace(0, total - 1, 60)]
    often = [[int(line) for line in random.integers(0, total, size=6)] for _ in range(8)]
    storms = tmp_path / "storms"
    storms.mkdir()
    ran = storm(first_text(storms, tmp_path), once + often)
    expected = without_paths(first / "0" / "store")
    assert len(expected) > 4, "several shards, or the test proves little"
    for number in range(len(once + often)):
        folder = storms / str(number)
        assert without_paths(folder / "store") == expected
        assert sorted(path.name for path in folder.iterdir()) == ["store", "text"], "nothing is left over"
    assert min(ran) < total / 2, "work that was done is not done again"


def first_text(folder: Path, owner: Path) -> Path:
    os.symlink(owner / "text", folder / "text")
    return folder


class Suicidal(ByteTokenizer):
    """Kills its own process once, when it is a worker and meets the word."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def encode(self, text: str) -> list[int]:
        if "FATAL" in text and (self.folder / "armed").exists():
            (self.folder / "armed").unlink()
            os.kill(os.getpid(), signal.SIGKILL)
        return super().encode(text)


def load_suicidal(folder: Path) -> Suicidal:
    return Suicidal(folder)


def test_a_killed_worker_is_an_error_and_the_next_run_completes(tmp_path: Path) -> None:
    make_text(tmp_path / "text")
    with (tmp_path / "text" / "part-2.jsonl").open("a") as file:
        file.write(json.dumps({"text": "FATAL"}) + "\n")
    files = find(tmp_path / "text")
    settings = {"workers": 2, "batch_bytes": 500, "shard_tokens": 700}
    undisturbed = write_store(files, tmp_path, load_suicidal, tmp_path / "undisturbed", **settings)  # type: ignore[arg-type]
    (tmp_path / "armed").touch()
    with pytest.raises(UserError, match="has died") as error:
        write_store(files, tmp_path, load_suicidal, tmp_path / "store", **settings)  # type: ignore[arg-type]
    assert "run the same command again" in str(error.value.fix)
    assert not (tmp_path / "store").exists() and not (tmp_path / "armed").exists()
    again = write_store(files, tmp_path, load_suicidal, tmp_path / "store", **settings)  # type: ignore[arg-type]
    assert contents(again.path) == contents(undisturbed.path)


class Waiting(ByteTokenizer):
    """Tells a pipe that it works, and then never ends."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def encode(self, text: str) -> list[int]:
        self.pipe = (self.folder / "pipe").open("w")
        self.pipe.write("x")
        self.pipe.flush()
        while True:
            signal.pause()


def load_waiting(folder: Path) -> Waiting:
    return Waiting(folder)


def test_workers_end_when_their_parent_is_killed(tmp_path: Path) -> None:
    make_text(tmp_path / "text")
    os.mkfifo(tmp_path / "pipe")
    pipe = os.open(tmp_path / "pipe", os.O_RDONLY | os.O_NONBLOCK)
    ours = os.open(tmp_path / "pipe", os.O_WRONLY)    # so that the pipe has no end before the workers are there
    program = (
        "from pathlib import Path\nfrom llmtrainer.data.encode import write_store\n"
        "from llmtrainer.data.open import find\nfrom tests.data.test_encode import load_waiting\n"
        "if __name__ == '__main__':\n    here = Path.cwd()\n"
        "    write_store(find(here / 'text'), here, load_waiting, here / 'store', workers=2, batch_bytes=500)\n"
    )
    (tmp_path / "program.py").write_text(program)
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    parent = subprocess.Popen([sys.executable, "program.py"], cwd=tmp_path, env=environment)
    try:
        assert next_bytes(pipe) + next_bytes(pipe) == b"xx", "both workers are at work"
    finally:
        parent.kill()
        parent.wait()
        os.close(ours)
    # Each worker holds the pipe open as long as it lives, so the end of the pipe is the end of the workers.
    assert next_bytes(pipe) == b""
    os.close(pipe)


def next_bytes(pipe: int) -> bytes:
    """One byte, or none once every writer has gone."""
    asked = select.poll()    # `select` knows no descriptor above 1,023, and a process of many tests has them
    asked.register(pipe, select.POLLIN | select.POLLHUP)
    assert asked.poll(60_000), "nobody writes and nobody ends"
    return os.read(pipe, 1)


def test_another_text_or_setting_never_continues_a_half_store(tmp_path: Path) -> None:
    files = find(make_text(tmp_path / "text"))
    settings = {"batch_bytes": 500, "shard_tokens": 700}
    interrupted(files, tmp_path / "store", 8, **settings)
    assert list(partial_of(tmp_path / "store").glob("tokens-*.bin")), "shards are waiting"
    (tmp_path / "text" / "part-0.jsonl").write_text(json.dumps({"text": "now another"}) + "\n")
    files = find(tmp_path / "text")
    found = write_store(files, tmp_path, load_bytes, tmp_path / "store", **settings)  # type: ignore[arg-type]
    fresh = write_store(files, tmp_path, load_bytes, tmp_path / "fresh", **settings)  # type: ignore[arg-type]
    assert contents(found.path) == contents(fresh.path)


def test_a_file_that_changes_while_it_is_read_is_refused(tmp_path: Path) -> None:
    files = find(make_text(tmp_path / "text"))

    def meddle(_: int) -> None:
        with (tmp_path / "text" / "part-3.jsonl").open("a") as file:
            file.write(json.dumps({"text": "late"}) + "\n")

    with pytest.raises(UserError, match="changed while it was read") as error:
        write_store(files, tmp_path, load_bytes, tmp_path / "store", batch_bytes=100, report=meddle)
    assert "part-3" in str(error.value.where)


def test_a_full_disk_is_the_users_to_mend_and_nothing_is_lost(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    files = find(make_text(tmp_path / "text"))
    settings = {"batch_bytes": 500, "shard_tokens": 700}
    synced = 0

    def full(handle: int) -> None:
        nonlocal synced
        synced += 1
        if synced > 12:
            raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(shards, "_sync", full)
    with pytest.raises(UserError, match="disk is full") as error:
        write_store(files, tmp_path, load_bytes, tmp_path / "store", **settings)  # type: ignore[arg-type]
    assert "make room" in str(error.value.fix)
    monkeypatch.undo()
    heard: list[int] = []
    found = write_store(files, tmp_path, load_bytes, tmp_path / "store", report=heard.append, **settings)  # type: ignore[arg-type]
    assert heard[0] > 500, "the first report is what was done before"
    assert sum(heard) == found.text_bytes
    fresh = write_store(files, tmp_path, load_bytes, tmp_path / "fresh", **settings)  # type: ignore[arg-type]
    assert contents(found.path) == contents(fresh.path)


def test_two_writers_of_one_store_are_refused(tmp_path: Path) -> None:
    files = find(make_text(tmp_path / "text"))
    with locked(partial_of(tmp_path / "store")), pytest.raises(UserError, match="another process"):
        write_store(files, tmp_path, load_bytes, tmp_path / "store")
    assert write_store(files, tmp_path, load_bytes, tmp_path / "store").documents == 101


def test_a_bad_record_stops_the_work_by_file_and_line_also_with_processes(tmp_path: Path) -> None:
    make_text(tmp_path / "text")
    (tmp_path / "text" / "part-1.jsonl").write_text('{"text": "good"}\n{"text": 5}\n')
    files = find(tmp_path / "text")
    for workers in (0, 2):
        with pytest.raises(UserError, match="a number") as error:
            write_store(files, tmp_path, load_bytes, tmp_path / "store", workers=workers, batch_bytes=100)
        assert "part-1.jsonl, line 2" in str(error.value.where)


def test_no_document_at_all_is_refused(tmp_path: Path) -> None:
    (tmp_path / "empty.jsonl").write_text("\n\n")
    with pytest.raises(UserError, match="no document to tokenise"):
        write_store(find(tmp_path / "empty.jsonl"), tmp_path, load_bytes, tmp_path / "store")


class Overflowing(ByteTokenizer):
    vocabulary = 100


def load_overflowing(folder: Path) -> Overflowing:
    return Overflowing()


def test_an_id_beyond_the_vocabulary_is_never_stored(tmp_path: Path) -> None:
    with pytest.raises(AssertionError, match="beyond its vocabulary"):
        write_store(find(make_text(tmp_path / "text")), tmp_path, load_overflowing, tmp_path / "store")


def test_four_bytes_an_id_for_a_large_vocabulary(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ByteTokenizer, "vocabulary", 70_000)
    monkeypatch.setattr(ByteTokenizer, "end", 69_999)
    store = write_store(find(make_text(tmp_path / "text")), tmp_path, load_bytes, tmp_path / "store")
    assert store.dtype.itemsize == 4 and store.read(0)[-1] == 69_999


def test_a_worker_needs_no_torch(tmp_path: Path) -> None:
    code = "import sys, llmtrainer.data.encode; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT).returncode == 0




def interrupted(files: list[SourceFile], out: Path, batches: int, **settings: int) -> int:
    """Write until so many batches of text are done, then stop. Returns the bytes that earlier tries had done."""
    heard: list[int] = []

    def stop(size: int) -> None:
        heard.append(size)
        if len(heard) == batches:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        write_store(files, out.parent, load_bytes, out, report=stop, **settings)  # type: ignore[arg-type]
    return heard[0]


def test_half_a_line_in_the_journal_costs_no_work_now_or_later(tmp_path: Path) -> None:
    files = find(make_text(tmp_path / "text", records=60))
    settings = {"batch_bytes": 500, "shard_tokens": 700}
    fresh = write_store(files, tmp_path, load_bytes, tmp_path / "fresh", **settings)  # type: ignore[arg-type]
    out = tmp_path / "store"
    interrupted(files, out, 8, **settings)
    journal = partial_of(out) / "journal.jsonl"
    journal.write_bytes(journal.read_bytes() + b'{"tokens": 7')
    first = interrupted(files, out, 8, **settings)
    second = interrupted(files, out, 2, **settings)
    assert 1000 < first < second - 1000, "both tries went on where the one before was"
    found = write_store(files, tmp_path, load_bytes, out, **settings)  # type: ignore[arg-type]
    assert contents(found.path) == contents(fresh.path)


def test_a_journal_that_its_files_do_not_bear_out_is_not_believed(tmp_path: Path) -> None:
    files = find(make_text(tmp_path / "text"))
    settings = {"batch_bytes": 500, "shard_tokens": 700}
    fresh = write_store(files, tmp_path, load_bytes, tmp_path / "fresh", **settings)  # type: ignore[arg-type]
    out = tmp_path / "store"

    def foreign_line(partial: Path) -> None:
        with (partial / "journal.jsonl").open("ab") as file:
            file.write(b"not json\n")

    spoil: list[Callable[[Path], object]] = [
        foreign_line,
        lambda partial: (partial / "tokens-00000.bin").write_bytes(b""),
        lambda partial: (partial / "tokens-00001.bin").unlink(),
        lambda partial: (partial / "documents.bin").write_bytes(b""),
    ]
    for change in spoil:
        interrupted(files, out, 8, **settings)
        change(partial_of(out))
        found = write_store(files, tmp_path, load_bytes, out, **settings)  # type: ignore[arg-type]
        assert contents(found.path) == contents(fresh.path)
        shutil.rmtree(out)
