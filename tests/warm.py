"""Commands without the seconds that a process needs to load torch: a server that has loaded everything forks one for
each.

`llmtrainer` on a page is tests/warm_command.py, which hands its words, folder, environment and the three standard
streams to the server and ends with the code that comes back. What `launch` starts is forked too.
"""

from __future__ import annotations

import atexit
import importlib
import json
import os
import runpy
import signal
import socket
import subprocess
import sys
import traceback
import warnings
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
        stdout=subprocess.PIPE, cwd=CLIENT.parent.parent,
    ) as server:    # fmt: skip
        assert server.stdout is not None and server.stdout.readline() == b"ready\n"
        try:
            yield address
        finally:
            server.terminate()


def serve(address: str) -> None:
    """Fork a process for every request, until the end. Says `ready` when all modules are there."""
    from llmtrainer.base.process import wait_passively

    wait_passively()
    importlib.import_module("tests.imported")
    python = Path(f"{address}-python")
    python.write_text(f'#!/bin/sh\nexec {sys.executable} -I -S {CLIENT} {address} "$@"\n')
    python.chmod(0o755)
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
    try:
        _become(json.loads(request), streams, str(python))
        code = 0
    except SystemExit as ended:
        code = ended.code if isinstance(ended.code, int) else 0
    except BaseException:
        traceback.print_exc()
        code = 1
    atexit._run_exitfuncs()
    sys.stdout.flush()
    os._exit(code)      # Python would take down every module, which copies all of memory once more


def _become(request: dict[str, Any], streams: list[int], python: str) -> None:
    """This process is, from now on, the one that was asked for."""
    for place, stream in enumerate(streams):
        os.dup2(stream, place)
        os.close(stream)
    sys.stdin, sys.stdout = os.fdopen(0, closefd=False), os.fdopen(1, "w", closefd=False)
    sys.stderr = os.fdopen(2, "w", buffering=1, errors="backslashreplace", closefd=False)
    os.chdir(request["folder"])
    os.environ.clear()
    os.environ.update(request["environment"])
    if request["environment"].get("PYTHONWARNINGS") == "error":     # which Python reads when it begins
        warnings.simplefilter("error")
    program, *words = (word for word in request["words"] if word != "-u")
    if program == "-m":
        sys.argv = words
        runpy.run_module(words[0], run_name="__main__", alter_sys=True)
    elif program == "llmtrainer":
        from llmtrainer.apps.cli import run

        if words and words[0] == "launch":
            sys.executable = python
        sys.argv = [program, *words]
        run()
    else:
        assert program.endswith(".py"), f"{program} is not loaded beforehand"
        sys.argv, sys.path[:0] = [program, *words], [""]
        runpy.run_path(program, run_name="__main__")
