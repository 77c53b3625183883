"""Words on a command line, as a shell and its scripts see them."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import types
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import pytest

import llmtrainer
from llmtrainer.apps.cli import main
from llmtrainer.base.config import Config
from llmtrainer.base.errors import RunStopped, UserError
from llmtrainer.base.result import Result
from llmtrainer.base.verbs import VERBS, Verb

ROOT = Path(llmtrainer.__file__).parents[1]
ENVIRONMENT = {**os.environ, "PYTHONPATH": str(ROOT)}


class Greeting(Config):
    """Whom to greet."""

    words: ClassVar[tuple[str, ...]] = ("name",)

    name: str = "nobody"
    """Who it is."""

    times: int = 1
    """How often."""

    end: str = "well"
    """How it ends."""


@dataclass(frozen=True)
class Greeted(Result):
    """What was said."""

    said: str
    code: int = 0

    @property
    def exit_code(self) -> int:
        return self.code


def greet(greeting: Greeting) -> Greeted:
    """Say hello."""
    print("on the way")
    match greeting.end:
        case "mended":
            raise UserError("no such name", where="here", why="it is not known", fix="name=ann")
        case "stopped":
            raise RunStopped("stopped at step 3")
        case "interrupted":
            raise KeyboardInterrupt
        case "defect":
            raise IndexError("out of range")
        case "half":
            return Greeted("hal", 3)
    return Greeted(f"hello {greeting.name}" * greeting.times)


@pytest.fixture(autouse=True)
def greet_is_a_verb(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    module = types.ModuleType("greeting_verbs")
    module.greet = greet  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "greeting_verbs", module)
    monkeypatch.setitem(VERBS, "greet", Verb("greeting_verbs:greet", "say hello", ("greet ann",)))
    yield


def said(capsys: pytest.CaptureFixture[str], *words: str) -> tuple[int, str, str]:
    code = main(words)
    captured = capsys.readouterr()
    return code, captured.out, captured.err


def test_a_verb_is_a_function_of_one_config(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    file = tmp_path / "g.yaml"
    file.write_text("name: bob\ntimes: 2\n")
    assert said(capsys, "greet", str(file), "times=1")[1] == "on the way\nsaid  hello bob\ncode  0\n"
    for words in (["ann"], ["name=ann"], ["--name", "ann"], ["--name=ann"], ["--", "ann"]):
        assert "hello ann\n" in said(capsys, "greet", *words)[1]
    assert "hello times=3\n" in said(capsys, "greet", "--", "times=3")[1]
    assert "hello --json\n" in said(capsys, "greet", "--", "--json")[1]


def test_with_json_stdout_is_one_object_and_all_else_is_on_stderr(capsys: pytest.CaptureFixture[str]) -> None:
    for words in (["greet", "ann", "--json"], ["--json", "greet", "ann"], ["greet", "--quiet", "--json", "ann"]):
        code, out, err = said(capsys, *words)
        assert (code, json.loads(out), err) == (0, {"said": "hello ann", "code": 0}, "on the way\n")
        assert out.count("\n") == 1


@pytest.mark.parametrize(
    ("end", "code", "message"),
    [
        ("mended", 2, "no such name"), ("stopped", 3, "stopped at step 3"), ("interrupted", 130, "interrupted"),
        ("defect", 1, "a defect of ours: IndexError: out of range"), ("half", 3, None),
    ],
)  # fmt: skip
def test_the_exit_code_says_who_can_mend_it(
    capsys: pytest.CaptureFixture[str], end: str, code: int, message: str | None
) -> None:
    assert said(capsys, "greet", f"end={end}")[0] == code
    found, out, err = said(capsys, "greet", f"end={end}", "--json")
    assert found == code
    if message is not None:
        assert json.loads(out)["error"]["what"] == message
        assert f"llmtrainer greet: {message}\n" in err
    assert ("Traceback" in err) == (end == "defect")


def test_an_error_has_its_four_parts_on_stderr(capsys: pytest.CaptureFixture[str]) -> None:
    assert said(capsys, "greet", "end=mended")[2] == (
        "llmtrainer greet: no such name\n  where here\n  why   it is not known\n  fix   name=ann\n"
    )
    assert said(capsys, "greet", "--tims", "3")[2] == (
        "llmtrainer greet: unknown key `tims`\n  where command line\n  why   Greeting has: name, times, end\n"
        "  fix   did you mean `times`?\n"
    )


def test_unknown_verbs_and_words_too_many_are_mendable(capsys: pytest.CaptureFixture[str]) -> None:
    code, out, err = said(capsys, "trian")
    assert (code, out) == (2, "") and "did you mean `train`?" in err
    assert said(capsys, "greet", "a", "b")[0] == 2
    assert said(capsys, "greet", "nothing.yaml")[0] == 2
    assert said(capsys, "--json", "trian")[0] == 2


def test_help_teaches_every_verb_and_every_key(capsys: pytest.CaptureFixture[str]) -> None:
    for words in ([], ["--help"], ["-h"], ["help"]):
        code, out, _ = said(capsys, *words)
        assert code == 0 and all(f"  {name} " in out and verb.purpose in out for name, verb in VERBS.items())
    code, out, _ = said(capsys, "greet", "--help")
    assert code == 0
    for part in ("say hello", "llmtrainer greet ann", "times = 1", "whole number. How often.", "NAME"):
        assert part in out
    assert out.isascii()


def test_version_is_one_line(capsys: pytest.CaptureFixture[str]) -> None:
    assert said(capsys, "--version")[:2] == (0, f"llmtrainer {llmtrainer.__version__}\n")
    assert json.loads(said(capsys, "--version", "--json")[1]) == {"version": llmtrainer.__version__}


def test_the_version_is_the_projects() -> None:
    import tomllib

    assert tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["version"] == llmtrainer.__version__


@pytest.mark.parametrize("name", [name for name in VERBS if name != "greet"])
def test_every_verb_is_a_function_of_one_documented_config(name: str) -> None:
    verb = VERBS[name]
    config_type = verb.config_type()
    assert issubclass(config_type, Config) and verb.function().__doc__
    assert [field for field, info in config_type.model_fields.items() if not info.description] == []
    assert set(config_type.words) <= set(config_type.model_fields)
    assert getattr(llmtrainer, name.replace("-", "_")) is verb.function()
    assert getattr(llmtrainer, config_type.__name__) is config_type
    assert all(example.split()[0] == name for example in verb.examples)


def python(*arguments: str, **keys: Any) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, *arguments], env=ENVIRONMENT, capture_output=True, text=True, check=False, timeout=120,
        **keys,
    )


def test_help_and_the_public_name_load_neither_torch_nor_numpy() -> None:
    program = """
