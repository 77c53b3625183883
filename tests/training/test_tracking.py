"""Trackers hear what events.jsonl holds, and whatever they do, the run and its own log stay whole."""

from __future__ import annotations

import json
import struct
import sys
import types
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from llmtrainer.base.errors import UserError
from llmtrainer.base.events import read_events, steps
from llmtrainer.training import tracking
from llmtrainer.training.console import voice
from llmtrainer.training.recipe import Recipe
from llmtrainer.training.run import open_trainer, train
from llmtrainer.training.trackers.tensorboard import EventFile, crc32c
from tests.training import fake_trackers

Some = Callable[..., Recipe]
FAKE = "tests.training.fake_trackers"


@pytest.fixture(autouse=True)
def fresh() -> Iterator[None]:
    for held in (fake_trackers.told, fake_trackers.opened, fake_trackers.closed):
        held.clear()
    with voice(quiet=True):
        yield


def trackers(*described: str) -> str:
    return f"log.trackers=[{', '.join('{' + item + '}' for item in described)}]"


def warnings(recipe: Recipe) -> list[str]:
    events = read_events(Path(recipe.run) / "events.jsonl")
    return [str(event["text"]) for event in events if event["kind"] == "warning"]


def figures(events: list[dict[str, Any]], kind: str) -> list[tuple[int, dict[str, float]]]:
    return [
        (event["step"], {name: value for name, value in event.items()
                         if name not in ("kind", "time", "step") and value is not None})
        for event in events if event["kind"] == kind
    ]  # fmt: skip


def test_a_tracker_hears_every_figure_of_the_log(recipe: Some) -> None:
    chosen = recipe(trackers(f"kind: {FAKE}.Recording"), "evaluate.every=2 steps", "duration=4 steps")
    train(chosen)
    events = read_events(Path(chosen.run) / "events.jsonl")
    told = [(step, values) for _, step, values in fake_trackers.told]
    assert [item for item in told if "loss" in item[1]] == figures(events, "step")
    assert [item for item in told if "held_out/loss" in item[1]] == figures(events, "evaluate")
    assert [step for step, _ in told] == [1, 2, 2, 3, 4, 4]
    assert len(fake_trackers.closed) == 1 and warnings(chosen) == []


def test_a_tracker_that_raises_on_its_third_call_costs_one_warning_and_nothing_else(recipe: Some) -> None:
    plain = recipe("duration=6 steps")
    train(plain)
    chosen = recipe(
        trackers(f"kind: {FAKE}.Recording, raise_at: 3", f"kind: {FAKE}.Recording"), "duration=6 steps",
        f"run={plain.run}-tracked",
    )  # fmt: skip
    result = train(chosen)
    assert result.step == 6 and result.stopped is None
    (warning,) = warnings(chosen)
    assert "switched off (SystemExit: the pipe)" in warning and f"{FAKE}.Recording" in warning
    logs = [steps(Path(item.run) / "events.jsonl") for item in (plain, chosen)]
    assert [event["loss"] for event in logs[0]] == [event["loss"] for event in logs[1]]
    by_name: dict[str, list[int]] = {name: [] for name, _, _ in fake_trackers.opened}
    for name, step, _ in fake_trackers.told:
        by_name[name].append(step)
    assert sorted(map(len, by_name.values()))[0] == 2 and len(fake_trackers.closed) == 1
    assert max(by_name.values(), key=len)[-1] == 6, "the other one heard everything"


@pytest.mark.parametrize("where", ["open", "write", "close"])
def test_a_tracker_that_hangs_does_not_hold_up_the_end(
    recipe: Some, where: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tracking, "SECONDS_AT_THE_END", 0.3)
    chosen = recipe(trackers(f"kind: {FAKE}.Recording, hang: {where}"), "duration=2 steps")
    assert train(chosen).step == 2
    (warning,) = warnings(chosen)
    assert "did not come to its end in time" in warning
    assert [event["step"] for event in steps(Path(chosen.run) / "events.jsonl")] == [1, 2]


