"""docs/coverage.md is complete: every acceptance row and S-number has a state, and the named tests exist."""

from __future__ import annotations

import ast
import re
from functools import cache
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
PAGE = ROOT / "docs" / "coverage.md"
ITEMS = [*(f"row {number}" for number in range(1, 119)), *(f"S{number}" for number in range(1, 45))]
STATE = re.compile(r"done|partly: \S.*|not here yet(: \S.*)?|not run here(: \S.*)?")
TEST = re.compile(r"(tests/[\w/]+\.py)::(\w+)")


@cache
def table() -> dict[str, list[tuple[str, str]]]:
    """Item -> its (state, tests) lines."""
    found: dict[str, list[tuple[str, str]]] = {}
    for line in PAGE.read_text(encoding="utf-8").splitlines():
        cells = [cell.strip() for cell in line.strip().strip("|").split("|")]
        if len(cells) >= 3 and re.fullmatch(r"row \d+|S\d+", cells[0]):
            found.setdefault(cells[0], []).append((cells[1], cells[2]))
    return found


@cache
def functions_of(path: Path) -> frozenset[str]:
    tree = ast.parse(path.read_text())
    return frozenset(node.name for node in ast.walk(tree) if isinstance(node, ast.FunctionDef))


@pytest.mark.parametrize("item", ITEMS)
def test_every_item_has_one_state_and_a_settled_item_names_tests_that_exist(item: str) -> None:
    assert item in table(), f"{item} is not in docs/coverage.md"
    assert len(table()[item]) == 1, f"{item} has several lines"
    state, named = table()[item][0]
    assert STATE.fullmatch(state), f"{item}: state `{state}`"
    tests = TEST.findall(named)
    if state == "done" or state.startswith("partly"):
        assert tests, f"{item} is {state} and names no test"
    for file, name in tests:
        assert (ROOT / file).is_file(), f"{item}: {file} does not exist"
        assert name in functions_of(ROOT / file), f"{item}: {file} has no {name}"


def test_the_page_speaks_of_nothing_that_is_not_in_the_list() -> None:
    assert set(table()) == set(ITEMS)
