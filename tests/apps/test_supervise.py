"""A supervised run comes to its end: crashes and hangs are started again, mistakes and requests are not."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import llmtrainer
from llmtrainer.apps.stop import Stopping, stop
from llmtrainer.apps.supervise import Supervised, Supervision, supervise
from llmtrainer.base import supervision
from llmtrainer.base.errors import UserError
from llmtrainer.base.rundir import RunDir

ROOT = Path(llmtrainer.__file__).parents[1]

CHILD = """
import os, signal, sys, time
from pathlib import Path
from llmtrainer.base import outcome
from llmtrainer.base.heartbeat import Heartbeat
from llmtrainer.base.process import StopRequests
from llmtrainer.base.rundir import RunDir

def until(made):
    deadline = time.monotonic() + 60
    while not made() and time.monotonic() < deadline:
        time.sleep(0.02)
    assert made()

def checkpoint(step):
    folder = run.checkpoint(step)
    folder.mkdir(parents=True)
    (folder / "manifest.json").write_text("{{}}")

outcome.begin()
run = RunDir(Path({run!r}))
log = run.path / "attempts"
with log.open("a") as file:
    file.write(" ".join(sys.argv[1:]) + "\\n")
attempt = len(log.read_text().splitlines())
with run.locked():
{body}
"""


class Watched:
    """A run directory, and a command that does what the test says."""

    def __init__(self, path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        self.path, self.script = path / "run", path / "child.py"
        monkeypatch.setenv("PYTHONPATH", str(ROOT))
        monkeypatch.setattr(supervision, "program", lambda: [sys.executable, str(self.script)])

    def does(self, body: str) -> None:
        text = "\n".join(f"    {line}" for line in body.strip().splitlines())
        self.script.write_text(CHILD.format(run=str(self.path), body=text))

    def supervise(self, body: str, **settings: Any) -> Supervised:
        self.does(body)
        command = ("train", f"run={self.path}")
        return supervise(Supervision.model_validate({"command": command, "backoff": 0.01, **settings}))

    @property
    def attempts(self) -> list[str]:
        """The words of every start."""
        return (self.path / "attempts").read_text().splitlines()


@pytest.fixture
def watched(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Watched:
    return Watched(tmp_path, monkeypatch)


def test_a_command_that_crashes_twice_is_started_twice_again_and_continues(watched: Watched) -> None:
    """The second start has a checkpoint of the first, and says so whatever the recipe says of resuming."""
    done = watched.supervise("""
if attempt == 1:
    checkpoint(4)
    sys.exit(1)
if attempt == 2:
    os.kill(os.getpid(), signal.SIGKILL)
outcome.end(0, "all is well", result={"step": 9})
""")
    assert (done.exit_code, done.restarts, done.json()["result"]) == (0, 2, {"step": 9})
    plain = f"train run={watched.path}"
    assert watched.attempts == [plain, f"{plain} resume=auto", f"{plain} resume=auto"]
    assert "dead rank" in done.findings[1] and "signal 9" in done.findings[1]


def test_a_crash_loop_ends_at_the_limit_and_waits_longer_each_time(
    watched: Watched, capsys: pytest.CaptureFixture[str]
) -> None:
    done = watched.supervise("sys.exit(1)", restarts=3, backoff=0.01, longest_backoff=0.03)
    assert (done.exit_code, len(watched.attempts)) == (1, 4)
    said = capsys.readouterr().err
    assert [f"starts again in {seconds} s" in said for seconds in (0.01, 0.02, 0.03, 0.04)] == [True] * 3 + [False]
    assert "gives up after 4 crashes" in said


def test_a_checkpoint_between_two_crashes_begins_the_count_anew(watched: Watched) -> None:
    done = watched.supervise("""
if attempt < 6:
    checkpoint(attempt)
    sys.exit(1)
outcome.end(0, "")
""", restarts=1)
    assert (done.exit_code, done.restarts) == (0, 5)


def test_what_a_person_has_to_mend_is_told_and_never_tried_again(watched: Watched) -> None:
    with pytest.raises(UserError) as caught:
        watched.supervise("""
outcome.end(2, "no", error={"what": "no such file", "where": "r.yaml:3", "fix": "data.train=x", "type": "UserError"})
sys.exit(2)
""")
    assert (caught.value.what, caught.value.where, caught.value.fix) == ("no such file", "r.yaml:3", "data.train=x")
    assert len(watched.attempts) == 1


def test_machines_that_did_not_come_are_waited_for_again(watched: Watched) -> None:
    done = watched.supervise("""
if attempt == 1:
    outcome.end(2, "not all came", error={"what": "not all came", "type": "MachinesMissing"})
    sys.exit(2)
