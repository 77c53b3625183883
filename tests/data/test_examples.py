"""Conversations -> store: rows with their weights, a fate for every record, the same bytes however they are made."""

from __future__ import annotations

import hashlib
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from llmtrainer.base.errors import UserError
from llmtrainer.core.example import Example, TokenRow
from llmtrainer.data import examples as writing
from llmtrainer.data.detect import detect
from llmtrainer.data.document import Reading
from llmtrainer.data.example_rows import Choices
from llmtrainer.data.examples import ExampleFile, duplicates, fates_of, write_examples
from llmtrainer.data.fates import Run, joined, totals
from llmtrainer.data.format import Format
from llmtrainer.data.formats.messages import Messages
from llmtrainer.data.length import LengthPolicy
from llmtrainer.data.open import find
from llmtrainer.data.packed import FATES, Store
from llmtrainer.data.plan import plan
from llmtrainer.data.records import records
from llmtrainer.data.shards import partial_of
from tests.data.chats import ByteChat, chat_file, dialogue, make_chat
from tests.data.worlds import END, ByteTokenizer, make_store

ROOT = Path(__file__).parents[2]


def write(
    files: list[ExampleFile], out: Path, *, length: LengthPolicy | None = None, bad_records: Any = "stop",
    gate: str | None = None, **settings: Any,
) -> Store:  # fmt: skip
    choices = Choices(length or LengthPolicy(10_000), bad_records, gate=gate)
    return write_examples(files, make_chat, ByteTokenizer(), out, choices=choices, **settings)


def expected(question: str, answer: str, weight: float = 1.0) -> tuple[list[int], list[float]]:
    read = [*f"user:{question}".encode(), END, *b"assistant:"]
    learned = [*answer.encode(), END]
    return [*read, *learned], [0.0] * len(read) + [weight] * len(learned)


def many(count: int, seed: int = 0) -> list[dict[str, Any]]:
    sizes = np.random.default_rng(seed).integers(1, 40, size=(count, 2)).tolist()
    return [dialogue(f"q{place}" + "?" * asked, "a" * said) for place, (asked, said) in enumerate(sizes)]


def contents(folder: Path) -> dict[str, str]:
    return {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in sorted(folder.iterdir())}


def test_the_store_holds_every_row_with_its_weights_also_of_the_second_and_third_file(tmp_path: Path) -> None:
    sets = [[("one", "1"), ("two", "2")], [("three \u4e09", "3")], [("four", "4"), ("five", "5")]]
    files = [
        chat_file(tmp_path / f"{number}.jsonl", [dialogue(*pair) for pair in pairs])
        for number, pairs in enumerate(sets)
    ]
    store = write(files, tmp_path / "store", shard_tokens=30)
    rows = [expected(*pair) for pairs in sets for pair in pairs]
    for document, (tokens, weights) in enumerate(rows):
        assert store.read(document).tolist() == tokens
        found = store.weights(document)
        assert found is not None and found.dtype == np.float32 and found.tolist() == weights
        part = store.weights(document, 3, 9)
        assert part is not None and part.tolist() == weights[3:9]
    assert store.documents == len(rows) and store.weight_dtype == np.uint8
    assert len([name for name in store.manifest["files"] if name.startswith("weights-")]) > 2, "several shards"
    assert [source["documents"] for source in store.manifest["sources"]] == [2, 1, 2]
    assert store.text_bytes == sum(len((a + b).encode()) for pairs in sets for a, b in pairs)
    store.verify()
    assert fates_of(store).by_fate == {"kept": 5}


def test_weights_that_are_no_switches_make_all_of_them_numbers(tmp_path: Path) -> None:
    records = [dialogue("a", "b"), dialogue("c", "d", weight=0.25), dialogue("e", "f")]
    store = write([chat_file(tmp_path / "chats.jsonl", records)], tmp_path / "store", shard_tokens=15)
    assert store.weight_dtype == np.dtype("<f4")
    for document, (pair, weight) in enumerate([(("a", "b"), 1.0), (("c", "d"), 0.25), (("e", "f"), 1.0)]):
        found = store.weights(document)
        assert found is not None and found.tolist() == expected(*pair, weight)[1]
    store.verify()


def test_a_store_of_text_has_no_weights_and_the_fingerprint_it_always_had(tmp_path: Path) -> None:
    store = make_store(tmp_path / "store", [[1, 2, 0], [3, 0]])
    held = {name: facts["sha256"] for name, facts in sorted(store.manifest["files"].items())}
    facts = ["<u2", "none", 1000, 0, held]
    assert store.fingerprint == hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()
    assert store.weights(0) is None and "weights" not in store.manifest
    assert set(held) == {"documents.bin", "tokens-00000.bin"}


