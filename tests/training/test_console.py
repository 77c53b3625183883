"""What a person sees: bars and lines, with a clock that the test moves."""

from __future__ import annotations

import io
import math
import re
import threading
from collections.abc import Iterator
from typing import Any

import pytest
from rich.console import Console

from llmtrainer.base.units import Duration, Progress
from llmtrainer.training import console
from llmtrainer.training.console import TrainingView, bar, say, voice, warn
from llmtrainer.training.figures import amount, count, remaining, short, span


class Clock:
    def __init__(self) -> None:
        self.now = 100.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def clock() -> Iterator[Clock]:
    clock = Clock()
    with voice(clock=clock):
        yield clock


def step(number: int, **values: Any) -> dict[str, Any]:
    return {
        "kind": "step", "step": number, "tokens": 2048 * number, "epochs": number / 50, "loss": 3.14159,
        "learning_rate": 3e-4, "grad_norm": 0.91234, "seconds": 1.0, "tokens_per_second": 12345.6,
        "mfu": None, **values,
    }


def lines(capsys: pytest.CaptureFixture[str]) -> list[str]:
    captured = capsys.readouterr()
    assert captured.out == "", "stdout belongs to results"
    return captured.err.splitlines()


def terminal(width: int = 110) -> tuple[Console, io.StringIO]:
    screen = io.StringIO()
    environment = {"TERM": "xterm"}
    return Console(file=screen, force_terminal=True, width=width, _environ=environment), screen


def test_without_a_terminal_a_bar_is_a_line_every_five_seconds_and_one_at_the_end(
    clock: Clock, capsys: pytest.CaptureFixture[str]
) -> None:
    with bar("reading", 40e6, "bytes") as advance:
        for _ in range(4):
            clock.now += 2.5
            advance(10e6)
    assert lines(capsys) == [
        "reading:  50%  20 MB of 40 MB  4 MB/s  0:05 left",
        "reading: 100%  40 MB of 40 MB  4 MB/s  0:00 left",
        "reading: 40 MB in 10.0 s  (4 MB/s)",
    ]


def test_a_unit_is_named_once(clock: Clock, capsys: pytest.CaptureFixture[str]) -> None:
    with bar("generate", 40, "tokens") as advance:
        clock.now += 5
        advance(10)
    assert lines(capsys)[0] == "generate:  25%  10 of 40 tokens  2 tokens/s  0:15 left"


def test_a_bar_whose_end_nobody_knows_promises_no_time(
    clock: Clock, capsys: pytest.CaptureFixture[str]
) -> None:
    with bar("scoring", None, "documents") as advance:
        clock.now += 5
        advance(1200)
    assert lines(capsys) == [
        "scoring: 1,200 documents  240 documents/s", "scoring: 1,200 documents in 5.0 s  (240 documents/s)",
    ]


