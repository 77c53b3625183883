"""Commands without the seconds that a process needs to load torch: a server that has loaded everything forks one for
each.

`llmtrainer` on a page is tests/warm_command.py, which hands its words, folder, environment and the three standard
streams to the server and ends with the code that comes back.
"""

from __future__ import annotations

import importlib
import json
import os
import pkgutil
import runpy
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

CLIENT = Path(__file__).with_name("warm_command.py")


@contextmanager
def warm(folder: Path) -> Iterator[Path]:
    """The address of a server, which is a socket in this folder, and ends with the block."""
    address = folder / "warm"
    with subprocess.Popen(
        [sys.executable, "-c", "import sys; from tests.warm import serve; serve(sys.argv[1])", str(address)],
        stdout=subprocess.PIPE, env={**os.environ, "PYTHONWARNINGS": "error"},
    ) as server:    # fmt: skip
        assert server.stdout is not None and server.stdout.readline() == b"ready\n"
        yield address
        server.terminate()


def serve(address: str) -> None:
    """Fork a process for every request, until the end. Says `ready` when all modules are there."""
    from llmtrainer.base.process import wait_passively

    wait_passively()
    _load()
    with socket.socket(socket.AF_UNIX) as door:
        door.bind(address)
        door.listen()
        signal.signal(signal.SIGCHLD, signal.SIG_IGN)       # keepers are nobody's business once they have answered
        print("ready", flush=True)
        while True:
            caller, _ = door.accept()
            if os.fork() == 0:
                signal.signal(signal.SIGCHLD, signal.SIG_DFL)
                door.close()
                break
            caller.close()
    request, streams, _, _ = socket.recv_fds(caller, 1 << 20, 3)
    child = os.fork()
    if child:
        caller.send(f"{child}\n".encode())
        code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
        with suppress(BrokenPipeError):
            caller.send(f"{code}\n".encode())
        os._exit(0)
    caller.close()
    _become(json.loads(request), streams)


def _load() -> None:
    import llmtrainer

    for found in pkgutil.walk_packages(llmtrainer.__path__, "llmtrainer."):
        if not found.name.endswith("__main__"):
            with suppress(ImportError):     # of an extra that is not here
                importlib.import_module(found.name)


def _become(request: dict[str, Any], streams: list[int]) -> None:
    """This process is, from now on, the one that was asked for; an ordinary end of Python follows."""
    for place, stream in enumerate(streams):
        os.dup2(stream, place)
        os.close(stream)
    sys.stdin, sys.stdout = open(0, closefd=False), open(1, "w", closefd=False)
    sys.stderr = open(2, "w", buffering=1, errors="backslashreplace", closefd=False)
    os.chdir(request["folder"])
    os.environ.clear()
    os.environ.update(request["environment"])
    program, *words = request["words"]
    sys.argv = [program, *words]
    if program != "llmtrainer":
        sys.path.insert(0, "")
        runpy.run_path(program, run_name="__main__")
        return
    from llmtrainer.apps.cli import run

    run()