import sys, llmtrainer
from llmtrainer.apps.cli import main
assert main(["--help"]) == 0 and main(["--version"]) == 0
assert llmtrainer.load and "train" in dir(llmtrainer)
print([name for name in ("torch", "numpy", "transformers", "matplotlib") if name in sys.modules])
"""
    done = python("-W", "error", "-c", program)
    assert done.stdout.splitlines()[-1] == "[]", done.stderr


def test_a_reader_that_has_enough_is_no_error() -> None:
    command = f"{sys.executable} -m llmtrainer --help | head -n 1; exit ${{PIPESTATUS[0]}}"
    done = subprocess.run(["bash", "-c", command], env=ENVIRONMENT, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (0, "")


def test_ctrl_c_ends_the_process_as_shells_expect() -> None:
    program = """
import os, signal, sys, types
from llmtrainer.apps.cli import main
from llmtrainer.base import verbs
def wait(request: "SchemaRequest") -> None:
    signal.signal(signal.SIGINT, signal.default_int_handler)    # whoever began the tests may have had it ignored
    os.kill(os.getpid(), signal.SIGINT)
    signal.pause()
from llmtrainer.apps.schema import SchemaRequest
wait.__annotations__ = {"request": SchemaRequest}
module = types.ModuleType("waiting"); module.wait = wait; sys.modules["waiting"] = module
verbs.VERBS["wait"] = verbs.Verb("waiting:wait", "wait", ())
sys.exit(main(["wait"]))
"""
    done = python("-c", program)
    assert done.returncode == 128 + signal.SIGINT, done.stderr
    assert done.stderr == "llmtrainer wait: interrupted\n"


def test_the_public_names_exist_and_others_do_not() -> None:
    for name in dir(llmtrainer):
        assert getattr(llmtrainer, name) is not None
    assert llmtrainer.CausalLM().kind == "causal_lm"
    with pytest.raises(AttributeError, match="nothing_of_the_kind"):
        _ = llmtrainer.nothing_of_the_kind