outcome.end(0, "")
""")
    assert (done.exit_code, done.restarts) == (0, 1)


def test_a_run_that_was_asked_to_stop_is_not_started_again(watched: Watched) -> None:
    done = watched.supervise('outcome.end(3, "stopped", result={"stopped": "SIGTERM"})\nsys.exit(3)')
    assert (done.exit_code, done.restarts, len(watched.attempts)) == (3, 0, 1)


def test_a_run_without_a_sign_of_life_is_killed_told_by_its_line_and_started_again(
    watched: Watched, capsys: pytest.CaptureFixture[str]
) -> None:
    done = watched.supervise("""
if attempt == 2:
    outcome.end(0, "")
    sys.exit(0)
with Heartbeat(run.control / "heartbeats") as heart:
    for step in range(1, 4):
        heart.beat("data", step)
    time.sleep(600)  # here it hangs
""", stall=2.0, hang=3.0)
    assert (done.exit_code, done.restarts) == (0, 1)
    line = next(number for number, text in enumerate(watched.script.read_text().splitlines(), 1) if "hangs" in text)
    assert "slow loader: rank 0" in done.findings[0] and f"child.py:{line} in <module>" in done.findings[0]
    assert "stands still" in capsys.readouterr().err
    assert "slow loader" in (watched.path / "log.txt").read_text()


def test_a_process_in_which_no_python_runs_still_gives_its_line(watched: Watched) -> None:
    """The thread that describes a stall needs the interpreter, which this loop never lets go."""
    done = watched.supervise("""
if attempt == 2:
    outcome.end(0, "")
    sys.exit(0)
with Heartbeat(run.control / "heartbeats") as heart:
    for step in range(1, 4):
        heart.beat("forward", step)
    sys.setswitchinterval(600)
    while True:
        attempt += 0
""", stall=2.0, hang=3.0)
    assert (done.exit_code, done.restarts) == (0, 1)
    assert "stuck: rank 0" in done.findings[0] and "child.py:" in done.findings[0]


def test_a_run_that_says_nothing_at_all_is_a_hang_after_the_given_time(watched: Watched) -> None:
    done = watched.supervise('time.sleep(600 if attempt == 1 else 0)\noutcome.end(0, "")', patience=4.0)
    assert done.exit_code == 0 and done.restarts >= 1
    assert "no sign of life" in done.findings[0]


def in_its_own_process(watched: Watched) -> subprocess.Popen[bytes]:
    """A supervisor that can be killed."""
    program = f"""
from llmtrainer.apps.supervise import Supervision, supervise
from llmtrainer.base import supervision
supervision.program = lambda: [{sys.executable!r}, {str(watched.script)!r}]
supervise(Supervision(command=("train", "run={watched.path}"), backoff=0.01))
"""
    return subprocess.Popen([sys.executable, "-c", program], start_new_session=True)


def until(made: Callable[[], object]) -> None:
    deadline = time.monotonic() + 60
    while not made():
        assert time.monotonic() < deadline
        time.sleep(0.02)


def test_a_second_supervisor_is_refused_and_takes_over_when_the_first_is_dead(watched: Watched) -> None:
    """The command outlives its supervisor, and its end is known to the next one, who was not its parent."""
    body = """
until(lambda: (run.path / "go").exists())
if attempt == 1:
    sys.exit(1)
outcome.end(0, "", result={"attempt": attempt})
"""
    watched.does(body)
    first = in_its_own_process(watched)
    until(lambda: (watched.path / "attempts").exists())     # it has read its file: written again below
    with pytest.raises(UserError, match=f"this run has a supervisor, process {first.pid}"):
        watched.supervise(body)
    before = supervision.read_state(watched.path / "control").pid
    first.kill()
    first.wait()
    (watched.path / "go").touch()
    done = watched.supervise(body)
    assert (done.exit_code, done.restarts, done.result) == (0, 1, {"attempt": 2})
    assert before != supervision.read_state(watched.path / "control").pid


def test_what_ended_while_nobody_watched_is_not_done_twice(watched: Watched) -> None:
    body = 'until(lambda: (run.path / "go").exists())\noutcome.end(0, "", result={"attempt": attempt})'
    watched.does(body)
    first = in_its_own_process(watched)
    until(lambda: (watched.path / "attempts").exists())
    child = supervision.read_state(watched.path / "control")
    first.kill()
    first.wait()
    (watched.path / "go").touch()
    until(lambda: not supervision.is_alive(child.pid, child.started))
    done = watched.supervise(body)
    assert (done.exit_code, done.result, len(watched.attempts)) == (0, {"attempt": 1}, 1)


def test_stop_ends_a_supervised_run_and_its_supervisor(watched: Watched) -> None:
    watched.does("""
with StopRequests(run.control) as stop, Heartbeat(run.control / "heartbeats") as heart:
    heart.beat("forward", 7)
    until(lambda: stop.requested)
    checkpoint(7)
