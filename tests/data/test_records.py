"""Records of every reader: whole ones, with their places."""

from __future__ import annotations

import gzip
import json
import pickle
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest
from pyarrow import ipc, parquet

from llmtrainer.base.errors import UserError
from llmtrainer.data import stdlib
from llmtrainer.data.detect import detect
from llmtrainer.data.document import Reading, SourceFile
from llmtrainer.data.format import Format
from llmtrainer.data.open import find
from llmtrainer.data.readers.docstrings import LONGEST, module_of
from llmtrainer.data.records import Record, holding, records

ROWS = [{"instruction": "Add.", "input": "1 and 2", "output": "3"}, {"instruction": "x", "input": "", "output": "y"}]


def read(path: Path) -> list[Record]:
    return list(records(SourceFile(path, path.stat().st_size), Reading(whole=True)))


def written(path: Path, content: bytes | str) -> Path:
    path.write_bytes(content.encode() if isinstance(content, str) else content)
    return path


def tables(folder: Path) -> dict[str, Path]:
    table = pa.Table.from_pylist(ROWS)
    parquet.write_table(table, folder / "rows.parquet")
    with ipc.new_file(folder / "rows.arrow", table.schema) as file:
        file.write_table(table)
    lines = "".join(json.dumps(row) + "\n" for row in ROWS)
    header = "instruction,input,output\nAdd.,1 and 2,3\nx,,y\n"
    return {
        "jsonl": written(folder / "rows.jsonl", lines), "json": written(folder / "rows.json", json.dumps(ROWS)),
        "jsonl.gz": written(folder / "rows.jsonl.gz", gzip.compress(lines.encode())),
        "parquet": folder / "rows.parquet", "arrow": folder / "rows.arrow",
        "csv": written(folder / "rows.csv", header), "pkl": written(folder / "rows.pkl", pickle.dumps(ROWS)),
        "pkl of lists": written(folder / "lists.pkl", pickle.dumps({"a_train0": ROWS[:1], "a_train1": ROWS[1:]})),
    }  # fmt: skip


@pytest.mark.parametrize(
    "kind", ["jsonl", "json", "jsonl.gz", "parquet", "arrow", "csv", "pkl", "pkl of lists"]
)
def test_every_reader_gives_whole_records_in_order(tmp_path: Path, kind: str) -> None:
    found = read(tables(tmp_path)[kind])
    assert [record.value for record in found] == ROWS and [record.number for record in found] == [1, 2]


def test_chats_in_yaml_are_texts_whatever_they_look_like(tmp_path: Path) -> None:
    text = "categories: [a]\nconversations:\n- - How many?\n  - 42\n- - no\n  - 2026-11-22\n  - 'it: is'\n"
    found = read(written(tmp_path / "chats.yml", text))
    assert [record.value for record in found] == [["How many?", "42"], ["no", "2026-11-22", "it: is"]]
    assert [record.line for record in found] == [3, 5]
    listed = read(written(tmp_path / "list.yaml", "- {instruction: a, output: null}\n"))
    assert listed[0].value == {"instruction": "a", "output": None}
    assert read(written(tmp_path / "empty.yaml", "")) == []


@pytest.mark.parametrize(
    ("name", "content", "what"),
    [
        ("a.yaml", "- [a\n", "no YAML"), ("a.yaml", "- &x [*x]\n", "no YAML"), ("a.txt", "plain text", "text where"),
        ("a.json", '{"a"', "breaks off"),
    ],
)
def test_a_file_that_holds_no_records_is_refused_with_its_place(
    tmp_path: Path, name: str, content: bytes | str, what: str
) -> None:
    with pytest.raises(UserError, match=what) as error:
        read(written(tmp_path / name, content))
    assert error.value.where is not None and name in error.value.where


def test_of_a_folder_only_files_of_records_are_taken_and_source_only_alone(tmp_path: Path) -> None:
    tables(tmp_path)
    for name in ("README.md", "make.py", "notes.txt"):
        written(tmp_path / name, "text")
    heard: list[str] = []
    names = ("README.md", "make.py", "notes.txt", "rows.jsonl", "rows.csv", "rows.jsonl.gz")
    files = [SourceFile(tmp_path / name, 1) for name in names]
    assert [file.path.name for file in holding(files, heard.append)] == ["rows.jsonl", "rows.csv", "rows.jsonl.gz"]
    assert "3 files" in heard[0] and "README.md" in heard[0]
    assert [file.path.name for file in holding(files[:3], heard.append)] == ["make.py"]
    assert holding(files[:1], heard.append) == files[:1], "what is named alone is read or refused, never left out"


