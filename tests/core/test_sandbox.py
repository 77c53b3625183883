"""Hostile code in the sandbox: it harms nothing, ends in time, and cannot pass a test that it does not pass."""

from __future__ import annotations

import ast
import json
import os
import socket
import struct
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest

from llmtrainer.base.errors import UserError
from llmtrainer.core import sandbox as module
from llmtrainer.core import scratch
from llmtrainer.core.confined import decoded, encoded
from llmtrainer.core.sandbox import Checks, Limits, Outcome, Sandbox
from llmtrainer.core.syscalls import call_filter
from tests.confinement import require_confinement

SMALL = Limits(seconds=5.0, cpu_seconds=1, memory_mib=128, output_kib=64, disk_mib=1)
RIGHT = Checks(("assert double(2) == 4", "assert double(-3) == -6"), names=("double",))

confines = pytest.mark.usefixtures("confined")


@pytest.fixture(scope="module")
def confined() -> None:
    require_confinement()


def passes(source: str, tests: Checks = RIGHT, limits: Limits = SMALL) -> bool:
    outcome = Sandbox(limits).check(source, tests)
    verdict = outcome.verdict
    return outcome.ended == "done" and verdict is not None and verdict["passed"] == verdict["of"] > 0 < verdict["calls"]


def printed(source: str, limits: Limits = SMALL) -> Outcome:
    return Sandbox(limits).script(source)


@confines
def test_right_code_passes_and_wrong_code_does_not() -> None:
    assert passes("def double(x):\n    return 2 * x\n")
    assert not passes("def double(x):\n    return x * x\n")


@confines
@pytest.mark.parametrize("source", [
    "import sys\nsys.exit(0)\n",
    "import os\nos._exit(0)\n",
    "def double(x):\n    import os\n    os._exit(0)\n",
    "def double(x):\n    raise SystemExit(0)\n",
    "def double(x):\n    raise AssertionError\n",
    "def double(x):\n    pass\n",
    "print('passed')\nimport sys\nprint('passed', file=sys.stderr)\ndef double(x):\n    return 'passed'\n",
    # The line that the tester tells its verdict with, on every descriptor there is.
    "import os\nfor end in range(3, 64):\n    try:\n        os.write(end, b'{\"passed\": 2, \"of\": 2, \"calls\": 2, "
    "\"why\": null}\\n')\n    except OSError:\n        pass\ndef double(x):\n    return 0\n",
    # A value that is equal to everything.
    "class Yes(int):\n    def __eq__(self, other):\n        return True\n    __hash__ = int.__hash__\n"
    "def double(x):\n    return Yes(0)\n",
    "class Yes:\n    def __eq__(self, other):\n        return True\ndef double(x):\n    return Yes()\n",
    # Attempts on whoever tests: there is nobody of the kind in this process.
    "import builtins, sys\nbuiltins.AssertionError = ValueError\nfor m in list(sys.modules.values()):\n"
    "    for n in ('say', 'tell', '_test', 'encoded'):\n        if hasattr(m, n):\n"
    "            setattr(m, n, lambda *a, **k: None)\ndef double(x):\n    return 0\n",
    "import sys\ndef double(x):\n    f = sys._getframe()\n    while f:\n        for k in f.f_locals:\n"
    "            if k in ('verdict', 'passed'):\n                f.f_locals[k] = 2\n        f = f.f_back\n"
    "    return 0\n",
    "import atexit, os\natexit.register(lambda: os.write(1, b'passed'))\nclass Last:\n    def __del__(self):\n"
    "        os._exit(0)\nlast = Last()\ndef double(x):\n    return 0\n",
    "import gc\nfound = [o for o in gc.get_objects() if isinstance(o, str) and 'assert double' in o]\n"
    "def double(x):\n    return len(found)\n",
    "def double(x):\n    return [[[]]] * 10 ** 9\n",
    "x = []\nfor _ in range(10 ** 5):\n    x = [x]\ndef double(_):\n    return x\n",
    "def double(x):\n    return double(x)\n",
    "import sys\nsys.setrecursionlimit(10 ** 9)\ndef double(x):\n    return double(x)\n",
    "this is no Python",
    "\0",
    "",
])
def test_code_that_does_not_do_the_work_never_passes(source: str) -> None:
    assert not passes(source, limits=SMALL.model_copy(update={"seconds": 1.5}))


