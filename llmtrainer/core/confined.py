"""A program of its own, run inside a sandbox: gives up what it might do, then runs code that nobody trusts.

Needs nothing but the standard library, and is started by its path: it knows no package. `core/sandbox.py` says what
it is to do, in a JSON object on the descriptor that its one argument names:

    script    run `source` as a program
    serve     import `source`; call its functions for somebody who asks, with plain values in both directions
    test      import `setup`, then run `tests` against functions that a `serve` process has; tell the verdict
"""

from __future__ import annotations

import builtins
import ctypes
import importlib.abc
import importlib.util
import json
import os
import resource
import struct
import sys
from collections.abc import Callable, Mapping
from contextlib import suppress
from types import ModuleType
from typing import Any

DEPTH = 200
"""Lists in lists in a value that is sent."""

_CREATE, _ADD, _RESTRICT = 444, 445, 446
"""Landlock's system calls, the same on every machine."""
_WRITE, _READ, _LIST = 2, 4, 8
_REMOVE_AND_MAKE = 0x10 | 0x20 | 0x80 | 0x100 | 1 << 13 | 1 << 14
_HANDLED = {1: 2**13 - 1, 2: 2**14 - 1, 3: 2**15 - 1, 4: 2**15 - 1}
"""Kinds of access by Landlock's version; from the fifth on, controlling devices is one more."""


def main() -> None:
    """Read what to do, give up what is not needed for it, and do it."""
    with open(int(sys.argv[1]), encoding="utf-8") as told:
        task = json.load(told)
    failed = confine(task)
    if failed and task["required"]:
        sys.exit(", ".join(failed))
    # What the start of Python without `site` leaves out, and programs end with.
    vars(builtins).update(exit=sys.exit, quit=sys.exit)
    # Said before anything runs that nobody trusts, where only this program can say it.
    os.write(task["begins"], b"+")
    os.close(task["begins"])
    {"script": _script, "serve": _serve, "test": _test}[task["do"]](task)


def confine(task: Mapping[str, Any]) -> list[str]:
    """Give up everything but the folder, and set the limits. Returns what could not be done."""
    libc = ctypes.CDLL(None, use_errno=True)
    failed = []
    os.chdir(task["folder"])
    steps: list[tuple[str, Callable[[], None]]] = [
        ("limits", lambda: _limit(task)), ("end with the parent", lambda: _end_with_parent(libc, task["parent"])),
        ("privileges", lambda: _drop(libc)), ("files", lambda: _landlock(libc, task["readable"], task["folder"])),
        ("system calls", lambda: _seccomp(libc, bytes.fromhex(task["filter"]))),
    ]
    for name, step in steps:
        try:
            step()
        except (OSError, ValueError, AttributeError):
            failed.append(name)
    return failed


def _limit(task: Mapping[str, Any]) -> None:
    limits = {
        resource.RLIMIT_CPU: task["cpu_seconds"], resource.RLIMIT_AS: task["memory"], resource.RLIMIT_CORE: 0,
        resource.RLIMIT_FSIZE: task["disk"], resource.RLIMIT_NOFILE: 64,
    }
    if not task["filter"]:      # else the filter refuses processes, and threads are welcome
        limits[resource.RLIMIT_NPROC] = 1
    for what, value in limits.items():
        resource.setrlimit(what, (value, value))


def _end_with_parent(libc: ctypes.CDLL, parent: int) -> None:
    _done(libc.prctl(1, 9, 0, 0, 0))      # PR_SET_PDEATHSIG
    if os.getppid() != parent:
        sys.exit("the parent is gone")


def _drop(libc: ctypes.CDLL) -> None:
    """No new privileges, and none of the old ones."""
    _done(libc.prctl(38, 1, 0, 0, 0))     # PR_SET_NO_NEW_PRIVS
    header = struct.pack("=Ii", 0x20080522, 0)
    _done(libc.capset(header, bytes(24)))


def _landlock(libc: ctypes.CDLL, readable: list[str], folder: str) -> None:
    """Only these may be read, and only the folder written."""
    version = libc.syscall(_CREATE, None, 0, 1)
    _done(version)
    handled = _HANDLED.get(version, 2**16 - 1)
    attributes = struct.pack("=QQQ", handled, 3, 3)[: 8 if version < 4 else 16 if version < 6 else 24]
    ruleset = _done(libc.syscall(_CREATE, attributes, len(attributes), 0))
    own = (folder, _READ | _LIST | _WRITE | _REMOVE_AND_MAKE)
    for path, access in [*((path, _READ | _LIST) for path in readable), own]:
        try:
            opened = os.open(path, os.O_PATH | os.O_CLOEXEC)
        except OSError:
            continue
        if not os.path.isdir(path):
            access &= _READ
        rule = struct.pack("=Qi", access & handled, opened)
        _done(libc.syscall(_ADD, ruleset, 1, rule, 0))
        os.close(opened)
    _done(libc.syscall(_RESTRICT, ruleset, 0))
    os.close(ruleset)


