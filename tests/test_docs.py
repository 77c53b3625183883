"""The pages do what they say: every code block runs, and both languages show the same ones.

A page is one session in an empty folder (with the repository's recipes): blocks run from top to bottom. The
line before a block says how: `<!-- file: NAME -->` writes it, `<!-- fails: CODE -->` expects an exit code,
and `<!-- not run: WHY -->` leaves it out. `text` blocks show output.
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

from tests.warm import CLIENT, warm

ROOT = Path(__file__).resolve().parent.parent
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
ENGLISH = [page for page in PAGES if not page.name.endswith(".zh-CN.md")]
BLOCK = re.compile(r"(?:^<!-- (?P<mark>[^\n]*) -->\n)?^```(?P<language>\w*)\n(?P<code>.*?)^```$", re.M | re.S)
MARK = re.compile(r"(file|fails|not run): (.+)")
COMMAND = 'llmtrainer() { "$PYTHON" -I -S "$CLIENT" "$SERVER" llmtrainer "$@"; }\n'


@dataclass(frozen=True)
class Block:
    language: str
    code: str
    mark: str
    value: str


def blocks(page: Path) -> list[Block]:
    found = []
    for match in BLOCK.finditer(page.read_text(encoding="utf-8")):
        mark = MARK.fullmatch(match["mark"] or "")
        found.append(Block(match["language"], match["code"], *(mark.groups() if mark else ("", ""))))
    return found


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    with warm(tmp_path_factory.mktemp("warm")) as address:
        yield address


def run(block: Block, place: Path, server: Path) -> subprocess.CompletedProcess[str]:
    program = ["bash", "-eu", "-c", COMMAND + block.code]
    if block.language == "python":
        (place / "block.py").write_text(block.code)
        program = [sys.executable, "-I", "-S", str(CLIENT), str(server), "block.py"]
    environment = {
        **os.environ, "PYTHON": sys.executable, "PYTHONPATH": str(ROOT), "PYTHONWARNINGS": "error",
        "CLIENT": str(CLIENT), "SERVER": str(server),
    }  # fmt: skip
    return subprocess.run(program, cwd=place, env=environment, text=True, capture_output=True, timeout=300)


@pytest.mark.parametrize("page", ENGLISH, ids=lambda page: page.stem)
def test_every_code_block_of_a_page_runs(page: Path, tmp_path: Path, server: Path) -> None:
    (tmp_path / "recipes").symlink_to(ROOT / "recipes")
    for number, block in enumerate(blocks(page), start=1):
        told = f"{page.name}, block {number}:\n{block.code}"
        assert block.language in ("bash", "python", "yaml", "text"), f"{told}\nlanguage `{block.language}`"
        if block.mark == "not run" or block.language == "text":
            continue
        if block.language == "yaml":
            assert block.mark == "file", f"{told}\nis neither written to a file nor marked"
            (tmp_path / block.value).write_text(block.code)
            continue
        done = run(block, tmp_path, server)
        expected = int(block.value) if block.mark == "fails" else 0
        assert done.returncode == expected, f"{told}\n{done.returncode}\n{done.stdout}\n{done.stderr}"


@pytest.mark.parametrize("page", ENGLISH, ids=lambda page: page.stem)
def test_the_chinese_page_shows_the_same_blocks(page: Path) -> None:
    other = page.with_name(f"{page.stem}.zh-CN.md")
    if other.exists():
        assert blocks(other) == blocks(page)
    else:
        assert page.stem in ("architecture", "letters", "coverage", "reference"), "has no Chinese page"


@pytest.mark.parametrize("page", sorted({*PAGES, *ROOT.glob("*.md")}), ids=lambda page: page.name)
def test_every_link_to_a_file_of_the_repository_leads_somewhere(page: Path) -> None:
    for target in re.findall(r"\]\(([^)#\s]+)\)", page.read_text(encoding="utf-8")):
        assert "://" in target or (page.parent / target).exists(), target


def test_the_pages_made_from_the_code_are_as_the_code_is() -> None:
    told = subprocess.run(
        [sys.executable, "tools/docs.py", "--check"], cwd=ROOT, text=True, capture_output=True,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
    )  # fmt: skip
    assert told.returncode == 0, told.stdout + told.stderr


KINDS = {
    "model": "models/families", "model.adapter": "models/adapters", "model.head": "models/heads",
    "data": "training/datasets", "objective": "objectives", "optim.rule": "optim/rules",
    "optim.schedule": "optim/schedules", "engine": "parallel/engines", "engine.hook": "parallel/hooks",
    "log.trackers": "training/trackers",
}  # fmt: skip


@pytest.mark.parametrize("page", ["recipes.md", "recipes.zh-CN.md"])
@pytest.mark.parametrize("part", KINDS)
def test_the_table_of_kinds_names_every_file_of_its_folder(page: str, part: str) -> None:
    told = re.search(rf"^\| `{part}` \| (.*) \|$", (ROOT / "docs" / page).read_text(encoding="utf-8"), re.MULTILINE)
    files = {path.stem for path in (ROOT / "llmtrainer" / KINDS[part]).glob("*.py")} - {"__init__"}
    assert told is not None and set(re.findall(r"`(\w+)`", told[1])) == files