def test_a_continued_run_goes_on_where_the_tracker_was(recipe: Some) -> None:
    both = trackers(f"kind: {FAKE}.Recording", f"kind: {FAKE}.Rewinding")
    with open_trainer(recipe(both)) as trainer:
        for info in trainer.steps():
            if info.progress.step == 5:    # behind the checkpoint of step 3
                break
    first = list(fake_trackers.told)
    fake_trackers.told.clear()
    chosen = recipe(both, "duration=8 steps")
    train(chosen)
    names = [name for name, _, _ in fake_trackers.opened]
    assert names[0] in names[2:] and names[1] in names[2:] and len(set(names)) == 2, "one name for each, kept"
    log = {event["step"]: event["loss"] for event in steps(Path(chosen.run) / "events.jsonl")}
    for name in set(names):
        begun = next(first for other, first, _ in fake_trackers.opened[2:] if other == name)
        heard = [item for item in fake_trackers.told if item[0] == name and "loss" in item[2]]
        told = [(step, values["loss"]) for _, step, values in heard]
        assert told == [(step, log[step]) for step in range(begun, 9)], "the last line for a step"
    assert sorted(first for _, first, _ in fake_trackers.opened[2:]) == [4, 6], "told again only where it can be"
    assert {step for _, step, _ in first} == {1, 2, 3, 4, 5}


def test_a_tracker_that_joins_later_hears_the_history_and_the_last_line_for_a_step(recipe: Some) -> None:
    train(recipe("duration=3 steps"))
    log = Path(recipe().run) / "events.jsonl"
    lines = log.read_text().splitlines()
    stale = next(json.loads(line) for line in lines if '"kind": "step"' in line)
    log.write_text("\n".join([json.dumps({**stale, "loss": 99.0}), *lines]) + "\n")
    train(recipe(trackers(f"kind: {FAKE}.Recording"), "duration=5 steps"))
    told = [(step, values["loss"]) for _, step, values in fake_trackers.told if "loss" in values]
    assert told == [(event["step"], event["loss"]) for event in steps(log)] and len(told) == 5


def test_a_finished_run_tells_a_new_tracker_all_of_it(recipe: Some) -> None:
    train(recipe("duration=3 steps"))
    train(recipe(trackers(f"kind: {FAKE}.Recording"), "duration=3 steps"))
    assert [step for _, step, values in fake_trackers.told if "loss" in values] == [1, 2, 3]


def test_a_package_that_is_missing_is_named_before_anything_is_trained(recipe: Some) -> None:
    with pytest.raises(UserError, match="needs the package `no_such_tracker`") as error:
        train(recipe(trackers(f"kind: {FAKE}.Absent")))
    assert "pip install" in str(error.value.fix)
    with pytest.raises(UserError, match="no kind `tensorbord`") as error:
        recipe(trackers("kind: tensorbord"))
    assert "tensorboard" in str(error.value.fix)


class Library(types.ModuleType):
    """Stands in for wandb and for swanlab: notes what it is called with."""

    def __init__(self, name: str) -> None:
        super().__init__(name)
        self.calls: list[tuple[str, Any]] = []
        self.__spec__ = types.SimpleNamespace()    # type: ignore[assignment]

    def init(self, **how: Any) -> Library:
        self.calls.append(("init", how))
        return self

    def log(self, values: dict[str, float], step: int) -> None:
        if "loss" in values:
            self.calls.append(("log", (step, values["loss"])))

    def finish(self) -> None:
        self.calls.append(("finish", None))