def test_a_bar_whose_block_fails_claims_no_end(clock: Clock, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(RuntimeError), bar("reading", 10, "files"):
        raise RuntimeError
    assert lines(capsys) == []


def test_quiet_leaves_warnings_only(capsys: pytest.CaptureFixture[str]) -> None:
    with voice(quiet=True):
        say("prepared")
        with bar("reading", 10, "files") as advance:
            advance(10)
        with TrainingView(Duration(2, "steps")) as view:
            view.show(step(1))
            view.show({"kind": "warning", "text": "fp16 overflow"})
        warn("no compiler")
    assert lines(capsys) == ["warning: fp16 overflow", "warning: no compiler"]


def test_the_voice_is_what_it_was_after_the_block(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(RuntimeError), voice(quiet=True):
        raise RuntimeError
    say("heard")
    assert lines(capsys) == ["heard"]


def test_another_thread_speaks_with_the_same_voice(capsys: pytest.CaptureFixture[str]) -> None:
    with voice(quiet=True):
        thread = threading.Thread(target=say, args=("saved",))
        thread.start()
        thread.join()
    assert lines(capsys) == []


@pytest.mark.parametrize("text", ["[bold]x[/bold] :smile: [/]", "a" * 300, "7 of 9 'text'"])
def test_text_is_shown_as_it_is(text: str, capsys: pytest.CaptureFixture[str]) -> None:
    say(text)
    assert lines(capsys) == [text]


def test_training_tells_the_first_step_then_one_line_in_five_seconds_and_the_last(
    clock: Clock, capsys: pytest.CaptureFixture[str]
) -> None:
    with TrainingView(Duration(12, "steps")) as view:
        for number in range(1, 13):
            view.show(step(number, mfu=0.4121 if number > 1 else None))
            clock.now += 1.0
    figures = "loss 3.1416  lr 3.00e-04  grad norm 0.912  12,346 tokens/s"
    assert lines(capsys) == [
        f"step 1 of 12 (8.3%)  {figures}",
        f"step 6 of 12 (50.0%)  {figures}  MFU 41.2%  0:06 left",
        f"step 11 of 12 (91.7%)  {figures}  MFU 41.2%  0:01 left",
        f"step 12 of 12 (100.0%)  {figures}  MFU 41.2%",
    ]


@pytest.mark.parametrize(
    ("figure", "told"), [({"reward/mean": 0.1234}, "reward 0.12"), ({"preference/accuracy": 0.75}, "accuracy 0.75")]
)
def test_a_line_tells_beside_the_loss_what_the_run_is_about(
    clock: Clock, capsys: pytest.CaptureFixture[str], figure: dict[str, float], told: str
) -> None:
    with TrainingView(Duration(1, "steps")) as view:
        view.show(step(1, **figure))
    assert f"loss 3.1416  {told}  lr 3.00e-04" in lines(capsys)[0]


def test_the_last_step_is_not_told_twice(clock: Clock, capsys: pytest.CaptureFixture[str]) -> None:
    with TrainingView(Duration(1, "steps")) as view:
        view.show(step(1))
    assert len(lines(capsys)) == 1


def test_an_evaluation_and_a_stop_come_after_their_step(clock: Clock, capsys: pytest.CaptureFixture[str]) -> None:
    with TrainingView(Duration(9, "steps")) as view:
        view.show(step(1))
        view.show(step(2))
        view.show({"kind": "evaluate", "step": 2, "held_out/loss": 2.5})
        view.show({"kind": "stop", "step": 2, "reason": "SIGTERM"})
    assert [line.split("  ")[0] for line in lines(capsys)] == [
        "step 1 of 9 (11.1%)", "step 2 of 9 (22.2%)", "step 2: held out: loss 2.5000",
        "stopped after step 2: the same command continues",
    ]


def test_a_continued_runs_minutes_go_on_from_where_they_were(
    clock: Clock, capsys: pytest.CaptureFixture[str]
) -> None:
    with TrainingView(Duration(20, "minutes")) as view:
        view.show({"kind": "resume", "step": 9, "minutes": 5.0})
        view.show(step(10, seconds=6.0))
    assert lines(capsys)[1].startswith("step 10, 5.1 of 20 minutes (25.5%)")


@pytest.mark.parametrize(("duration", "place"), [
    (Duration(1e6, "tokens"), "step 10, 20.5K of 1M tokens (2.0%)"),
    (Duration(2, "epochs"), "step 10, epoch 0.20 of 2 (10.0%)"),
    (Duration(20, "minutes"), "step 10, 5.1 of 20 minutes (25.5%)"),
])
def test_the_place_is_told_in_the_unit_of_the_duration(
    duration: Duration, place: str, clock: Clock, capsys: pytest.CaptureFixture[str]
) -> None:
    with TrainingView(duration, Progress(step=9, tokens=9, epochs=0.18, minutes=5.0)) as view:
        view.show(step(10, seconds=6.0))
    assert lines(capsys)[0].startswith(place)


def test_the_time_left_of_a_continued_run_counts_what_this_process_did(
    clock: Clock, capsys: pytest.CaptureFixture[str]
) -> None:
    with TrainingView(Duration(1000, "steps"), Progress(step=900)) as view:
        view.show(step(901))
        clock.now += 5.0
        view.show(step(906))
    assert lines(capsys)[-1].endswith("1:34 left")    # 94 steps at one a second


def test_evaluations_saves_and_warnings_are_told_as_they_happen(
    clock: Clock, capsys: pytest.CaptureFixture[str]
) -> None:
    with TrainingView(Duration(1000, "steps")) as view:
        view.show({
            "kind": "evaluate", "time": 1.0, "step": 400, "held_out/loss": 2.3451,
            "held_out/bits_per_byte": 1.5, "news/tokens": 123456, "news/perplexity": math.exp(9),
            "news/nothing": None,
        })
        view.show({"kind": "save", "step": 400})
        view.show({"kind": "warning", "step": 401, "text": "fp16 overflow"})
        view.show({"kind": "start", "step": 0})
        view.show({"kind": "stop", "step": 402, "reason": "SIGTERM"})
        view.show({"kind": "resume", "step": 402})
    assert lines(capsys) == [
        "step 400: held out: loss 2.3451, bits per byte 1.5000; news: tokens 123,456, perplexity 8,103.1",
        "step 400: checkpoint saved",
        "warning: fp16 overflow",
        "stopped after step 402: the same command continues",
        "continues after step 402",
    ]


def test_an_event_with_null_figures_is_shown_without_them(
    clock: Clock, capsys: pytest.CaptureFixture[str]
) -> None:
    with TrainingView(Duration(4, "steps")) as view:
        view.show({"kind": "step", "step": 1, "loss": None, "grad_norm": None, "learning_rate": 0})
    assert lines(capsys) == ["step 1 of 4 (25.0%)  lr 0.00e+00"]


@pytest.mark.parametrize("width", [60, 110])
def test_on_a_terminal_nothing_wraps_and_the_end_stays_visible(width: int) -> None:
    screen, written = terminal(width)
    with voice(screen=screen):
        with bar("reading text", 31.5e6, "bytes") as advance:
            advance(31.5e6)
        with TrainingView(Duration(60, "steps")) as view:
            for number in range(1, 61):
                view.show(step(number, loss=8.0 / number))
    shown = re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", written.getvalue()).replace("\r", "\n").splitlines()
    assert max(map(len, shown)) <= width
    read = [line for line in shown if line.startswith("reading text") and "100%" in line]
    assert read[-1].rstrip().endswith("/s)") or width == 60
    assert any(line.startswith("step 60 of 60") and "100%" in line for line in shown)


def test_a_bar_inside_a_training_view_is_drawn_and_leaves_the_view_alive() -> None:
    screen, written = terminal()
    with voice(screen=screen), TrainingView(Duration(2, "steps")) as view:
        view.show(step(1))
        with bar("evaluating", 3, "documents") as advance:
            advance(3)
        say("between")
        view.show(step(2))
    assert "evaluating" in written.getvalue()
    assert "between" in written.getvalue()
    assert "step 2 of 2" in written.getvalue()


def test_the_shape_of_the_loss_falls_and_fits_whatever_the_number_of_steps() -> None:
    screen, _ = terminal()
    history = console._History()
    for number in range(5000):
        history.add(10.0 - number / 1000)
    drawn = history.drawn(screen)
    assert 16 <= len(drawn) < 32
    assert (drawn[0], drawn[-1]) == ("\u2588", "\u2581")
    assert list(drawn) == sorted(drawn, reverse=True)


def test_the_shape_of_the_loss_survives_infinity_and_a_flat_run() -> None:
    screen, _ = terminal()
    history = console._History()
    for value in (2.0, math.inf, math.nan, 2.0, 2.0):
        history.add(value)
    assert history.drawn(screen) == "\u2581\u2581\u2581"


def test_text_streams_to_stdout_only_for_people(monkeypatch: pytest.MonkeyPatch) -> None:
    with voice():
        assert not console.stdout_is_for_people(), "a file"
    monkeypatch.setattr("sys.stdout.isatty", lambda: True, raising=False)
    assert not console.stdout_is_for_people(), "somebody's own program"
    with voice():
        assert console.stdout_is_for_people()
    with voice(json=True):
        assert not console.stdout_is_for_people()
    with voice(quiet=True):
        assert not console.stdout_is_for_people()


@pytest.mark.parametrize(("seconds", "text"), [
    (0.04, "0.0 s"), (59.94, "59.9 s"), (60, "1:00"), (187.4, "3:07"), (3599.6, "1:00:00"), (7387, "2:03:07"),
])
def test_spans(seconds: float, text: str) -> None:
    assert span(seconds) == text


@pytest.mark.parametrize(("seconds", "share", "text"), [
    (10, 0.5, "0:10"), (10, 0.0, None), (0, 0.5, None), (10, 1.0, "0:00"), (100, 0.5, "1:40"),
    (59.7, 0.5, "1:00"),
])
def test_time_left(seconds: float, share: float, text: str | None) -> None:
    assert remaining(seconds, share) == text


@pytest.mark.parametrize(("value", "unit", "text"), [
    (999, "bytes", "999 bytes"), (31_500_000, "bytes", "31.5 MB"), (1_234_000_000_000, "bytes", "1,234 GB"),
    (1500, "bytes", "1.5 kB"), (999_999, "bytes", "1 MB"), (1234.4, "documents", "1,234 documents"),
])
def test_amounts(value: float, unit: str, text: str) -> None:
    assert amount(value, unit) == text


@pytest.mark.parametrize(("value", "text"), [
    (999, "999"), (20_480, "20.5K"), (1e6, "1M"), (999_999, "1M"), (2e10, "20B"),
])
def test_short_numbers(value: float, text: str) -> None:
    assert short(value) == text


@pytest.mark.parametrize(("value", "text"), [(0, "0 steps"), (1, "1 step"), (1234, "1,234 steps")])
def test_counts(value: int, text: str) -> None:
    assert count(value, "step") == text