def _seccomp(libc: ctypes.CDLL, code: bytes) -> None:
    if not code:
        raise OSError("no filter for this machine")
    lines = ctypes.create_string_buffer(code, len(code))
    program = struct.pack("@HP", len(code) // 8, ctypes.addressof(lines))
    _done(libc.prctl(22, 2, program, 0, 0))       # PR_SET_SECCOMP, SECCOMP_MODE_FILTER


def _done(result: int) -> int:
    if result < 0:
        raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()))
    return result


class Text(importlib.abc.InspectLoader):
    """Imports a text."""

    def __init__(self, source: str) -> None:
        self.source = source

    def get_source(self, fullname: str) -> str:
        return self.source

    def into(self, module: ModuleType) -> None:
        self.exec_module(module)


def module_of(name: str) -> ModuleType:
    """An empty module that an import finds."""
    spec = importlib.util.spec_from_loader(name, Text(""))
    assert spec is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    return module


def _script(task: Mapping[str, Any]) -> None:
    Text(task["source"]).into(module_of("__main__"))


def _serve(task: Mapping[str, Any]) -> None:
    """Answer calls until nobody asks any more."""
    module = module_of("answer")
    requests, replies = Lines(task["requests"], task["message"]), task["replies"]
    try:
        Text(task["source"]).into(module)
        say(replies, {"ready": True})
    except BaseException as error:
        say(replies, {"error": kinds_of(error)})
        return
    while (request := requests.next()) is not None:
        try:
            function = getattr(module, request["name"])
            value = function(*decoded(request["args"]), **decoded(request["named"]))
            reply = {"value": encoded(value)}
        except BaseException as error:
            reply = {"error": kinds_of(error)}
        say(replies, reply)


def kinds_of(error: BaseException) -> list[str]:
    """The built-in exceptions that one is, the nearest first."""
    return [kind.__name__ for kind in type(error).__mro__ if vars(builtins).get(kind.__name__) is kind]


def known(names: Any) -> tuple[str, Exception]:
    """What `kinds_of` told, or whoever pretends to it: the name of the nearest, and an exception to raise in its
    place. The name is Python's own, never a text of the code's choosing."""
    told = [vars(builtins).get(name) for name in names if isinstance(name, str)] if isinstance(names, list) else []
    kinds = [kind for kind in told if isinstance(kind, type) and issubclass(kind, BaseException)]
    name = kinds[0].__name__ if kinds else "Exception"
    for kind in kinds:
        with suppress(TypeError):       # some want more than a text
            if issubclass(kind, Exception):
                return name, kind(name)
    return name, RuntimeError(name)


class Gone(Exception):
    """The process that has the functions gives no more answers."""


class Subject:
    """A function that another process has. Only plain values come back, so that nothing of it runs here."""

    def __init__(self, name: str, line: Line) -> None:
        self.__name__ = name
        self._line = line

    def __call__(self, *args: Any, **named: Any) -> Any:
        return self._line.ask({"name": self.__name__, "args": encoded(args), "named": encoded(named)})


class Line:
    """Questions to a `serve` process."""

    def __init__(self, task: Mapping[str, Any]) -> None:
        self._requests, self._replies = task["requests"], Lines(task["replies"], task["message"])
        self.calls = 0
        self.gone = False
        self.error: str | None = None
        """The first exception that was told, as a reason."""

    def ready(self) -> None:
        """Wait until the functions are there."""
        self._reply()

    def ask(self, question: Mapping[str, Any]) -> Any:
        self.calls += 1
        try:
            say(self._requests, question)
        except OSError:
            self.gone = True
            raise Gone from None
        return self._reply()

    def _reply(self) -> Any:
        reply = None if self.gone else self._replies.next()
        if not isinstance(reply, dict) or not {"value", "error", "ready"} & set(reply):
            self.gone = True
            raise Gone
        if "error" in reply:
            name, error = known(reply["error"])
            self.error = self.error or f"raised {name}"
            raise error
        try:
            return decoded(reply["value"]) if "value" in reply else None
        except (ValueError, TypeError, KeyError, IndexError, RecursionError):
            self.gone = True
            raise Gone from None


