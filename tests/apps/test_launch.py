"""One command as several processes: what each is given, how the job ends, and what is told of it."""

from __future__ import annotations

import json
import os
import shlex
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from importlib.machinery import ModuleSpec
from pathlib import Path
from typing import Any

import pytest
from ruamel.yaml import YAML
from torch.distributed.run import get_args_parser

import llmtrainer
from llmtrainer.apps import launch as launching
from llmtrainer.apps.cli import main
from llmtrainer.apps.launch import Launched, Launching, MachinesMissing, launch, torchrun_line
from llmtrainer.base.config import load, sorted_words
from llmtrainer.base.errors import UserError

ROOT = Path(llmtrainer.__file__).parents[1]

RANK = """
import json, os, signal, sys, time
from pathlib import Path
from llmtrainer.base import outcome
from llmtrainer.base.process import launched

def until(made):
    deadline = time.monotonic() + 60
    while not made() and time.monotonic() < deadline:
        time.sleep(0.02)
    assert made()

given = dict(os.environ)
rank, place = int(os.environ["RANK"]), Path({place!r})
outcome.begin()
(place / f"given-{{rank}}.json").write_text(json.dumps(given))
until(lambda: len(list(place.glob("given-*.json"))) == int(os.environ["WORLD_SIZE"]))
{body}
"""