@confines
def test_the_tested_code_finds_no_test_and_no_expected_value_in_its_process_or_its_folder() -> None:
    source = (
        "import gc, os, sys\n"
        "def double(x):\n"
        "    texts = [o for o in gc.get_objects() + list(sys.modules) if isinstance(o, str)]\n"
        "    return any('98765' in text for text in texts) or bool(os.listdir('.')) or '98765' in str(sys.argv)\n"
    )
    assert passes(source, Checks(("assert double(1) is False, 98765",), names=("double",)))


@confines
@pytest.mark.parametrize(("attempt", "refused"), [
    ("import os\nwhile True:\n    os.fork()\n", "PermissionError"),
    ("import subprocess\nsubprocess.run(['/bin/true'])\n", "PermissionError"),
    ("import os\nos.execv('/bin/true', ['true'])\n", "PermissionError"),
    ("import os\nos.kill(os.getppid(), 9)\n", "PermissionError"),
    ("import os\nos.kill(1, 15)\n", "PermissionError"),
    ("import fcntl, os\nr, w = os.pipe()\nfcntl.fcntl(r, fcntl.F_SETOWN, os.getppid())\n", "PermissionError"),
    ("import socket\nsocket.socket()\n", "PermissionError"),
    ("import socket\nsocket.socketpair()\n", "PermissionError"),
    ("import socket\nsocket.socket(socket.AF_UNIX)\n", "PermissionError"),
    ("open('/etc/passwd').read()\n", "PermissionError"),
    ("open('/proc/1/environ').read()\n", "PermissionError"),
    ("import os\nopen(f'/proc/{os.getppid()}/mem', 'r+b')\n", "PermissionError"),
    ("import os\nos.listdir('/root')\n", "PermissionError"),
    ("import os\nos.chmod('/tmp', 0)\n", "PermissionError"),
    ("import os\nos.utime('/tmp')\n", "PermissionError"),
    ("import os\nos.symlink('/etc', 'etc')\n", "PermissionError"),
    ("open('/tmp/left-behind', 'w').write('x')\n", "PermissionError"),
    ("open('/dev/shm/left-behind', 'w').write('x')\n", "PermissionError"),
    ("import os\nos.sched_setaffinity(0, {0})\n", "PermissionError"),
    ("import resource\nresource.setrlimit(resource.RLIMIT_CPU, (-1, -1))\n", "Error"),
    ("import os\nos.setuid(0)\n", "PermissionError"),
    ("import ctypes\nassert ctypes.CDLL(None).unshare(0x10000000) == 0\n", "AssertionError"),
    ("import ctypes\nassert ctypes.CDLL(None).ptrace(16, 1, 0, 0) == 0\n", "AssertionError"),
    ("import os\nos.memfd_create('x')\n", "PermissionError"),
    ("bytearray(2 ** 30)\n", "MemoryError"),
])
def test_an_attempt_on_the_machine_is_refused(attempt: str, refused: str) -> None:
    outcome = printed(attempt + "print('done it')\n")
    assert b"done it" not in outcome.output
    assert refused.encode() in outcome.told, outcome


