"""Ranks and requests to stop."""

from __future__ import annotations

import os
import signal
import threading
from pathlib import Path

import pytest

from llmtrainer.base.errors import UserError
from llmtrainer.base.process import StopRequests, local_rank, rank, wait_passively, world_size


def test_alone_without_torchrun_and_one_of_many_with_it(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK"):
        monkeypatch.delenv(name, raising=False)
    assert (rank(), world_size(), local_rank()) == (0, 1, 0)
    for name, value in (("RANK", "5"), ("WORLD_SIZE", "8"), ("LOCAL_RANK", "1")):
        monkeypatch.setenv(name, value)
    assert (rank(), world_size(), local_rank()) == (5, 8, 1)
    monkeypatch.setenv("RANK", "first")
    with pytest.raises(UserError, match="RANK is `first`"):
        rank()


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_is_noted_and_the_old_handler_comes_back(number: signal.Signals) -> None:
    before = signal.getsignal(number)
    with StopRequests() as stop:
        assert stop.requested is None
        os.kill(os.getpid(), number)
        assert stop.requested == number.name
        os.kill(os.getpid(), signal.SIGTERM)    # asking again politely changes nothing
        assert stop.requested == number.name
    assert signal.getsignal(number) is before


def test_the_second_ctrl_c_interrupts_at_once() -> None:
    before = signal.getsignal(signal.SIGINT)
    with pytest.raises(KeyboardInterrupt), StopRequests():
        os.kill(os.getpid(), signal.SIGINT)
        os.kill(os.getpid(), signal.SIGINT)
    assert signal.getsignal(signal.SIGINT) is before


def test_a_file_asks_too_and_is_used_up_when_the_run_ends_in_order(tmp_path: Path) -> None:
    control = tmp_path / "control"
    with StopRequests(control) as stop:
        assert stop.requested is None
        control.mkdir()
        (control / "stop").write_text("maintenance\n")
        assert stop.requested == "control/stop: maintenance"
    assert not (control / "stop").exists()
    (control / "stop").touch()
    with pytest.raises(RuntimeError), StopRequests(control) as stop:
        assert stop.requested == "control/stop"
        raise RuntimeError
    assert (control / "stop").exists()      # whoever is started next still has to know


def test_off_the_main_thread_only_the_file_counts(tmp_path: Path) -> None:
    before = signal.getsignal(signal.SIGTERM)
    found: list[str | None] = []

    def work() -> None:
        with StopRequests(tmp_path) as stop:
            found.append(stop.requested)
            stop.request("enough")
            found.append(stop.requested)

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    assert found == [None, "enough"] and signal.getsignal(signal.SIGTERM) is before


def test_threads_wait_passively_unless_somebody_chose_otherwise(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("OMP_WAIT_POLICY", raising=False)
    wait_passively()
    assert os.environ["OMP_WAIT_POLICY"] == "passive"
    monkeypatch.setenv("OMP_WAIT_POLICY", "active")
    wait_passively()
    assert os.environ["OMP_WAIT_POLICY"] == "active"
