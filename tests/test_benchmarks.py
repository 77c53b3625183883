"""Turns: both sides do their work in their own process, one after the other, and the figures are theirs."""

from __future__ import annotations

import importlib
import json
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import pytest

BENCHMARKS = Path(__file__).resolve().parent.parent / "benchmarks"
FAKE = f"""
import sys
sys.path.insert(0, {str(BENCHMARKS)!r})
import turns
from pathlib import Path

def work(name, rates):
    def steps(settings):
        print("noise of a library")
        yield {{"first_loss": settings["loss"], "noise": "x"}}
        for rate in rates:
            yield {{"rate": rate}}
        raise SystemExit(7)
    return steps

SIDES = {{"ours": work("ours", [30.0, 20.0, 40.0]), "peer": work("peer", [10.0, 20.0, 15.0])}}
wish = turns.parser("a fake").parse_args()
if wish.side:
    turns.serve(SIDES[wish.side], wish.settings)
else:
    python = Path(sys.executable)
    sides = [turns.Side(name, python, Path(__file__), {{"loss": 9.5}}, 1) for name in SIDES]
    result = turns.compare("counting", "tokens/s", sides, turns.rounds(wish))
    turns.tell({{**result, "first_loss": turns.fact(result, "first_loss")}})
"""


def turns() -> ModuleType:
    sys.path.insert(0, str(BENCHMARKS))
    try:
        return importlib.import_module("turns")
    finally:
        sys.path.remove(str(BENCHMARKS))


def run(folder: Path, *words: str) -> subprocess.CompletedProcess[str]:
    script = folder / "fake.py"
    script.write_text(FAKE)
    return subprocess.run([sys.executable, script, *words], text=True, capture_output=True, timeout=60)


def test_sides_take_turns_and_the_last_line_is_the_comparison(tmp_path: Path) -> None:
    done = run(tmp_path, "--rounds", "3")
    assert done.returncode == 0, done.stderr
    (line,) = done.stdout.splitlines()
    found = json.loads(line)
    memory = found.pop("peak_memory")
    assert found.pop("peak_memory_ratio") == memory["ours"] / memory["peer"]
    assert 2**20 < memory["ours"] < 2**30
    assert found == {
        "work": "counting", "unit": "tokens/s", "ours": 30.0, "peers": {"peer": 15.0}, "ratios": {"peer": 2.0},
        "ratio": 2.0, "runs": {"ours": [30.0, 20.0, 40.0], "peer": [10.0, 20.0, 15.0]},
        "first_loss": {"ours": 9.5, "peers": {"peer": 9.5}},
    }
    told = [line for line in done.stderr.splitlines() if line.startswith("turn")]
    assert [line.split(":")[0] for line in told[:4]] == [
        "turn 1 of 3, ours", "turn 1 of 3, peer", "turn 2 of 3, ours", "turn 2 of 3, peer",
    ]


def test_a_side_that_ends_early_is_told_and_gives_no_figures(tmp_path: Path) -> None:
    done = run(tmp_path, "--rounds", "4")
    assert (done.returncode, done.stdout) == (2, "")
    assert "ours ended with code 7" in done.stderr


def test_the_smallest_ratio_is_the_one_that_counts() -> None:
    answers = {
        "ours": [{"rate": 60.0, "peak_memory": 50}], "slow": [{"rate": 10.0, "peak_memory": 100}],
        "fast": [{"rate": 40.0, "peak_memory": 200}],
    }
    found = turns().summary(answers)
    assert (found["ratio"], found["ratios"]) == (1.5, {"slow": 6.0, "fast": 1.5})
    assert found["peak_memory_ratio"] == 0.5


def test_an_environment_that_is_not_there_is_named_with_what_makes_it(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as stopped:
        turns().Side("peer", tmp_path / "python", tmp_path / "x.py", {}, 1)
    assert stopped.value.code == 2
    assert "make bench-install" in capsys.readouterr().err