@confines
@pytest.mark.parametrize(("source", "ended"), [
    ("while True:\n    pass\n", "time"),
    ("import time\ntime.sleep(60)\n", "time"),
    ("import signal\nfor s in range(1, 32):\n    try:\n        signal.signal(s, signal.SIG_IGN)\n    except (OSError, "
     "ValueError):\n        pass\nwhile True:\n    pass\n", "time"),
    ("import threading\ndef f():\n    while True:\n        pass\nfor _ in range(4):\n"
     "    threading.Thread(target=f).start()\n", "time"),
    ("while True:\n    print('x' * 1000)\n", "output"),
    ("import os\nwhile True:\n    os.write(2, b'x' * 60000)\n", "output"),
    ("x = []\nwhile True:\n    x.append('x' * 10 ** 6)\n", "memory"),
    ("import mmap\nx = [mmap.mmap(-1, 2 ** 20) for _ in range(10 ** 4)]\n", "died"),
    ("with open('big', 'wb') as file:\n    while True:\n        file.write(b'x' * 65536)\n", "disk"),
    ("import os\nwhile True:\n    for i in range(10 ** 9):\n        with open(f'f{i}', 'wb') as file:\n"
     "            file.write(b'x' * 60000)\n", "disk"),
    ("import ctypes\nctypes.string_at(0)\n", "died"),
    ("import os\nos.abort()\n", "died"),
])
def test_code_without_end_or_measure_is_ended_with_its_reason(source: str, ended: str) -> None:
    limits = SMALL.model_copy(update={"seconds": 1.0}) if "sleep" in source else SMALL
    assert printed(source, limits).ended in (ended, *(["died"] if ended in ("disk", "memory") else []))


@confines
@pytest.mark.parametrize("hides", [
    # Removed, and still open.
    "kept = []\nfor _ in range(9):\n    kept.append(open('f', 'wb', buffering=0))\n    kept[-1].write(b'x' * 2 ** 19)\n"
    "    os.unlink('f')\n",
    # Removed and closed, and still in the memory.
    "import ctypes\nmap = ctypes.CDLL(None).mmap\nfor _ in range(9):\n    with open('f', 'w+b', buffering=0) as f:\n"
    "        f.write(b'x' * 2 ** 19)\n        os.unlink('f')\n"
    "        map(None, ctypes.c_size_t(4096), 1, 2, f.fileno(), ctypes.c_long(0))\n",
    # Where no path leads to.
    "for i in range(9):\n    open(f'{i}', 'wb').write(b'x' * 2 ** 16)\nfor _ in range(30):\n    os.mkdir('d' * 200)\n"
    "    os.chdir('d' * 200)\nfor i in range(9):\n    open(f'{i}', 'wb').write(b'x' * 2 ** 19)\n",
])
def test_files_count_wherever_code_hides_them(hides: str) -> None:
    limits = SMALL.model_copy(update={"seconds": 20.0, "cpu_seconds": 20})
    assert printed("import os\n" + hides + "while True:\n    pass\n", limits).ended == "disk"


