"""Functions and classes of the user's own, by the name under which Python finds them."""

from __future__ import annotations

import importlib
from collections.abc import Callable
from typing import Any

from llmtrainer.base.errors import UserError
from llmtrainer.base.text import did_you_mean

PATTERN = r"^[A-Za-z_][\w.]*:[A-Za-z_<][\w.<>]*$"
"""`package.module:function`."""


def callable_named(name: str, wanted_by: str) -> Callable[..., Any]:    # Any: it is checked when something comes back
    """What `package.module:function` names. UserError where there is no such thing; a module that fails while it is
    imported raises its own error."""
    module, _, path = name.partition(":")
    where = f"{wanted_by}, `{name}`"
    try:
        found: Any = importlib.import_module(module)
    except ModuleNotFoundError as error:
        if error.name is not None and (module == error.name or module.startswith(error.name + ".")):
            raise UserError(
                f"there is no module `{module}`", where=where,
                why="it is imported by this Python, which looks into its own path",
                fix="install it, or start from the folder that it is in",
            ) from None
        raise
    for step in path.split("."):
        holder, found = found, getattr(found, step, None)
        if found is None:
            near = did_you_mean(step, [item for item in dir(holder) if not item.startswith("_")])
            raise UserError(f"`{module}` has no `{path}`", where=where, fix=near)
    if not callable(found):
        raise UserError(f"`{name}` cannot be called", where=where, why=f"it is of type {type(found).__name__}")
    function: Callable[..., Any] = found
    return function


def name_of(function: Callable[..., Any]) -> str:
    """The name of a function in hand, in the same form; nobody promises that it can be imported."""
    owner = function if hasattr(function, "__qualname__") else type(function)
    return f"{owner.__module__}:{owner.__qualname__}"