@pytest.fixture
def job(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Callable[..., Launched]:
    """Launch ranks that run `body` and nothing of torch; every one begins once all are there."""

    def run(body: str, nproc: int = 2, **settings: object) -> Launched:
        script = tmp_path / "rank.py"
        for old in tmp_path.glob("given-*.json"):
            old.unlink()
        script.write_text(RANK.format(place=str(tmp_path), body=body))
        monkeypatch.setattr(launching.Line, "arguments", lambda line: [*line.options, str(script)])
        monkeypatch.setenv("PYTHONPATH", str(ROOT))
        return launch(Launching.model_validate({"command": ("train", "r.yaml"), "nproc": nproc, **settings}))

    return run


def given(folder: Path, rank: int) -> dict[str, str]:
    found: dict[str, str] = json.loads((folder / f"given-{rank}.json").read_text())
    return found


def test_keys_before_the_inner_verb_are_launchs_own_and_all_after_it_belongs_to_the_command() -> None:
    words = ["--nproc", "2", "threads=3", "train", "r.yaml", "nproc=7", "engine.kind=ddp", "--run", "x", "--", "a=b"]
    file, overrides, command = sorted_words(Launching, words)
    config = load(Launching, file, overrides, command)
    assert (config.nproc, config.threads) == (2, 3)
    assert config.command == ("train", "r.yaml", "nproc=7", "engine.kind=ddp", "--run", "x", "--", "a=b")


def test_one_machine_meets_at_a_free_port_and_several_where_they_were_told(capsys: pytest.CaptureFixture[str]) -> None:
    alone = torchrun_line(Launching(command=("train", "r.yaml"), nproc=4), ["train", "r.yaml"])
    assert "--rdzv-endpoint=127.0.0.1:0" in alone.options and "--nproc-per-node=4" in alone.options
    settings = {"command": ("train",), "nproc": 2, "nnodes": 3, "node_rank": 2, "rendezvous": "first:555", "wait": 9.0}
    among = torchrun_line(Launching.model_validate(settings), ["train"])
    for option in ("--nnodes=3", "--node-rank=2", "--rdzv-endpoint=first:555", "--rdzv-conf=timeout=9"):
        assert option in among.options
    assert main(["launch", "--nproc", "2", "--threads", "5", "--show", "train", "a b.yaml"]) == 0
    words = shlex.split(capsys.readouterr().out)
    assert words[0] == "OMP_NUM_THREADS=5" and words[-4:] == ["-m", "llmtrainer", "train", "a b.yaml"]
    assert words[2:4] == ["-m", "torch.distributed.run"]


@pytest.mark.parametrize(
    ("settings", "named"),
    [
        ({"command": ()}, "no command"), ({"command": ("trian",)}, "no verb"),
        ({"command": ("train",), "nnodes": 2}, "rendezvous"),
        ({"command": ("train",), "nnodes": 2, "rendezvous": "a:1"}, "node_rank"),
        ({"command": ("train",), "nnodes": 2, "rendezvous": "a:1", "node_rank": 2}, "counted from 0"),
        ({"command": ("train",), "nnodes": 2, "rendezvous": "a:b", "node_rank": 0}, "no HOST:PORT"),
        ({"command": ("train",), "node_rank": 1}, "of one machine"),
    ],
)  # fmt: skip
def test_what_cannot_be_launched_is_refused_before_anything_starts(settings: dict[str, Any], named: str) -> None:
    with pytest.raises(UserError, match=named):
        launch(Launching.model_validate(settings))


def test_torchrun_is_given_only_options_that_this_torch_has(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    options = {option for action in get_args_parser()._actions for option in action.option_strings}
    line = torchrun_line(Launching(command=("train", "r.yaml"), nproc=2), ["train", "r.yaml"])
    assert {word.partition("=")[0] for word in line.options if word.startswith("--")} <= options
    assert any(word.startswith("--shutdown-timeout=") for word in line.options)
    (tmp_path / "distributed").mkdir()
    (tmp_path / "distributed/run.py").write_text('parser.add_argument("--monitor-interval")\n')
    older = ModuleSpec("torch", None, origin=str(tmp_path / "__init__.py"))
    monkeypatch.setattr(launching, "find_spec", lambda name: older)
    line = torchrun_line(Launching(command=("train", "r.yaml"), nproc=2), ["train", "r.yaml"])
    assert not any("shutdown" in word for word in line.options)


def test_every_rank_gets_its_share_of_the_cores_unless_the_user_said_how_many(
    job: Callable[..., Launched], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    body = "outcome.end(0, f'rank {rank}', result={'rank': rank})"
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    monkeypatch.setattr("llmtrainer.base.process.cores", lambda: 7)
    done = job(body)
    assert (done.exit_code, done.text(), done.json()) == (0, "rank 0", {"rank": 0})
    assert [given(tmp_path, rank)["OMP_NUM_THREADS"] for rank in (0, 1)] == ["3", "3"]
    assert [given(tmp_path, rank)["LOCAL_RANK"] for rank in (0, 1)] == ["0", "1"]
    assert "OMP_NUM_THREADS" not in os.environ and "LLMTRAINER_OUTCOMES" not in os.environ
    monkeypatch.setenv("OMP_NUM_THREADS", "5")
    job(body, nproc=1)
    assert given(tmp_path, 0)["OMP_NUM_THREADS"] == "5"


def test_a_rank_that_a_person_has_to_mend_ends_the_job_with_its_own_error(job: Callable[..., Launched]) -> None:
    with pytest.raises(UserError) as caught:
        job("""
if rank == 1:
    outcome.end(2, "no such file", error={"what": "no such file", "where": "r.yaml:3", "fix": "data.train=x"})
    sys.exit(2)
time.sleep(600)
""")
    error = caught.value
    assert (error.what, error.where, error.fix) == ("no such file", "rank 1 of 2, r.yaml:3", "data.train=x")


def test_the_rank_that_was_killed_is_named_and_not_the_one_that_lost_it(
    job: Callable[..., Launched], capfd: pytest.CaptureFixture[str]
) -> None:
    done = job("""
if rank == 1:
    (place / "pid").write_text(str(os.getpid()))
    until(lambda: (place / "lost").exists())    # else rank 0 may be ended before it has said anything
    os.kill(os.getpid(), signal.SIGKILL)

def killed():
    try:
        os.kill(int((place / "pid").read_text()), 0)
    except ProcessLookupError:                  # torchrun has seen that it is dead
        return True

until((place / "pid").exists)
until(lambda: (place / "pid").read_text())
outcome.end(1, "a defect of ours: RuntimeError: Connection closed by peer [127.0.0.1]:1", error={})
(place / "lost").touch()
until(killed)                                   # else rank 1 may be ended before it is killed
sys.exit(1)
""")
    assert done.exit_code == 1 and done.json()["error"]["rank"] == 1 and done.json()["error"]["signal"] == 9
    said = capfd.readouterr().err
    assert said.index("rank 1 of 2 was killed by SIGKILL") < said.index("after it, rank 0")
    assert "ChildFailedError" not in said


def test_of_two_ranks_that_raise_the_first_is_told_with_its_traceback(
    job: Callable[..., Launched], capfd: pytest.CaptureFixture[str]
) -> None:
    done = job("""
if rank == 0:
    until(lambda: (place / "raised").exists())
    outcome.end(1, "a defect of ours: ValueError: later", error={"traceback": "at 0"})
    sys.exit(1)
outcome.end(1, "a defect of ours: KeyError: 'first'", error={"traceback": "Traceback: at one.py"})
(place / "raised").touch()
sys.exit(1)
""")
    assert done.exit_code == 1 and done.json()["error"]["rank"] == 1
    assert "rank 1 of 2: a defect of ours: KeyError: 'first'\nTraceback: at one.py" in capfd.readouterr().err


def test_a_stop_reaches_every_rank_once_and_none_is_killed_while_it_saves(
    job: Callable[..., Launched], tmp_path: Path
) -> None:
    """Rank 1 is done first: torchrun would count its code 3 as a failure, and end rank 0 in its checkpoint."""

    def ask() -> None:
        deadline = time.monotonic() + 60
        while len(list(tmp_path.glob("ready-*"))) < 2 and time.monotonic() < deadline:
            time.sleep(0.02)
        os.kill(os.getpid(), signal.SIGTERM)

    asking = threading.Thread(target=ask)
    asking.start()
    done = job("""
from llmtrainer.base.process import StopRequests
with StopRequests() as stop:
    (place / f"ready-{rank}").touch()
    until(lambda: stop.requested)
if rank == 0:
    until(lambda: (place / "one-is-done").exists())
outcome.end(3, f"stopped: {stop.requested}", result={"stopped": stop.requested})
if rank == 1:
    (place / "one-is-done").touch()
""")
    asking.join()
    assert (done.exit_code, done.json()) == (3, {"stopped": "SIGTERM"})


@pytest.mark.parametrize("node_rank", [0, 1])
def test_a_machine_that_does_not_come_is_explained(node_rank: int) -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
    settings = {
        "command": ("train", "r.yaml"), "nproc": 1, "nnodes": 2, "node_rank": node_rank, "wait": 1.0,
        "rendezvous": f"127.0.0.1:{port}",
    }  # fmt: skip
    with pytest.raises(MachinesMissing) as caught:
        launch(Launching.model_validate(settings))
    expected = "not all of the 2 machines came" if node_rank == 0 else "machine 0 was not found"
    assert expected in caught.value.what and f"127.0.0.1:{port}" in str(caught.value.fix)


def test_a_batch_script_runs_the_command_on_every_machine_with_its_own_place(tmp_path: Path) -> None:
    script = launch(Launching.model_validate({
        "command": ("train", "my recipe.yaml", "data.train=it's here"), "nproc": 8, "nnodes": 2, "slurm": True,
        "cluster": {"time": "1:00:00", "memory": "64G"},
    })).text()  # fmt: skip
    path = tmp_path / "job.sh"
    path.write_text(script)
    assert subprocess.run(["bash", "-n", str(path)]).returncode == 0
    for asked in ("--nodes=2", "--ntasks-per-node=1", "--gpus-per-node=8", "--time=1:00:00", "--mem=64G"):
        assert f"#SBATCH {asked}\n" in script
    bin_ = tmp_path / "bin"
    bin_.mkdir()
    programs = {
        "scontrol": "#!/bin/bash\nprintf 'alpha\\nbeta\\n'\n",
        "srun": '#!/bin/bash\nshift\nfor SLURM_NODEID in 0 1; do export SLURM_NODEID; "$@"; done\n',
        "llmtrainer": f'#!/bin/bash\n"{sys.executable}" -c "import json,sys; print(json.dumps(sys.argv[1:]))" "$@"\n',
    }
    for name, text in programs.items():
        (bin_ / name).write_text(text)
        (bin_ / name).chmod(0o755)
    environment = {"PATH": f"{bin_}:{os.environ['PATH']}", "SLURM_JOB_ID": "41", "SLURM_NNODES": "2"}
    environment["SLURM_JOB_NODELIST"] = "alpha,beta"
    done = subprocess.run(["bash", str(path)], env=environment, text=True, capture_output=True)
    assert [json.loads(line) for line in done.stdout.splitlines()] == [
        ["launch", "--nproc", "8", "--nnodes", "2", "--node-rank", str(place), "--rendezvous", "alpha:20041",
         "train", "my recipe.yaml", "data.train=it's here"]
        for place in (0, 1)
    ], done.stderr  # fmt: skip


def test_a_kubernetes_job_has_a_pod_a_machine_and_a_name_under_which_they_meet() -> None:
    settings = {"command": ("train", "r.yaml"), "nproc": 4, "nnodes": 3, "kubernetes": True}
    with pytest.raises(UserError, match="image"):
        launch(Launching.model_validate(settings))
    settings["cluster"] = {"image": "here/llmtrainer:1", "claim": "disk", "name": "tune", "memory": "64G"}
    text = launch(Launching.model_validate(settings)).text()
    service, job = YAML(typ="safe", pure=True).load_all(text)
    assert (service["kind"], service["spec"]["clusterIP"]) == ("Service", "None")
    assert (job["apiVersion"], job["kind"], job["metadata"]["name"]) == ("batch/v1", "Job", "tune")
    spec, pod = job["spec"], job["spec"]["template"]["spec"]
    assert (spec["completions"], spec["parallelism"], spec["completionMode"]) == (3, 3, "Indexed")
    assert pod["restartPolicy"] == "Never" and pod["subdomain"] == service["metadata"]["name"]
    (container,) = pod["containers"]
    assert container["command"] == [
        "llmtrainer", "launch", "--nproc", "4", "--nnodes", "3", "--node-rank", "$(JOB_COMPLETION_INDEX)",
        "--rendezvous", "tune-0.tune:29400", "train", "r.yaml",
    ]  # fmt: skip
    assert container["resources"]["limits"] == {"cpu": "32", "memory": "64Gi", "nvidia.com/gpu": "4"}
    assert service["spec"]["selector"].items() <= job["spec"]["template"]["metadata"]["labels"].items()
    (rule,) = spec["podFailurePolicy"]["rules"]
    assert rule["action"] == "FailJob" and rule["onExitCodes"]["values"] == [2, 3]
    assert {mount["name"] for mount in container["volumeMounts"]} == {volume["name"] for volume in pod["volumes"]}