def test_processes_and_repetition_do_not_change_a_byte(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    files = [chat_file(tmp_path / f"{number}.jsonl", many(40, number)) for number in range(2)]
    for number, (workers, batch) in enumerate([(0, 128), (0, 1), (2, 7)]):
        monkeypatch.setattr(writing, "BATCH_RECORDS", batch)
        write(files, tmp_path / f"store-{number}", length=LengthPolicy(60, "split"), workers=workers, shard_tokens=500)
    found = [contents(tmp_path / f"store-{number}") for number in range(3)]
    assert found[0] == found[1] == found[2] and len(found[0]) > 8


KILLED = """
import os, signal, sys
from pathlib import Path
from llmtrainer.data import shards
from llmtrainer.data.format import Format
from llmtrainer.data.formats.messages import Messages
from llmtrainer.data.length import LengthPolicy
from llmtrainer.data.open import find
from tests.data.chats import chat_file, dialogue
from tests.data.test_examples import many, write
folder, kept, count, last = Path(sys.argv[1]), shards._sync, 0, 0
records = [{**record, "gate": f"t{number % 4}"} for number, record in enumerate(many(30))]
records[11] = {**dialogue("half", "counts", weight=0.5), "gate": "t0a1"}

def sync(handle):
    global count
    count += 1
    if count == last:
        os.kill(os.getpid(), signal.SIGKILL)
    kept(handle)

def live(name, syncs):
    global count, last
    count, last = 0, syncs
    file = chat_file(folder / "chats.jsonl", records)
    write([file], folder / name, length=LengthPolicy(60, "split"), shard_tokens=300, max_dropped_share=1.0, gate="gate")

shards._sync = sync
live("whole", 0)
whole = count
# At the beginning, between shards, while weights are widened, and just before the manifest.
for syncs in (3, whole // 2, whole - 5, whole):
    if (child := os.fork()) == 0:
        live(f"killed-{syncs}", syncs)
        os._exit(0)
    assert os.waitpid(child, 0)[1] == signal.SIGKILL and not (folder / f"killed-{syncs}").exists()
    live(f"killed-{syncs}", 0)
"""


def test_a_store_that_was_killed_at_any_sync_ends_with_the_same_bytes(tmp_path: Path) -> None:
    # A process of its own: one that runs threads must not be forked.
    subprocess.run([sys.executable, "-c", KILLED, str(tmp_path)], cwd=ROOT, check=True)
    whole = contents(tmp_path / "whole")
    killed = sorted(tmp_path.glob("killed-*"))
    assert len(killed) == 4 and len(whole) > 8 and "gates.bin" in whole
    assert all(contents(folder) == whole for folder in killed)


MIXED = [
    dialogue("fits", "yes"),
    {"messages": [{"role": "user", "content": "nobody answers"}]},
    dialogue("too long", "x" * 100),
    dialogue("y" * 100, "its targets are cut away"),
    dialogue("please refuse me", "why?"),
    {"messages": [{"role": "wizard", "content": "abracadabra"}]},
    dialogue("fits", "yes"),
]
"""One record of every fate, and one twice."""


def test_every_record_has_a_fate_and_they_add_up(tmp_path: Path) -> None:
    files = [chat_file(tmp_path / "mixed.jsonl", MIXED), chat_file(tmp_path / "more.jsonl", many(3))]
    store = write(
        files, tmp_path / "store", length=LengthPolicy(80, "cut"), bad_records="drop", max_dropped_share=0.5,
        shard_tokens=40,
    )  # fmt: skip
    told = fates_of(store)
    assert told.by_fate == {"kept": 5, "nothing to learn": 1, "cut": 1, "targets cut away": 1, "bad record": 2}
    assert sum(told.by_fate.values()) == told.records == 10 and told.rows == store.documents == 6
    assert store.manifest["records"] == 10 and store.manifest["fates"] == told.by_fate
    assert told.dropped == 4 and told.share == 0.4
    lines = [json.loads(line) for line in (store.path / FATES).read_text().splitlines()]
    counted = [(line["source"], number) for line in lines for number in range(line["first"], line["last"] + 1)]
    assert counted == [*((0, number) for number in range(1, 8)), *((1, number) for number in range(1, 4))]
    assert sum(line["rows"] for line in lines) == store.documents
    wizard = next(line for line in lines if line["first"] == 6)
    assert wizard["fate"] == "bad record" and wizard["place"].endswith("mixed.jsonl, line 6")
    assert wizard["why"] == "nobody is called `wizard`"
    assert duplicates(store) == 1
    assert "mixed.jsonl, line 3: 125 tokens" in told.table() and "10  records in all" in told.table()


def test_too_many_losses_stop_the_work_with_each_reason_and_its_first_record(tmp_path: Path) -> None:
    files = [chat_file(tmp_path / "mixed.jsonl", MIXED)]
    settings: dict[str, Any] = {"length": LengthPolicy(80), "bad_records": "drop"}
    with pytest.raises(UserError, match=r"5 of 7 records would be dropped, 71\.4%") as error:
        write(files, tmp_path / "store", max_dropped_share=0.3, **settings)
    why = str(error.value.why)
    for line, reason in [(2, "nothing to learn"), (3, "too long"), (5, "bad record")]:
        assert reason in why and f"mixed.jsonl, line {line}" in why
    assert "max_dropped_share=0.72" in str(error.value.fix)
    assert not (tmp_path / "store").exists() and partial_of(tmp_path / "store").exists()
    assert write(files, tmp_path / "store", max_dropped_share=0.72, **settings).documents == 2


def test_a_bad_record_stops_the_work_with_its_place_unless_it_may_be_dropped(tmp_path: Path) -> None:
    for place, what in ((4, "the template refuses this"), (5, "nobody is called `wizard`")):
        files = [chat_file(tmp_path / f"{place}.jsonl", [MIXED[0], MIXED[place]])]
        for workers in (0, 1):
            with pytest.raises(UserError, match=what) as error:
                write(files, tmp_path / f"{place}-{workers}", workers=workers)
            assert str(error.value.where).startswith(f"{tmp_path}/{place}.jsonl, line 2, ")


@pytest.mark.parametrize("workers", [0, 1])
def test_a_line_that_is_no_json_is_a_bad_record_like_any_other(tmp_path: Path, workers: int) -> None:
    chat_file(tmp_path / "a.jsonl", [MIXED[0], MIXED[0]])
    first, second = (tmp_path / "a.jsonl").read_text().splitlines()
    (tmp_path / "a.jsonl").write_text(f'{{"messages": [\n{first}\n{{"x"\n{second}\n')
    (tmp_path / "a.json").write_text(f'[{first}, {{"x"}}, {second}]')
    for name, bad in (("a.jsonl", 2), ("a.json", 1)):
        files = [ExampleFile(find(tmp_path / name)[0], Messages())]
        with pytest.raises(UserError, match="a record is no JSON"):
            write(files, tmp_path / f"stops-{name}", workers=workers)
        store = write(files, tmp_path / f"drops-{name}", workers=workers, bad_records="drop", max_dropped_share=1.0)
        assert fates_of(store).by_fate == {"kept": 2, "bad record": bad}


def test_a_bad_record_that_is_the_first_is_dropped_too(tmp_path: Path) -> None:
    chat_file(tmp_path / "a.jsonl", [MIXED[5], MIXED[0]])
    found = list(records(find(tmp_path / "a.jsonl")[0], Reading(whole=True)))
    told = detect(Format.model_validate("auto"), found, bad_may_drop=True)
    assert told is not None and "line 2, becomes" in told.how
    with pytest.raises(UserError, match="nobody is called `wizard`"):
        detect(Format.model_validate("auto"), found)


def test_a_file_without_anything_to_learn_is_refused_and_not_an_empty_store(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no row to learn from"):
        write([chat_file(tmp_path / "a.jsonl", [MIXED[1]])], tmp_path / "store", max_dropped_share=1.0)
    with pytest.raises(UserError, match="no row to learn from"):
        write([chat_file(tmp_path / "b.jsonl", [])], tmp_path / "store", max_dropped_share=1.0)


def test_the_same_store_is_left_as_it_is_and_one_of_another_template_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    files = [chat_file(tmp_path / "chats.jsonl", many(3))]
    store = write(files, tmp_path / "store")
    before = {path: path.stat().st_mtime_ns for path in store.path.iterdir()}
    assert write(files, tmp_path / "store").fingerprint == store.fingerprint
    assert {path: path.stat().st_mtime_ns for path in store.path.iterdir()} == before
    with pytest.raises(UserError, match="something else"):
        write(files, tmp_path / "store", length=LengthPolicy(50))
    monkeypatch.setattr(ByteChat, "fingerprint", "another")
    with pytest.raises(UserError, match="something else"):
        write(files, tmp_path / "store")


def test_a_store_with_a_changed_or_missing_file_of_weights_or_fates_is_refused(tmp_path: Path) -> None:
    store = write([chat_file(tmp_path / "chats.jsonl", many(3))], tmp_path / "store")
    weights = store.path / "weights-00000.bin"
    content = weights.read_bytes()
    weights.write_bytes(bytes([1 - content[0]]) + content[1:])
    with pytest.raises(UserError, match="damaged"):
        Store(store.path).verify()
    weights.write_bytes(content[:-1])
    with pytest.raises(UserError, match="damaged"):
        Store(store.path)
    weights.write_bytes(content)
    (store.path / FATES).unlink()
    with pytest.raises(UserError, match="damaged"):
        Store(store.path)


def test_runs_of_one_fate_are_joined_and_a_record_without_one_is_a_defect() -> None:
    kept = [Run(0, place, place, "kept", 1).plain() for place in (1, 2, 3)]
    lost = Run(0, 4, 4, "too long", 0, "a.jsonl, line 9", "30 tokens").plain()
    runs = joined([*kept, lost, Run(0, 5, 5, "kept", 2).plain(), Run(1, 1, 1, "kept", 1).plain()])
    assert [(run.source, run.first, run.last, run.rows) for run in runs] == [
        (0, 1, 3, 3), (0, 4, 4, 0), (0, 5, 5, 2), (1, 1, 1, 1)
    ]  # fmt: skip
    assert totals(runs).by_fate == {"kept": 5, "too long": 1} and totals(runs).rows == 6
    with pytest.raises(AssertionError):
        joined([kept[0], kept[2]])


def test_gates_are_kept_row_by_row_and_only_where_they_are_asked_for(tmp_path: Path) -> None:
    records = [{**dialogue(f"q{number}", "a" * 30), "gate": f"t{number % 3}"} for number in range(20)]
    files = [chat_file(tmp_path / "chats.jsonl", records)]
    found = []
    for name, workers in (("one", 0), ("two", 2)):
        choices = Choices(LengthPolicy(25, "split"), gate="gate")
        store = write_examples(
            files, make_chat, ByteTokenizer(), tmp_path / name, choices=choices, workers=workers, shard_tokens=100
        )
        rows = [str(store.gate(document)) for document in range(store.documents)]
        assert store.documents > 20 and sorted(set(rows)) == store.gate_names == ["t0", "t1", "t2"]
        begins = [store.read(document)[:6].tolist() == [*b"user:q"] for document in range(store.documents)]
        first = [gate for gate, begin in zip(rows, begins, strict=True) if begin]
        assert first == [record["gate"] for record in records]
        store.verify()
        found.append(contents(tmp_path / name))
    assert found[0] == found[1] and "gates.bin" in found[0]
    plain = write(files, tmp_path / "plain", length=LengthPolicy(25, "split"))
    assert plain.gate(0) is None and "gates" not in plain.manifest and plain.fingerprint != store.fingerprint


def test_of_a_conversation_only_the_last_answer_is_learned_where_that_was_asked_for(tmp_path: Path) -> None:
    turns = [("user", "a"), ("assistant", "bb"), ("user", "c"), ("assistant", "dd"), ("user", "e")]
    more = {"messages": [{"role": role, "content": text} for role, text in turns]}
    unlearned = {"messages": [*more["messages"][:3], {"role": "assistant", "content": "dd", "weight": 0}]}
    files = [chat_file(tmp_path / "chats.jsonl", [more, dialogue("f", "gg"), unlearned])]
    choices = Choices(LengthPolicy(100), learn="last_answer")
    store = write_examples(files, make_chat, ByteTokenizer(), tmp_path / "store", choices=choices)
    learned = []
    for document in range(store.documents):
        weights = store.weights(document)
        assert weights is not None
        learned.append(store.read(document)[weights > 0].tolist())
    assert learned == [[*b"dd", END], [*b"gg", END], [*b"bb", END]]
    assert choices.facts() != Choices(LengthPolicy(100)).facts()


class EveryAnswerAlone(ByteChat):
    """A row for each answer, as templates that rewrite earlier turns need."""

    def rows(self, example: Example) -> tuple[TokenRow, ...]:
        asked, *answers = example.messages
        return tuple(row for answer in answers for row in super(EveryAnswerAlone, self).rows(Example((asked, answer))))


@pytest.mark.parametrize("kind", ["split", "several rows"])
def test_rows_of_one_conversation_are_all_held_out_or_all_learned(tmp_path: Path, kind: str) -> None:
    letters = [chr(256 + number) for number in range(60)]
    records = []
    for number, letter in enumerate(letters):
        spoken = dialogue("q", letter * (25 if kind == "split" and number % 3 else 5))
        spoken["messages"] += [{"role": "assistant", "content": letter}] * (number % 4 if kind != "split" else 0)
        records.append(spoken)
    split = (make_chat, LengthPolicy(30, "split"))
    make, length = split if kind == "split" else (EveryAnswerAlone, LengthPolicy(99))
    store = write_examples(
        [chat_file(tmp_path / "a.jsonl", records)], make, ByteTokenizer(), tmp_path / "store", choices=Choices(length)
    )  # fmt: skip
    assert store.documents > 80
    parts = []
    for part in ("train", "held_out"):
        rows = plan(store, sequence_length=99, policy="whole", seed=1, held_out=0.3, part=part)
        said = [bytes(t for t in store.read(rows.documents[row]).tolist() if t < 256) for row in range(rows.rows)]
        parts.append({letter for letter in letters if any(letter.encode() in text for text in said)})
        assert parts[-1], part
    assert not parts[0] & parts[1] and parts[0] | parts[1] == set(letters)
