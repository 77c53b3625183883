"""plan-batches: the figures, the refusals, and the dialogue on a terminal."""

from __future__ import annotations

import io
import json
from pathlib import Path
from typing import Any

import pytest

from llmtrainer.apps.cli import main
from llmtrainer.apps.plan_batches import BatchPlan, BatchPlanning, Dialogue, plan_batches
from llmtrainer.base.errors import UserError
from llmtrainer.data import lengths, stdlib
from llmtrainer.data.document import Reading, SourceFile
from llmtrainer.data.formats.instruction import Instruction
from llmtrainer.data.formats.messages import Messages
from llmtrainer.data.formats.turns import Turns
from llmtrainer.data.records import records
from llmtrainer.tokenizer.chat import Chat
from llmtrainer.tokenizer.tokenizer import load_tokenizer
from llmtrainer.tokenizer.train import train_vocabulary
from tests.data.worlds import counting, make_store

LENGTHS = [(37 * i) % 911 + 50 for i in range(1000)]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("plan")
    (folder / "lengths.jsonl").write_text("".join(json.dumps({"length": length}) + "\n" for length in LENGTHS))
    make_store(folder / "store", counting(LENGTHS), vocabulary=600_000, shard_tokens=10**6)
    return folder


def told(capsys: pytest.CaptureFixture[str], *words: str) -> dict[str, Any]:
    assert main(["plan-batches", *words, "--json"]) == 0
    found: dict[str, Any] = json.loads(capsys.readouterr().out)
    return found


@pytest.mark.parametrize("data", ["lengths.jsonl", "store"])
def test_compatible_prints_the_figures_of_the_old_tool(
    folder: Path, data: str, capsys: pytest.CaptureFixture[str]
) -> None:
    words = (str(folder / data), "max_length=1024", "compatible=true")
    found = told(capsys, *words, "group_size=8", "batch_size=64")
    assert (found["batch_max_tokens"], found["samples_per_step"], found["divider"]) == (4352, [66, 67], 1)
    assert found["bins"] == 120 >= found["lower_bound"] >= 501_899 / 4352
    assert found["fill"] == pytest.approx(501_899 / (120 * 4352))
    found = told(capsys, *words, "group_size=32", "batch_size=32")
    assert (found["batch_max_tokens"], found["samples_per_step"]) == (128, [32, 33])
    assert 0 < found["fill"] <= 1 <= found["bins"] / found["lower_bound"] and found["below"] == 1024