@pytest.mark.parametrize("kind", ["wandb", "swanlab"])
def test_a_service_gets_a_run_that_goes_on_under_its_id(
    recipe: Some, kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    library = Library(kind)
    monkeypatch.setitem(sys.modules, kind, library)
    chosen = recipe(trackers(f"kind: {kind}, project: mine"), "duration=2 steps")
    train(chosen)
    train(recipe(trackers(f"kind: {kind}, project: mine"), "duration=3 steps"))
    assert [what for what, _ in library.calls] == ["init", "log", "log", "finish", "init", "log", "finish"]
    inits = [how for what, how in library.calls if what == "init"]
    assert inits[0]["id"] == inits[1]["id"] and inits[0]["resume"] == "allow" and inits[0]["project"] == "mine"
    assert inits[0]["config"]["duration"] == "2 steps"
    log = {event["step"]: event["loss"] for event in steps(Path(chosen.run) / "events.jsonl")}
    assert [what for name, what in library.calls if name == "log"] == sorted(log.items())


def records(path: Path) -> list[bytes]:
    """Contents of a TFRecord file."""
    content, found, at = path.read_bytes(), [], 0
    while at < len(content):
        (length,) = struct.unpack_from("<Q", content, at)
        found.append(content[at + 12 : at + 12 + length])
        for start, stop, place in ((at, at + 8, at + 8), (at + 12, at + 12 + length, at + 12 + length)):
            (masked,) = struct.unpack_from("<I", content, place)
            rotated = (masked - 0xA282EAD8) & 0xFFFFFFFF
            assert crc32c(content[start:stop]) == (rotated >> 17 | rotated << 15) & 0xFFFFFFFF
        at += 16 + length
    return found


def message(content: bytes) -> dict[int, list[Any]]:
    """Fields of a protocol buffer by number: integers, or bytes."""
    found: dict[int, list[Any]] = {}
    at = 0

    def varint() -> int:
        nonlocal at
        value = shift = 0
        while True:
            byte = content[at]
            at += 1
            value |= (byte & 0x7F) << shift
            shift += 7
            if byte < 0x80:
                return value

    while at < len(content):
        key = varint()
        if key & 7 == 0:
            value: Any = varint()
        else:
            size = {1: 8, 5: 4}.get(key & 7) or varint()
            value, at = content[at : at + size], at + size
        found.setdefault(key >> 3, []).append(value)
    return found


def test_event_files_hold_the_figures_as_protocol_buffers(recipe: Some) -> None:
    chosen = recipe(trackers("kind: tensorboard"), "duration=3 steps")
    train(chosen)
    train(recipe(trackers("kind: tensorboard"), "duration=4 steps"))
    first, second = sorted((Path(chosen.run) / "tensorboard").iterdir())
    assert first.name.startswith("events.out.tfevents.") and len(first.name) == len(second.name)
    log = {event["step"]: event for event in steps(Path(chosen.run) / "events.jsonl")}
    for path, expected in ((first, [1, 2, 3]), (second, [4])):
        head, start, *events = map(message, records(path))
        assert head[3] == [b"brain.Event:2"]
        assert start[2] == expected[:1] and message(start[7][0]) == {1: [1]}, "what older files say is forgotten"
        seen = []
        for event in events:
            values = {
                message(value)[1][0].decode(): struct.unpack("<f", message(value)[2][0])[0]
                for value in message(event[5][0])[1]
            }
            if "loss" in values:
                seen.append(event[2][0])
                assert values["loss"] == pytest.approx(log[event[2][0]]["loss"], rel=1e-7)
        assert seen == expected


def test_the_checksum_and_a_whole_record_are_those_of_the_formats(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert crc32c(b"123456789") == 0xE3069283    # the check value of CRC-32C
    assert crc32c(bytes(32)) == 0x8A9136AA       # RFC 3720, appendix B.4
    monkeypatch.setattr("time.time", lambda: 1.5)
    file = EventFile(tmp_path, 300)
    file.write(300, {"loss": 2.25})
    file.close()
    (path,) = tmp_path.iterdir()
    assert path.read_bytes().hex() == GOLDEN


GOLDEN = (
    "1800000000000000a37f4b2209000000000000f83f1a0d627261696e2e4576656e743a322a28646c"
    "100000000000000095fbfe1809000000000000f83f10ac023a020801713b788a"
    "1b000000000000001a0d9e1309000000000000f83f10ac022a0d0a0b0a046c6f73731500001040e418822e"
)
"""What TensorBoard 2.21 writes: its version, the start at step 300, and loss 2.25 at that step, all at time 1.5."""
