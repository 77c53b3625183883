"""The project around the package: budgets, dependencies, forbidden calls, documented fields, recipes."""

from __future__ import annotations

import ast
import importlib
import pkgutil
import re
import sys
import tomllib
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import pytest

import llmtrainer
from llmtrainer.base.config import Config, dump, load
from llmtrainer.training.recipe import Recipe

ROOT = Path(__file__).resolve().parent.parent
SOURCES = sorted((ROOT / "llmtrainer").rglob("*.py"))
RECIPES = sorted((ROOT / "recipes").rglob("*.yaml"))
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())
IMPORT_NAMES = {
    "ruamel.yaml": "ruamel", "flash-attn": "flash_attn", "liger-kernel": "liger_kernel", "math-verify": "math_verify"
}
"""Where the name of a distribution is not the name that is imported."""


def size() -> ModuleType:
    sys.path.insert(0, str(ROOT / "tools"))
    try:
        return importlib.import_module("size")
    finally:
        sys.path.remove(str(ROOT / "tools"))


def test_no_file_and_no_function_is_over_its_budget() -> None:
    assert [*size().too_long(ROOT), *size().not_plain(ROOT)] == []


def test_the_public_name_the_ground_floor_and_the_command_line_load_no_torch() -> None:
    assert list(size().heavy_at_start(ROOT)) == []


def test_budgets_notice_a_long_file_a_long_function_and_a_line_that_is_not_ascii(tmp_path: Path) -> None:
    package = tmp_path / "llmtrainer" / "training"
    package.mkdir(parents=True)
    (package / "trainer.py").write_text("x = 1\n" * 251)
    (package / "long.py").write_text("def f():\n" + "    x = 1\n" * 60 + "y = 2\n" * 339)
    (package / "foreign.py").write_text("x = 1\ny = '\u00e9'\n", encoding="utf-8")
    (package / "fine.py").write_text("def f():\n" + "    x = 1\n" * 59 + "y = 2\n" * 340)
    assert list(size().too_long(tmp_path)) == [
        "llmtrainer/training/long.py:1: f has 61 lines, budget 60",
        "llmtrainer/training/trainer.py: 251 lines, budget 250",
    ]
    assert list(size().not_plain(tmp_path)) == ["llmtrainer/training/foreign.py:2: not ASCII"]


def distribution(requirement: str) -> str:
    match = re.match(r"[A-Za-z0-9._-]+", requirement)
    assert match
    return match[0]


def imported() -> set[str]:
    """Top-level names of all imports of the package, wherever they stand."""
    names: set[str] = set()
    for path in SOURCES:
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Import):
                names |= {alias.name.partition(".")[0] for alias in node.names}
            elif isinstance(node, ast.ImportFrom) and not node.level:
                names.add(str(node.module).partition(".")[0])
    return names


def test_every_core_dependency_is_imported_and_every_import_is_declared() -> None:
    core = {IMPORT_NAMES.get(name, name) for name in map(distribution, PROJECT["project"]["dependencies"])}
    groups = PROJECT["project"]["optional-dependencies"]
    optional = ("deepspeed", "flash", "hf", "liger", "maths", "remote", "swanlab", "wandb")
    extras = {IMPORT_NAMES.get(name, name) for group in optional for name in map(distribution, groups[group])}
    foreign = imported() - set(sys.stdlib_module_names) - {"llmtrainer", "pydantic_core"}
    assert core - foreign == set(), "declared and never imported"
    assert foreign - core - extras == set(), "imported and not declared"


def test_the_constraints_pin_every_package_that_the_tests_install() -> None:
    pinned = {
        re.sub("[-_.]+", "-", line.partition("==")[0]).lower()
        for line in (ROOT / "constraints.txt").read_text().splitlines()
        if "==" in line
    }
    extras = PROJECT["project"]["optional-dependencies"]
    texts = [*PROJECT["project"]["dependencies"], *extras["test"], *extras["hf"], *extras["remote"]]
    wanted = {distribution(text) for text in texts}
    assert {re.sub("[-_.]+", "-", name).lower() for name in wanted} - {"llmtrainer"} - pinned == set()


@pytest.mark.parametrize("name", ["Makefile", ".ci/run", "constraints.txt", "pyproject.toml"])
def test_no_file_that_installs_names_a_host_or_an_index(name: str) -> None:
    text = (ROOT / name).read_text()
    assert not re.search(r"https?://|--(extra-)?index-url|--find-links|--trusted-host", text)


def calls(tree: ast.AST) -> Iterator[tuple[str, ast.Call]]:
    for node in ast.walk(tree):
        if isinstance(node, ast.Call):
            yield ast.unparse(node.func), node


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: path.relative_to(ROOT).as_posix())
def test_no_source_unpickles_evaluates_text_or_reads_the_environment(path: Path) -> None:
    tree = ast.parse(path.read_text())
    for name, call in calls(tree):
        forbidden = ("eval", "exec", "torch.save", "pickle.loads", "pickle.load")
        assert name not in forbidden, f"line {call.lineno}"
        if name == "torch.load":
            safe = [item for item in call.keywords if item.arg == "weights_only"]
            assert safe and ast.unparse(safe[0].value) == "True", f"line {call.lineno}"
    if path != ROOT / "llmtrainer" / "base" / "process.py":
        assert not re.search(r"\bos\.(environ|getenv)\b", path.read_text())


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: path.relative_to(ROOT).as_posix())
def test_every_function_is_annotated_and_every_module_says_what_lives_there(path: Path) -> None:
    tree = ast.parse(path.read_text())
    assert not tree.body or ast.get_docstring(tree), "no module docstring"
    for node in ast.walk(tree):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            arguments = [*node.args.posonlyargs, *node.args.args, *node.args.kwonlyargs]
            bare = [item.arg for item in arguments if not item.annotation and item.arg not in ("self", "cls")]
            assert not bare and node.returns is not None, f"line {node.lineno}: {node.name}"


def configs() -> list[type[Config]]:
    for module in pkgutil.walk_packages(llmtrainer.__path__, "llmtrainer."):
        if not module.name.endswith("__main__"):
            importlib.import_module(module.name)
    found, waiting = [], [Config]
    while waiting:
        for child in waiting.pop().__subclasses__():
            waiting.append(child)
            if child.__module__.startswith("llmtrainer."):
                found.append(child)
    return found


def test_every_field_of_every_configuration_is_documented() -> None:
    bare = [
        f"{config.__module__}.{config.__name__}.{name}"
        for config in configs()
        for name, info in config.model_fields.items()
        if not info.description
    ]
    assert len(configs()) > 10 and bare == []


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.relative_to(ROOT).as_posix())
def test_every_recipe_loads_and_its_dump_loads_back_equal(path: Path, tmp_path: Path) -> None:
    recipe = load(Recipe, path)
    (tmp_path / "again.yaml").write_text(dump(recipe))
    assert load(Recipe, tmp_path / "again.yaml") == recipe


def test_there_is_a_small_and_a_full_recipe() -> None:
    assert {path.parent.name for path in RECIPES} >= {"tiny", "full"}