outcome.end(3, "", result={"stopped": stop.requested})
sys.exit(3)
""")
    first = in_its_own_process(watched)
    until(lambda: (watched.path / "control" / "heartbeats" / "rank-0.beat").exists())
    done = stop(Stopping(run=str(watched.path), reason="enough"))
    assert (done.was_running, done.checkpoint) == (True, "step-00000007")
    assert first.wait(timeout=60) == 0 and len(watched.attempts) == 1
    assert not (watched.path / "control" / "stop").exists()
    assert stop(Stopping(run=str(watched.path))).was_running is False
    assert not (watched.path / "control" / "stop").exists()


def test_a_signal_to_the_supervisor_stops_the_run_in_order(watched: Watched) -> None:
    def ask() -> None:
        until(lambda: (watched.path / "ready").exists())
        os.kill(os.getpid(), signal.SIGTERM)

    asking = threading.Thread(target=ask)
    asking.start()
    done = watched.supervise("""
with StopRequests(run.control) as stop:
    (run.path / "ready").touch()
    until(lambda: stop.requested)
outcome.end(3, "", result={"stopped": stop.requested})
sys.exit(3)
""")
    asking.join()
    assert (done.exit_code, done.result) == (3, {"stopped": "control/stop: supervise: SIGTERM"})


def test_a_request_while_it_waits_for_a_restart_ends_the_supervisor(watched: Watched) -> None:
    def ask() -> None:
        until(lambda: supervision.read_state(watched.path / "control").restarts)
        (watched.path / "control" / "stop").touch()

    asking = threading.Thread(target=ask)
    asking.start()
    done = watched.supervise("sys.exit(1)", backoff=600.0, longest_backoff=600.0)
    asking.join()
    assert (done.exit_code, len(watched.attempts)) == (3, 1)
    assert not (watched.path / "control" / "stop").exists()


def test_other_machines_are_driven_by_ssh_without_a_password(
    watched: Watched, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """A crash here ends the process there, and both are started again with their places."""
    bin_ = tmp_path / "bin"
    bin_.mkdir()
    (bin_ / "ssh").write_text(f"""#!{sys.executable}
import json, os, sys
with open({str(tmp_path / "ssh.jsonl")!r}, "a") as file:
    file.write(json.dumps(sys.argv[1:]) + "\\n")
os.execvp("bash", ["bash", "-c", sys.argv[-1]])
""")
    (bin_ / "ssh").chmod(0o755)
    monkeypatch.setenv("PATH", f"{bin_}:{os.environ['PATH']}")
    watched.script.write_text(f"""
import os, sys, time
from pathlib import Path
from llmtrainer.base import outcome
outcome.begin()
run = Path({str(watched.path)!r})
place = next(word.partition("=")[2] for word in sys.argv if word.startswith("node_rank="))
with (run / "attempts").open("a") as file:
    file.write(" ".join(sys.argv[1:]) + "\\n")
(run / f"there-{{place}}-{{os.getpid()}}").touch()
while len(list(run.glob("there-*"))) % 2:
    time.sleep(0.02)
if place == "1":
    time.sleep(600 if len(list(run.glob("there-*"))) < 3 else 0)
elif len(list(run.glob("there-*"))) < 3:
    sys.exit(1)
outcome.end(0, "", result={{}})
""")
    watched.path.mkdir()
    command = ("launch", "nproc=2", "rendezvous=first:29400", "train", f"run={watched.path}")
    done = supervise(Supervision(command=command, hosts=("second",), backoff=0.01))
    assert (done.exit_code, done.restarts) == (0, 1)
    calls = [json.loads(line) for line in (tmp_path / "ssh.jsonl").read_text().splitlines()]
    assert all(call[:2] == ["-o", "BatchMode=yes"] and call[-2] == "second" for call in calls)
    assert not any("pass" in word.lower() for call in calls for word in call)
    lines = sorted({line for line in watched.attempts})
    assert lines == [
        f"launch nproc=2 rendezvous=first:29400 nnodes=2 node_rank={place} train run={watched.path}" for place in (0, 1)
    ]
    pids = [int(path.name.rpartition("-")[2]) for path in watched.path.glob("there-1-*")]
    assert len(pids) == 2 and not any(Path(f"/proc/{pid}").exists() for pid in pids)


@pytest.mark.parametrize(
    ("command", "found"),
    [
        (("train", "r.yaml"), "runs/of-file"), (("train", "r.yaml", "run=runs/x"), "runs/x"),
        (("train", "r.yaml", "--run", "runs/y"), "runs/y"), (("train", "r.yaml", "--run=runs/z"), "runs/z"),
        (("launch", "--nproc", "2", "train", "r.yaml", "run=runs/w"), "runs/w"),
    ],
)  # fmt: skip
def test_the_run_directory_is_the_one_that_the_command_will_use(
    command: tuple[str, ...], found: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("r.yaml").write_text("run: runs/of-file\n")
    held = RunDir(Path(found))
    with supervision.watching(held), pytest.raises(UserError, match="has a supervisor") as caught:
        supervise(Supervision(command=command))
    assert caught.value.where == found


def test_stop_names_a_run_directory_that_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no run directory"):
        stop(Stopping(run=str(tmp_path / "nowhere")))