def test_a_text_among_records_is_for_the_format_to_refuse(tmp_path: Path) -> None:
    found = read(written(tmp_path / "chats.yml", "conversations:\n- [a, b]\n- only a text\n- [c, d]\n"))
    assert found[1].value == "only a text"
    detected = detect(Format.model_validate("auto"), found, bad_may_drop=True)
    assert detected is not None and detected.format.kind == "turns"
    with pytest.raises(UserError, match="is text where a list is wanted") as error:
        detect(Format.model_validate("auto"), found)
    assert error.value.where is not None and error.value.where.startswith(f"{tmp_path / 'chats.yml'}, line 3")


MODULE = '''
"""A module."""
import nowhere_at_all
raise SystemExit("parsed, never run")

def shown(path):
    """Show what stands
    in a file.

    And more about it.
    """

def _hidden(): "Nobody is told about this function."
def silent(): pass
def short(): "Too short."

class Queue:
    """Holds things until somebody wants them."""
    def put(self, thing):
        """Put a thing behind all the others."""
'''


def test_source_becomes_questions_about_what_it_defines_for_others(tmp_path: Path) -> None:
    found = read(written(tmp_path / "things.py", MODULE))
    told = [[message["content"] for message in record.value["messages"]] for record in found]
    assert told == [
        ["What does shown in things do?", "Show what stands in a file."],
        ["What does Queue in things do?", "Holds things until somebody wants them."],
        ["What does Queue.put in things do?", "Put a thing behind all the others."],
    ]
    assert [record.line for record in found] == [6, 17, 19]
    assert [message["role"] for message in found[0].value["messages"]] == ["user", "assistant"]
    with pytest.raises(UserError, match="no Python source"):
        read(written(tmp_path / "broken.py", "def f(:\n"))


def test_the_library_itself_is_a_set_of_questions(monkeypatch: pytest.MonkeyPatch) -> None:
    held_out, train = ([SourceFile(Path(name), 1)] for name in ("a.py", "b.py"))
    monkeypatch.setattr(stdlib, "split", lambda root: (held_out, train))
    assert find("stdlib:questions") == find("stdlib:train") == train
    assert find("stdlib:held_out_questions") == find("stdlib:held_out") == held_out
    assert module_of(Path(json.__file__)) == "json" and module_of(Path(json.decoder.__file__)) == "json.decoder"
    questions: dict[str, Any] = {}
    for record in read(Path(json.__file__)):
        asked, answered = (message["content"] for message in record.value["messages"])
        questions[asked] = answered
        assert len(answered) <= LONGEST
    # Of the documentation of the module itself.
    assert questions["What does dumps in json do?"] == "Serialize ``obj`` to a JSON formatted ``str``."


def test_source_compares_the_answer_to_a_question_with_that_to_another(tmp_path: Path) -> None:
    found = [record.value for record in read(written(tmp_path / "things.py", MODULE))]
    answers = ["Show what stands in a file.", "Holds things until somebody wants them.",
               "Put a thing behind all the others."]    # fmt: skip
    told = [(record["chosen"][1]["content"], record["rejected"][1]["content"]) for record in found]
    assert told == [(answers[0], answers[1]), (answers[1], answers[2]), (answers[2], answers[0])]
    assert all(record["chosen"][0] == record["rejected"][0] == record["messages"][0] for record in found)
    for record in found:
        whole, half = (record[name][1]["content"] for name in ("chosen", "broken_off"))
        assert record["broken_off"][0] == record["chosen"][0] and whole.startswith(half) and 0 < len(half) < len(whole)
        assert record["question"] == record["chosen"][:1]
        worse = [record[name][1]["content"] for name in ("broken_off", "rejected")]
        assert [(pair["chosen"], pair["rejected"]) for pair in record["compared"]] == [(whole, text) for text in worse]
    assert [record["detail"] for record in found] == [0, 0, 1], "answers of 6, 5 and 7 words"
    (alone,) = read(written(tmp_path / "alone.py", 'def f():\n    """Do the one thing there is."""\n'))
    assert alone.value["rejected"][1]["content"] == "is. there thing one the Do"