def test_files_that_move_while_they_are_counted_are_counted_while_nothing_moves(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = scratch._held
    states: list[str] = []

    def held(folder: str, process: subprocess.Popen[bytes]) -> tuple[float, bool]:
        states.append(Path(f"/proc/{process.pid}/stat").read_text().rpartition(")")[2].split()[0])
        # What a look finds of a folder that has another name by the time it is opened.
        return real(folder, process) if len(states) > 1 else (0.0, True)

    monkeypatch.setattr(scratch, "_held", held)
    (tmp_path / "file").write_bytes(b"x" * 9999)
    with subprocess.Popen(["cat"], stdin=subprocess.PIPE, stdout=subprocess.PIPE) as process:
        assert scratch.exceeds(9998, str(tmp_path), process)
        assert len(states) == 2 and states[0] != "T" == states[1]
        assert not scratch.exceeds(99999, str(tmp_path), process)
        assert process.communicate(b"it goes on")[0] == b"it goes on"


def test_a_file_that_vanishes_while_others_are_counted_hides_none_of_them(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("before", "file", "then"):
        (tmp_path / name).write_bytes(b"x" * 9000)
    real = os.scandir

    class Late:
        """A folder that one file leaves as soon as it was listed."""

        def __init__(self, folder: str) -> None:
            with real(folder) as entries:
                self.entries = sorted(entries, key=lambda entry: entry.name)
            (tmp_path / "file").unlink()

        def __enter__(self) -> list[os.DirEntry[str]]:
            return self.entries

        def __exit__(self, *error: object) -> None:
            pass

    monkeypatch.setattr(os, "scandir", Late)
    assert scratch._named(str(tmp_path)) == (2 * 3 * 4096, True)


@confines
def test_code_that_makes_and_removes_files_all_the_time_holds_no_more_than_one() -> None:
    source = "for i in range(4000):\n    with open('f', 'wb') as f:\n        f.write(b'x' * 999)\n    os.unlink('f')\n"
    outcome = printed("import os\n" + source + "print('through')\n", Limits())
    assert outcome.ended == "done" and outcome.output == b"through\n"


@confines
def test_what_a_program_is_given_is_not_what_it_holds() -> None:
    outcome = Sandbox(SMALL).script("print(len(input()))", given="x" * 2**21)
    assert outcome.ended == "done" and outcome.output == b"2097152\n"


@confines
def test_no_room_is_taken_that_the_size_of_a_file_does_not_tell() -> None:
    keep_size = "import ctypes\nprint(ctypes.CDLL(None).fallocate(f.fileno(), 1, *map(ctypes.c_long, (0, 2 ** 30))))\n"
    assert printed("f = open('f', 'wb')\n" + keep_size).output == b"-1\n"
    assert printed("import os\nf = open('f', 'wb')\nos.posix_fallocate(f.fileno(), 0, 4096)\nprint(1)").output == b"1\n"


@confines
def test_nothing_of_a_run_is_left_and_nothing_was_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    before = set(os.listdir("/proc/self/fd"))
    outcome = printed("import os\nprint(os.listdir('.'))\nos.mkdir('a')\nopen('a/b', 'w').write('c')\n")
    assert outcome.ended == "done" and outcome.output == b"[]\n"
    assert passes("def double(x):\n    return 2 * x\n")
    assert list(tmp_path.iterdir()) == [] and set(os.listdir("/proc/self/fd")) == before


@confines
@pytest.mark.parametrize("ends", ["import os\nos._exit({code})\n", "import sys\nsys.exit({code})\n"])
def test_no_exit_code_of_the_code_says_that_the_sandbox_refused_it(ends: str) -> None:
    # What the program that confines itself ends with where a limit could not be set, now or once.
    for code in (1, 97):
        assert printed(ends.format(code=code)).ended == "died"
        assert Sandbox(SMALL).check(ends.format(code=code), RIGHT).ended != "sandbox"


@confines
@pytest.mark.parametrize("leaves", [
    "for _ in range(1100):\n    os.mkdir('d')\n    os.chdir('d')\n",
    "for _ in range(1100):\n    os.mkdir('d' * 20)\n    os.chdir('d' * 20)\nopen('last', 'w').write('x')\n",
    "os.mkdir('a')\nos.mkdir('a/b')\nopen('a/b/c', 'w').write('x')\nos.mkdir('closed', 0)\n",
])
def test_folders_in_folders_are_removed_however_deep_and_closed(
    leaves: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    printed("import os\nos.umask(0)\n" + leaves, Limits())
    assert list(tmp_path.iterdir()) == []


def test_a_folder_that_only_lets_itself_be_left_is_removed(tmp_path: Path) -> None:
    (tmp_path / "a" / "b" / "c").mkdir(parents=True)
    (tmp_path / "a" / "b" / "link").symlink_to("/etc")
    for folder in (tmp_path / "a" / "b", tmp_path / "a", tmp_path):
        folder.chmod(0o000)
    scratch.remove(str(tmp_path))
    assert not tmp_path.exists() and Path("/etc").is_dir()


@confines
def test_code_sees_no_environment_and_no_open_file_of_the_trainer(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SECRET_TOKEN", "98765")
    secret = tmp_path / "secret"
    secret.write_text("98765")
    with secret.open() as held, socket.socket() as open_socket:
        os.set_inheritable(held.fileno(), True)
        os.set_inheritable(open_socket.fileno(), True)
        outcome = printed(
            "import os\nfor end in range(3, 64):\n    try:\n        print(os.read(end, 100))\n    except OSError:\n"
            "        pass\nprint(dict(os.environ))\n"
        )
    assert outcome.ended == "done" and b"98765" not in outcome.output and b"SECRET" not in outcome.output


@confines
def test_tests_may_use_the_standard_library_helpers_and_exceptions_of_the_code() -> None:
    tests = Checks(
        ("import math\nassert math.isclose(root(half(8)), 2)",
         "try:\n    root(-1)\nexcept ValueError:\n    pass\nelse:\n    raise AssertionError"),
        setup="def half(x):\n    return x / 2\n", names=("root",),
    )  # fmt: skip
    assert passes("import math\ndef root(x):\n    return math.sqrt(x)\n", tests)
    assert not passes("def root(x):\n    return 2.0\n", tests)


@confines
def test_a_process_that_died_passes_no_test_that_forgives_exceptions() -> None:
    forgiving = Checks(("try:\n    double(2)\nexcept Exception:\n    pass",), names=("double",))
    assert passes("def double(x):\n    raise ValueError\n", forgiving)
    assert not passes("import os\ndef double(x):\n    os._exit(0)\n", forgiving)


def test_without_confinement_every_loss_is_named_and_nothing_runs_unless_it_is_allowed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "call_filter", lambda machine: None)
    monkeypatch.setattr(module.confined, "__file__", _without_landlock(tmp_path))
    module._missing.cache_clear()
    try:
        lame = Sandbox(SMALL)
        missing = lame.missing()
        with pytest.raises(UserError, match="could do what it must not: read files") as refused:
            lame.require()
        assert refused.value.fix is not None and "isolation=best_effort" in refused.value.fix
        Sandbox(SMALL, required=False).require()
        assert lame.script("print(1)").ended == "sandbox"
        assert Sandbox(SMALL, required=False).script("print(1)").output == b"1\n"
    finally:
        module._missing.cache_clear()
    assert {"read files outside its folder", "write files outside its folder", "reach the network"} <= set(missing)
    assert {"start programs", "send signals to other processes"} <= set(missing)


def _without_landlock(folder: Path) -> str:
    """The program that confines itself, on a machine whose kernel has no Landlock."""
    text = Path(module.confined.__file__).read_text()
    changed = text.replace("_CREATE, _ADD, _RESTRICT = 444, 445, 446", "_CREATE, _ADD, _RESTRICT = 99444, 445, 446")
    assert changed != text
    path = folder / "confined.py"
    path.write_text(changed)
    return str(path)


@pytest.mark.parametrize("value", [
    None, True, 0, -(10 ** 40), 1.5, float("inf"), "", "\ud800", "\u4e2d", b"\0\xff", 2 + 3j, range(3), [], (), {},
    set(), frozenset([1]), [1, [2.0, ("a", {"b": {1, 2}})]], {(1, 2): [None], "x": {}},
], ids=repr)
def test_plain_values_come_back_as_they_were_with_their_types(value: object) -> None:
    back = decoded(json.loads(json.dumps(encoded(value))))
    assert back == value and type(back) is type(value)


@pytest.mark.parametrize("value", [object(), lambda: 0, iter([]), print, type])
def test_what_is_no_plain_value_is_not_sent(value: object) -> None:
    with pytest.raises(TypeError, match="plain"):
        encoded(value)


def test_a_filter_ends_in_a_refusal_and_knows_two_machines() -> None:
    for machine in ("x86_64", "aarch64"):
        code = call_filter(machine)
        assert code is not None and len(code) % 8 == 0 and len(code) // 8 < 4096
        lines = [struct.unpack_from("=HBBI", code, at) for at in range(0, len(code), 8)]
        assert lines[-1] == (0x06, 0, 0, 0x00050001)
        for place, (operation, yes, no, _) in enumerate(lines):
            assert place + 1 + max(yes, no) < len(lines) or operation == 0x06
    assert call_filter("riscv64") is None


def test_what_runs_inside_imports_nothing_but_the_standard_library() -> None:
    tree = ast.parse(Path(module.confined.__file__).read_text())
    names = {alias.name for node in ast.walk(tree) if isinstance(node, ast.Import) for alias in node.names}
    names |= {str(node.module) for node in ast.walk(tree) if isinstance(node, ast.ImportFrom)}
    assert {name.partition(".")[0] for name in names} <= set(sys.stdlib_module_names)
