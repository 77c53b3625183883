"""Signs of life: small, whole or left out, and gone when a process ended in order."""

from __future__ import annotations

import gc
import threading
import time
import weakref
from collections.abc import Callable
from pathlib import Path

import pytest

from llmtrainer.base import heartbeat
from llmtrainer.base.heartbeat import Collective, Heartbeat, read_beats, read_stack, read_stall
from llmtrainer.base.process import process_started


def until(made: Callable[[], object]) -> None:
    deadline = time.monotonic() + 30
    while not made():
        assert time.monotonic() < deadline
        time.sleep(0.02)


def test_a_beat_says_who_does_what_of_which_step_since_when(tmp_path: Path) -> None:
    with Heartbeat(tmp_path / "beats", 1, 4) as heart:
        assert read_beats(tmp_path / "beats")[1].phase == "start"
        before = time.time()
        heart.beat("forward", 12)
        (beat,) = read_beats(tmp_path / "beats").values()
        assert (beat.rank, beat.ranks, beat.count, beat.step, beat.phase) == (1, 4, 1, 12, "forward")
        assert before - 0.001 <= beat.since <= time.time() + 0.001 and beat.started == process_started(beat.pid)
        heart.beat("backward")
        assert read_beats(tmp_path / "beats")[1].step == 12
    assert not (tmp_path / "beats").exists()


def test_a_beat_that_is_half_written_is_left_out(tmp_path: Path) -> None:
    with Heartbeat(tmp_path) as heart:
        heart.beat("forward", 12)
        path = tmp_path / "rank-0.beat"
        whole = path.read_bytes()
        assert whole.startswith(b"1 12 forward ")
        path.write_bytes(b"2" + whole[1:])
        assert read_beats(tmp_path) == {}
        path.write_bytes(whole[:40])
        assert read_beats(tmp_path) == {}
        path.write_bytes(whole)


def test_a_phase_that_lasts_is_described_until_the_next_one_begins(tmp_path: Path) -> None:
    exchanged = Collective("0", 7, "all_reduce", ((3,), (2, 2)), ("Float", "Float"), True)
    assert exchanged.what == "all_reduce of float, float [3], [2, 2]"
    held = threading.Event()
    waiting = threading.Thread(target=held.wait, name="loader")
    waiting.start()
    with Heartbeat(tmp_path, collectives=lambda: [exchanged]) as heart:
        for step in (1, 2, 3, 4):
            heart.beat("data", step)
            heart.beat("forward", step)
        until(lambda: read_stall(tmp_path, 0) is not None)
        stall = read_stall(tmp_path, 0)
        assert stall is not None and stall.count == 8 and stall.collectives == (exchanged,)
        assert stall.longest is not None and stall.longest < 1.5 and stall.resident > 0
        assert any(place.file == __file__ and place.function == "until" for place in stall.stack)
        assert any("wait" in place.function for place in stall.threads["loader"])
        heart.beat("data", 5)
        until(lambda: read_stall(tmp_path, 0) is None)
    held.set()
    waiting.join()


def test_what_a_described_phase_computed_is_freed_when_its_function_returns(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Without waiting for the garbage collector: what is held may be the activations of a step."""
    monkeypatch.setattr(heartbeat, "STILL_SECONDS", 0.0)
    monkeypatch.setattr(heartbeat, "LOOK_SECONDS", 0.01)

    def computes() -> weakref.ref[threading.Event]:
        activations = threading.Event()    # anything that can be referred to weakly
        (tmp_path / "rank-0.stall").unlink(missing_ok=True)
        until(lambda: read_stall(tmp_path, 0) is not None)
        return weakref.ref(activations)

    gc.disable()
    try:
        with Heartbeat(tmp_path):
            left = computes()
        assert left() is None
    finally:
        gc.enable()


def test_an_error_leaves_where_it_was_raised(tmp_path: Path) -> None:
    def fails() -> None:
        raise KeyError("gone")

    with pytest.raises(KeyError), Heartbeat(tmp_path) as heart:
        heart.beat("forward", 3)
        fails()
    stall = read_stall(tmp_path, 0)
    assert stall is not None and stall.raised and stall.stack[0].function == "fails"
    assert read_beats(tmp_path)[0].step == 3


def test_the_stack_of_a_crash_is_that_of_the_thread_at_fault(tmp_path: Path) -> None:
    """faulthandler's two forms: a thread of Python's own, and a library's, of which only the others are known."""
    other = 'Thread 0x1 (most recent call first):\n  File "a.py", line 3 in beat\n'
    main = 'Thread 0x2 (most recent call first):\n  File "b.py", line 5 in inner\n  File "b.py", line 9 in <module>\n'
    (tmp_path / "rank-0.stack").write_text(f"Fatal Python error: Aborted\n\n{other}\n{main}\nExtension modules: x\n")
    assert [str(place) for place in read_stack(tmp_path, 0)] == ["b.py:5 in inner", "b.py:9 in <module>"]
    at_fault = main.replace("Thread 0x2", "Current thread 0x2")
    (tmp_path / "rank-1.stack").write_text(f"Fatal Python error: Segmentation fault\n\n{at_fault}\n{other}\n")
    assert read_stack(tmp_path, 1)[0].line == 5
    assert read_stack(tmp_path, 2) == ()


def test_without_a_folder_nothing_is_written_and_nothing_runs() -> None:
    before = threading.active_count()
    with Heartbeat(None) as heart:
        heart.beat("forward", 1)
        assert threading.active_count() == before
