"""No run is ever lost: killed, with a full disk and with damaged files it ends like one that nothing happened to."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

PARTS = {"one-a": 1, "one-b": 1, "two": 2}
"""Name of each part -> how many processes train together in it. Parts run beside each other."""
SHARES = {1: 0.4, 2: 0.2}
"""Of all kill points, those of a part."""
ENGINES = {1: "engine.kind=single", 2: "engine.kind=ddp"}


@pytest.mark.parametrize("part", PARTS)
def test_a_run_that_is_killed_filled_up_and_damaged_ends_like_a_quiet_one(
    part: str, recipe_file: Path, tmp_path: Path, request: pytest.FixtureRequest
) -> None:
    processes = PARTS[part]
    kills, damages = (
        round(SHARES[processes] * int(request.config.getoption(name))) for name in ("--kills", "--corruptions")
    )
    (tmp_path / "plan.json").write_text(json.dumps({
        "recipe": str(recipe_file), "folder": str(tmp_path), "processes": processes,
        "seed": 1 + list(PARTS).index(part), "kills": kills, "corruptions": damages,
        "overrides": ["duration=6 steps", "save.every=1 steps", "save.keep_newest=3", "evaluate.every=3 steps",
                      "engine.device=cpu", ENGINES[processes]],
    }))  # fmt: skip
    command = [sys.executable, "-m", "tests.training.storm", str(tmp_path / "plan.json")]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-4000:]
    told = json.loads(done.stdout.splitlines()[-1])
    print(part, told)
    assert told["runs"] >= 1 and told["killed"] + told.get("full", 0) >= kills and told["damaged"] == damages
