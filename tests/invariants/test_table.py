"""A small part of the table: every arrangement once and every objective at least once, and bugs that it must notice."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from llmtrainer.base.kinds import kinds_in
from tests.invariants.cells import nursery
from tests.invariants.table import BUGS, Bug, Cell, Table, arrangements, cases, run
from tests.tolerances import FLOAT64_INVARIANT

COUNT = 24
NEVER_SAID = {"micro split": "causal_lm, chats", "processes 4": "dpo", "compile": "causal_lm, text"}
"""Arrangements whose case here is chosen by hand."""
TRIED = tuple(bug for bug in BUGS if bug.name in ("mean_of_means", "one_document", "masks_by_row"))


def chosen(cells: list[Cell]) -> list[Cell]:
    """Each arrangement once, with the next objective each time; then more of those that are left."""
    axes = list(dict.fromkeys(cell.axis for cell in cells))
    order = list(dict.fromkeys(cell.case.name for cell in cells))
    found: list[Cell] = []
    for number, axis in enumerate(axes):
        of_axis = {cell.case.name: cell for cell in cells if cell.axis == axis}
        wanted = [NEVER_SAID.get(axis, ""), *order[number % len(order) :], *order]
        found.append(next(of_axis[name] for name in wanted if name in of_axis))
    rest = [cell for cell in cells if cell.axis in ("accumulation", "row neighbours", "chunk") and cell not in found]
    missing = [name for name in order if name not in {cell.case.name for cell in found}]
    found += [next(cell for cell in rest if cell.case.name == name) for name in missing]
    return (found + [cell for cell in rest if cell not in found])[:COUNT]


@pytest.fixture(scope="module")
def looked(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[dict[str, float], dict[str, str]]]:
    folder = tmp_path_factory.mktemp("table")
    with nursery(folder):
        table = Table(folder)
        yield run(table, chosen(table.cells), TRIED, 2)


def cells_here() -> list[Cell]:
    return [Cell(case, axis, commands) for case in cases(Path("world")) for axis, commands in arrangements(case)]


@pytest.mark.parametrize("name", [cell.name for cell in chosen(cells_here())])
def test_a_run_does_not_depend_on_its_layout(name: str, looked: tuple[dict[str, float], dict[str, str]]) -> None:
    assert looked[0][name] <= FLOAT64_INVARIANT


@pytest.mark.parametrize("bug", TRIED, ids=lambda bug: bug.name)
def test_a_seeded_bug_is_noticed(bug: Bug, looked: tuple[dict[str, float], dict[str, str]]) -> None:
    assert looked[1][bug.name]


def test_the_whole_table_has_150_cells_every_objective_and_a_bug_for_every_kind_of_arrangement() -> None:
    cells = cells_here()
    assert len(cells) >= 150 and len({cell.name for cell in cells}) == len(cells)
    objectives = {str(cell.case.more["objective"]["kind"]) for cell in cells}
    assert objectives == set(kinds_in("llmtrainer.objectives"))
    of_bugs = {bug.axis.partition(" ")[0] for bug in BUGS}
    assert {cell.axis.partition(" ")[0] for cell in cells} == of_bugs
    for bug in BUGS:
        assert (bug.case, bug.axis) in {(cell.case.name, cell.axis) for cell in cells}
    assert len(chosen(cells)) == COUNT
    assert {cell.case.name for cell in chosen(cells)} == {cell.case.name for cell in cells}
