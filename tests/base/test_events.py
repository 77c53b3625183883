"""events.jsonl: whole lines, whatever happened to the process that wrote them."""

from __future__ import annotations

import json
import math
import subprocess
import sys
from pathlib import Path

import pytest

from llmtrainer.base.errors import UserError
from llmtrainer.base.events import EventLog, follow, read_events, steps


def test_every_line_begins_with_kind_and_time_and_is_on_disk_at_once(tmp_path: Path) -> None:
    path = tmp_path / "run" / "events.jsonl"
    log = EventLog(path)
    event = log.append("step", step=1, loss=math.nan, mfu=None, names=("a",), path=Path("x"), text="\u4f60\n")
    assert path.read_text(encoding="utf-8").count("\n") == 1
    assert list(json.loads(path.read_text(encoding="utf-8"))) == ["kind", "time", *list(event)[2:]]
    assert read_events(path) == [event]
    assert (event["loss"], event["mfu"], event["names"], event["path"]) == (None, None, ["a"], "x")
    log.close()


@pytest.mark.parametrize(
    ("last", "kept"),
    [
        (b'{"kind": "step", "time": 1, "st', False), (b"\0\0\0", False), (b'{"kind": "end", "time": 1}', True),
        (b"1", False), (b"", False), (b"x" * 200_000, False),
    ],
)  # fmt: skip
@pytest.mark.parametrize("before", [b"", b'{"kind": "start", "time": 0}\n'])
def test_a_line_cut_short_by_a_crash_is_removed_and_a_whole_one_kept(
    tmp_path: Path, before: bytes, last: bytes, kept: bool
) -> None:
    path = tmp_path / "events.jsonl"
    path.write_bytes(before + last)
    with EventLog(path) as log:
        log.append("resume")
    kinds = [event["kind"] for event in read_events(path)]
    assert kinds == ["start"] * bool(before) + ["end"] * kept + ["resume"]


def test_a_writer_killed_at_any_byte_leaves_events_that_can_be_continued(tmp_path: Path) -> None:
    path = tmp_path / "events.jsonl"
    with EventLog(path) as log:
        for step in range(3):
            log.append("step", step=step, loss=0.5)
    whole = path.read_bytes()
    for size in range(0, len(whole), 7):
        path.write_bytes(whole[:size])
        with EventLog(path) as log:
            log.append("resume")
        found = read_events(path)
        assert found[-1]["kind"] == "resume"
        assert [event["step"] for event in found[:-1]] == list(range(len(found) - 1))


def test_the_last_line_of_a_step_counts(tmp_path: Path) -> None:
    with EventLog(tmp_path / "e") as log:
        for step, loss in ((2, 1.0), (1, 2.0), (2, 3.0)):
            log.append("step", step=step, loss=loss)
        log.append("save", step=2)
    assert [(event["step"], event["loss"]) for event in steps(tmp_path / "e")] == [(1, 2.0), (2, 3.0)]


def test_a_bad_line_in_the_middle_is_told_by_its_number(tmp_path: Path) -> None:
    path = tmp_path / "e"
    path.write_text('{"kind": "start", "time": 0}\nnonsense\n{"kind": "end", "time": 1}\n')
    with pytest.raises(UserError) as caught:
        read_events(path)
    assert caught.value.where == f"{path}:2"
    path.write_text('{"kind": "start", "time": 0}\n{"kind": "end", "ti')
    assert len(read_events(path)) == 1      # being written just now
    with pytest.raises(UserError):
        read_events(tmp_path / "nothing")


def test_following_gives_every_event_once_and_nothing_half_written(tmp_path: Path) -> None:
    path = tmp_path / "e"
    seen: list[str] = []
    chunks = iter([b'{"kind": "a", "time": 0}\n{"kind"', b': "b", "time": 0}\n', b'{"kind": "c", "time": 0}\n'])

    def until() -> bool:
        chunk = next(chunks, None)
        if chunk is not None:
            with path.open("ab") as file:
                file.write(chunk)
        return chunk is None

    for event in follow(path, until=until, poll_seconds=0.0):
        seen.append(event["kind"])
    assert seen == ["a", "b", "c"]


def test_two_processes_of_one_run_one_after_the_other_append(tmp_path: Path) -> None:
    path = tmp_path / "e"
    program = "import sys, pathlib as p, llmtrainer.base.events as e; e.EventLog(p.Path(sys.argv[1])).append('x')"
    for _ in range(2):
        subprocess.run([sys.executable, "-c", program, str(path)], check=True)
    assert [event["kind"] for event in read_events(path)] == ["x", "x"]
