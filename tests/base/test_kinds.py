"""Kinds by file name."""

from __future__ import annotations

import importlib
import sys
from pathlib import Path

import pytest

from llmtrainer.base.errors import UserError
from llmtrainer.base.kinds import find_kind, kinds_in, name_of
from tests.base.flavours.chocolate import Chocolate
from tests.base.taste import Flavour, Outsider

BROKEN = "import a_package_that_nobody_has\n"
DOUBLE = """
from tests.base.taste import Flavour
class One(Flavour):
    pass
class Two(Flavour):
    pass
"""


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    package = tmp_path / "ices"
    package.mkdir()
    for name, text in {"__init__": "", "broken": BROKEN, "double": DOUBLE, "_hidden": "", "none": ""}.items():
        (package / f"{name}.py").write_text(text)
    monkeypatch.syspath_prepend(str(tmp_path))
    importlib.invalidate_caches()
    for name in [name for name in sys.modules if name.partition(".")[0] == "ices"]:
        monkeypatch.delitem(sys.modules, name)
    return "ices"


def test_listing_a_folder_imports_nothing(folder: str) -> None:
    assert kinds_in(folder) == ["broken", "double", "none"]
    assert not {"ices.broken", "ices.double", "ices.none"} & set(sys.modules)


def test_a_kind_that_cannot_be_imported_raises_its_own_error(folder: str) -> None:
    for kind in ("broken", "ices.broken"):
        with pytest.raises(ModuleNotFoundError, match="a_package_that_nobody_has"):
            find_kind(Flavour, folder, kind)


def test_a_file_of_kinds_defines_exactly_one(folder: str) -> None:
    for kind, has in (("double", "One, Two"), ("none", "none")):
        with pytest.raises(UserError, match="must define exactly one Flavour") as caught:
            find_kind(Flavour, folder, kind)
        assert caught.value.why is not None and caught.value.why.endswith(has)
    assert find_kind(Flavour, folder, "ices.double.Two").__name__ == "Two"


@pytest.mark.parametrize("chosen", [Chocolate, Outsider])
def test_the_name_of_a_kind_finds_it_again(chosen: type[Flavour]) -> None:
    assert find_kind(Flavour, Flavour.folder, name_of(chosen, Flavour.folder)) is chosen


def test_a_concrete_class_takes_its_own_kind_and_no_other() -> None:
    assert Chocolate.model_validate({"kind": "chocolate", "cocoa": 0.5}) == Chocolate(cocoa=0.5)
    with pytest.raises(ValueError, match="only `chocolate` fits here"):
        Chocolate.model_validate({"kind": "vanilla"})