def test_the_command_gives_one_json_object_that_training_can_use(
    folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    found = told(capsys, str(folder / "lengths.jsonl"), "group_size=8", "batch_size=32", "max_length=1024")
    assert found["batch_max_tokens"] >= 1024 and found["samples_per_step"] == [32, 32]
    assert found["tokens_per_batch"] == found["batch_max_tokens"] * found["divider"]
    assert found["lower_bound"] <= found["bins"] and found["bins_per_step"][1] <= 8 * found["divider"]
    assert 0.5 < found["fill"] <= 1 and found["sequences"] == 1000 and found["tokens"] == 501_899
    text = plan_batches(
        BatchPlanning(data=str(folder / "lengths.jsonl"), group_size=8, batch_size=32, max_length=1024)
    ).text()
    assert f"data.tokens_per_batch={found['tokens_per_batch']} data.sequences_per_step=32" in text


@pytest.mark.parametrize(
    "ending",
    ["{}", "{}\n", "{}\n\n", '{}\n{{"length":3, "id": 1}}\n', " {}\n", "{}\r\n", '{}\n{{"length": 0}}\n', "{}\n{{"],
)
def test_lengths_are_read_in_blocks_as_they_are_read_one_by_one(
    tmp_path: Path, ending: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(lengths, "_BLOCK", 64)
    (tmp_path / "a.jsonl").write_text("".join(f'{{"length": {n}}}\n' for n in LENGTHS) + ending.format('{"length":7}'))
    files = [SourceFile(tmp_path / "a.jsonl", 1)]

    def told() -> list[int] | str:
        try:
            return lengths.lengths_in_records(files).tolist()
        except UserError as error:
            return str(error)

    at_once = told()
    monkeypatch.setattr(lengths, "_plain_lengths", lambda file: None)
    assert at_once == told() and ("refused" if isinstance(at_once, str) else at_once[:1000]) in ("refused", LENGTHS)


def test_of_a_document_in_a_store_training_reads_all_tokens_but_the_last(folder: Path) -> None:
    whole = plan_batches(BatchPlanning(data=str(folder / "store"), group_size=8, batch_size=32))
    assert isinstance(whole, BatchPlan) and whole.tokens == 501_899 - 1000


def test_what_is_no_plan_is_refused_and_says_what_would_be(
    folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ["plan-batches", str(folder / "lengths.jsonl"), "group_size=32", "batch_size=32", "max_length=1024"]
    assert main([*words, "--json"]) == 2
    error = json.loads(capsys.readouterr().out)["error"]
    assert "below max_length" in error["what"] and "batch_size=64" in error["fix"]


@pytest.mark.parametrize(("group_size", "max_length"), [(4, 20_000), (32, 1024), (3, 5000)])
def test_what_would_be_a_plan_is_one(
    folder: Path, group_size: int, max_length: int, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ["plan-batches", str(folder / "lengths.jsonl"), f"group_size={group_size}", f"max_length={max_length}"]
    assert main([*words, "batch_size=8", "--json"]) == 2
    fix = json.loads(capsys.readouterr().out)["error"]["fix"]
    larger = next(word for word in fix.split(", or ") if word.startswith("batch_size="))
    assert main([*words, larger, "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["batch_max_tokens"] >= max_length


def test_as_many_sequences_as_bins_are_a_plan_of_the_old_tool_without_a_token(
    folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = (str(folder / "lengths.jsonl"), "compatible=true", "batch_size=4")
    for group_size in (4, 8):
        found = told(capsys, *words, f"group_size={group_size}")
        assert (found["batch_max_tokens"], found["bins"], found["lower_bound"], found["fill"]) == (0, 1000, 1000, 0.0)
    assert main(["plan-batches", *words, "group_size=4"]) == 0
    assert "in a recipe" not in capsys.readouterr().out


def test_questions_and_yaml_are_counted_as_the_conversations_that_training_reads(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    train_vocabulary(iter(["what does it do " * 20]), 300).save(tmp_path / "tokenizer")
    chat = Chat(load_tokenizer(tmp_path / "tokenizer"), "chatml")
    words = (f"tokenizer={tmp_path / 'tokenizer'}", "template=chatml", "group_size=1", "batch_size=1")
    (tmp_path / "chats.yaml").write_text("- [what, it]\n- [does it, do]\n")
    rows = [chat.rows(Turns().example(pair))[0] for pair in (["what", "it"], ["does it", "do"])]
    found = told(capsys, str(tmp_path / "chats.yaml"), *words)
    assert (found["sequences"], found["tokens"]) == (2, sum(len(row.tokens) - 1 for row in rows))
    questions = told(capsys, "stdlib:held_out_questions", *words)
    files = stdlib.find("stdlib:held_out_questions")
    reading = Reading(whole=True)
    asked = [record for file in files for record in records(file, reading)]
    rows = [chat.rows(Messages().example(record.value))[0] for record in asked]
    assert (questions["sequences"], questions["tokens"]) == (len(asked), sum(len(row.tokens) - 1 for row in rows))
    assert told(capsys, "stdlib:held_out", *words)["sequences"] == len(files)


def test_numbers_that_are_missing_are_asked_for_on_a_terminal_alone(
    folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    class Terminal(io.StringIO):
        def isatty(self) -> bool:
            return True

    settings = BatchPlanning(data=str(folder / "lengths.jsonl"), max_length=1024)
    monkeypatch.setattr("sys.stdin", Terminal("8 64\n32 32\neight\n\n8 32\n0 0\n8 100\n"))
    found = plan_batches(settings)
    assert isinstance(found, Dialogue) and [plan.samples_per_step for plan in found.plans] == [(64, 64), (32, 32)]
    shown = capsys.readouterr().out
    assert shown.count("batch_max_tokens") == 2 and "below max_length" in shown and "two whole numbers" in shown
    assert json.loads(json.dumps(found.json()))["plans"][0]["samples_per_step"] == [64, 64] and found.text() == ""
    monkeypatch.setattr("sys.stdin", Terminal("8 64\n"))    # the end of the input ends it too
    assert len(plan_batches(settings).plans) == 1  # type: ignore[union-attr]
    monkeypatch.setattr("sys.stdin", io.StringIO("8 64\n"))
    with pytest.raises(UserError, match="was not said") as error:
        plan_batches(BatchPlanning(data=str(folder / "lengths.jsonl"), group_size=8))
    assert error.value.fix == "batch_size=64"


def test_documents_are_counted_by_their_tokenizer(folder: Path) -> None:
    texts = [f"def step_{number}(x):\n    return x * {number}\n" * (1 + number % 5) for number in range(40)]
    train_vocabulary(iter(texts), 300).save(folder / "tokenizer")
    (folder / "text.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    settings = {"data": str(folder / "text.jsonl"), "group_size": 2, "batch_size": 10}
    with pytest.raises(UserError, match="text alone has no tokens"):
        plan_batches(BatchPlanning.model_validate(settings))
    found = plan_batches(BatchPlanning.model_validate({**settings, "tokenizer": str(folder / "tokenizer")}))
    tokenizer = load_tokenizer(folder / "tokenizer")
    assert isinstance(found, BatchPlan) and found.tokens == sum(len(tokenizer.encode(text)) for text in texts)


def test_conversations_are_counted_as_their_rows(folder: Path) -> None:
    records = [{"instruction": f"add {n} and {n}", "input": "", "output": f"it is {2 * n}"} for n in range(30)]
    train_vocabulary(iter([record["instruction"] for record in records]), 300).save(folder / "small")
    (folder / "chats.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    found = plan_batches(
        BatchPlanning(
            data=str(folder / "chats.jsonl"), tokenizer=str(folder / "small"), template="alpaca", group_size=2,
            batch_size=10,
        )
    )  # fmt: skip
    tokenizer = load_tokenizer(folder / "small")
    chat = Chat(tokenizer, "alpaca")
    rows = [chat.row(Instruction().example(record)) for record in records]
    assert isinstance(found, BatchPlan) and found.tokens == sum(len(row.tokens) - 1 for row in rows)


def test_a_template_with_a_clock_and_one_that_drops_reasoning_are_counted_as_the_recipe_says(folder: Path) -> None:
    train_vocabulary(iter(["a b"]), 300).save(folder / "small")
    clocked = "{% for m in messages %}<|im_start|>{{ strftime_now('%B') }}{{ m.role }}\n{{ m.content }}<|im_end|>" \
        "{% endfor %}{% if add_generation_prompt %}<|im_start|>{{ strftime_now('%B') }}assistant\n{% endif %}"
    (folder / "clock.jinja").write_text(clocked)
    said = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b", "thinking": "hm"}]
    (folder / "chats.jsonl").write_text(json.dumps({"messages": said}) + "\n")
    settings = {
        "data": str(folder / "chats.jsonl"), "tokenizer": str(folder / "small"), "group_size": 1, "batch_size": 1,
        "template": str(folder / "clock.jinja"),
    }  # fmt: skip
    with pytest.raises(UserError):
        plan_batches(BatchPlanning.model_validate({**settings, "date": "2026-05-01"}))
    counted = {}
    for month, name in ((5, "May"), (9, "September")):
        more = {"date": f"2026-{month:02}-01", "leave_out": ("thinking",)}
        found = plan_batches(BatchPlanning.model_validate({**settings, **more}))
        assert isinstance(found, BatchPlan)
        counted[name] = found.tokens
    assert counted["September"] - counted["May"] == 2 * (len("September") - len("May"))


@pytest.mark.parametrize("line", ['{"length": "12"}', '{"tokens": 3}', '{"length": 0}', '{"length": true}'])
def test_a_record_without_a_length_is_named(tmp_path: Path, line: str) -> None:
    (tmp_path / "data.jsonl").write_text('{"length": 12}\n' + line + "\n")
    with pytest.raises(UserError, match="has no `length`") as error:
        plan_batches(BatchPlanning(data=str(tmp_path / "data.jsonl"), group_size=1, batch_size=1))
    assert "line 2" in str(error.value.where)


def test_data_without_a_sequence_is_refused(tmp_path: Path) -> None:
    make_store(tmp_path / "store", [[5], [6]])
    with pytest.raises(UserError, match="no sequence"):
        plan_batches(BatchPlanning(data=str(tmp_path / "store"), group_size=1, batch_size=1))


def test_a_compatible_plan_of_lengths_waits_for_no_torch(folder: Path) -> None:
    import subprocess
    import sys

    source = (
        "import sys; from llmtrainer.apps.cli import main\n"
        f"assert main(['plan-batches', {str(folder / 'lengths.jsonl')!r}, 'group_size=4', 'batch_size=32',"
        " 'compatible=true']) == 0\nassert 'torch' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", source], check=True, capture_output=True, timeout=120)
