"""Kinds: a class is found by the name of its file, and a folder is listed without importing what is in it."""

from __future__ import annotations

import importlib
import importlib.util
import pkgutil
from types import ModuleType
from typing import Any, TypeVar

from llmtrainer.base.errors import UserError
from llmtrainer.base.text import did_you_mean

Base = TypeVar("Base")


def kinds_in(folder: str) -> list[str]:
    """Names of the files in a package that holds kinds, sorted. None of them is imported."""
    spec = importlib.util.find_spec(folder)
    assert spec is not None and spec.submodule_search_locations is not None, f"{folder} is no package"
    names = (item.name for item in pkgutil.iter_modules(spec.submodule_search_locations))
    return sorted(name for name in names if not name.startswith("_"))


def find_kind(base: type[Base], folder: str, kind: str) -> type[Base]:
    """The subclass of `base` that `kind` names: a file in `folder`, or the dotted path of a module that defines
    exactly one, or of a class. Raises UserError with the nearest name if there is none."""
    if "." not in kind:
        if kind not in (known := kinds_in(folder)):
            raise UserError(
                f"there is no kind `{kind}` of {base.__name__}",
                why=f"{folder} has: {', '.join(known) or 'none'}",
                fix=did_you_mean(kind, known),
            )
        return _only_one(base, importlib.import_module(f"{folder}.{kind}"))
    if (module := _imported(kind)) is not None:
        return _only_one(base, module)
    path, _, name = kind.rpartition(".")
    found = getattr(_imported(path), name, None)
    if not isinstance(found, type) or not issubclass(found, base):
        raise UserError(
            f"there is no kind `{kind}` of {base.__name__}",
            why="a dotted kind is the path of a module, or of a class in it, that Python can import",
            fix=did_you_mean(kind, kinds_in(folder)),
        )
    return found


def name_of(chosen: type[Any], folder: str) -> str:
    """What `find_kind` turns back into `chosen`."""
    module = chosen.__module__
    return module.removeprefix(folder + ".") if module.startswith(folder + ".") else f"{module}.{chosen.__name__}"


def _imported(path: str) -> ModuleType | None:
    """The module, or None if it does not exist. A module that exists and cannot be imported raises its own error."""
    try:
        return importlib.import_module(path)
    except ModuleNotFoundError as error:
        missing = error.name or ""
        if path == missing or path.startswith(missing + "."):
            return None
        raise


def _only_one(base: type[Base], module: ModuleType) -> type[Base]:
    found = [
        item for item in vars(module).values()
        if isinstance(item, type) and issubclass(item, base) and item.__module__ == module.__name__
    ]
    if len(found) != 1:
        names = ", ".join(item.__name__ for item in found) or "none"
        raise UserError(
            f"`{module.__name__}` must define exactly one {base.__name__}",
            where=str(module.__file__),
            why=f"a kind is one file; this one has: {names}",
            fix="name the class: `kind: package.module.Class`",
        )
    return found[0]