def _test(task: Mapping[str, Any]) -> None:
    """Run each test; the verdict goes to a descriptor that no other process has."""
    line = Line(task)
    verdict: dict[str, Any] = {"passed": 0, "of": len(task["tests"]), "calls": 0, "why": None}
    module = module_of("tests")
    try:
        Text(task["setup"]).into(module)
        line.ready()
    except Exception:
        verdict["why"] = line.error or ("died" if line.gone else "tests do not run")
        tell(task["verdict"], verdict, line)
    for name in task["names"]:
        setattr(module, name, Subject(name, line))
    for source in task["tests"]:
        try:
            Text(source).into(module)
            if task["check"] is not None:
                getattr(module, task["check"])(getattr(module, task["entry"]))
            verdict["passed"] += not line.gone
        except AssertionError:
            verdict["why"] = verdict["why"] or "wrong result"
        except Exception as error:
            verdict["why"] = verdict["why"] or line.error or ("died" if line.gone else _reason(error))
    if line.gone:
        verdict["why"] = verdict["why"] or "died"
    tell(task["verdict"], verdict, line)


def _reason(error: Exception) -> str:
    """Why a test ended, where nothing the code did is the cause."""
    name, _ = known(kinds_of(error))
    return f"tests do not run: {name}" if isinstance(error, SyntaxError | NameError | ImportError) else f"raised {name}"


def tell(descriptor: int, verdict: dict[str, Any], line: Line) -> None:
    """The last thing that a tester does."""
    verdict["calls"] = line.calls
    say(descriptor, verdict)
    os._exit(0)


def say(descriptor: int, what: Mapping[str, Any]) -> None:
    """One JSON object in one line."""
    data = json.dumps(what).encode() + b"\n"
    while data:
        data = data[os.write(descriptor, data) :]


class Lines:
    """JSON objects that arrive one a line."""

    def __init__(self, descriptor: int, longest: int) -> None:
        self._descriptor, self._longest, self._held = descriptor, longest, b""

    def next(self) -> Any:
        """The next one; None where no more come, or one is too long or none at all."""
        pieces = [self._held]
        size = len(self._held)
        while b"\n" not in pieces[-1]:
            more = os.read(self._descriptor, 65536)
            pieces.append(more)
            size += len(more)
            if not more or size > self._longest:
                return None
        line, _, self._held = b"".join(pieces).partition(b"\n")
        try:
            return json.loads(line)
        except (ValueError, RecursionError):
            return None


def encoded(value: Any, depth: int = 0) -> Any:
    """A plain value as JSON, its types kept. TypeError for what is no plain value."""
    if depth > DEPTH:
        raise TypeError("too deep")
    below = depth + 1
    if value is None or isinstance(value, bool):
        return value
    if isinstance(value, str):
        return str(value)
    if isinstance(value, int):
        return {"int": hex(value)}
    if isinstance(value, float):
        return {"float": float(value).hex()}
    for kind in (list, tuple, set, frozenset):
        if isinstance(value, kind):
            return {kind.__name__: [encoded(item, below) for item in value]}
    if isinstance(value, dict):
        return {"dict": [[encoded(key, below), encoded(item, below)] for key, item in value.items()]}
    if isinstance(value, bytes):
        return {"bytes": value.hex()}
    if isinstance(value, complex):
        return {"complex": [value.real.hex(), value.imag.hex()]}
    if isinstance(value, range):
        return {"range": [value.start, value.stop, value.step]}
    raise TypeError(f"{type(value).__name__} is no plain value")


def decoded(value: Any) -> Any:
    """What `encoded` was given. ValueError or TypeError for anything else."""
    if value is None or isinstance(value, bool | str):
        return value
    if not isinstance(value, dict) or len(value) != 1:
        raise ValueError("no value")
    ((kind, inside),) = value.items()
    plain: dict[str, Callable[[Any], Any]] = {
        "int": lambda text: int(text, 16), "float": float.fromhex, "bytes": bytes.fromhex,
        "complex": lambda pair: complex(*map(float.fromhex, pair)), "range": lambda three: range(*three),
        "dict": lambda rows: {decoded(key): decoded(item) for key, item in rows},
    }
    several = {"list": list, "tuple": tuple, "set": set, "frozenset": frozenset}
    if kind in several:
        return several[kind](decoded(item) for item in inside)
    return plain[kind](inside)


if __name__ == "__main__":
    main()
