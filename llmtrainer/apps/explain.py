"""explain: where every value of a config comes from, what it may be, and what it means."""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import Any, ClassVar

from llmtrainer.base.config import Config, load_with_origins
from llmtrainer.base.errors import UserError
from llmtrainer.base.explain import Entry, entries, key_entries
from llmtrainer.base.result import Result
from llmtrainer.base.text import did_you_mean
from llmtrainer.base.verbs import verb_named


class Explanation(Config):
    """What to explain: a recipe's values, or without one the keys that there are."""

    words: ClassVar[tuple[str, ...]] = ("recipe", "key")
    file_is_word: ClassVar[bool] = True

    recipe: str | None = None
    """A YAML file. Without it, the keys are shown with their defaults."""

    key: str | None = None
    """A dotted key, or a part such as `optim`; everything if not given. For a `kind`, the file of its class is
    shown too."""

    verb: str = "train"
    """Whose keys: a verb of `llmtrainer --help`."""

    overrides: tuple[str, ...] = ()
    """Overrides to apply first, such as `objective.kind=causal_lm`."""


@dataclass(frozen=True)
class Explained(Result):
    """One entry per key."""

    keys: tuple[Entry, ...]

    def json(self) -> dict[str, Any]:
        """`keys`: objects with key, value, origin, type, help, file."""
        return {"keys": [{item.name: getattr(entry, item.name) for item in fields(entry)} for entry in self.keys]}

    def text(self) -> str:
        if len(self.keys) == 1 and self.keys[0].file is not None:
            return f"{self.keys[0].text()}\n    {self.keys[0].file}"
        return "\n".join(entry.text() for entry in self.keys)


def explain(explanation: Explanation) -> Explained:
    """Value, origin, type and help of every key."""
    config_type = verb_named(explanation.verb).config_type()
    if explanation.recipe is None and not explanation.overrides:
        found = key_entries(config_type)
    else:
        config, origins = load_with_origins(config_type, explanation.recipe, explanation.overrides)
        found = entries(config, origins)
    key = explanation.key
    shown = [entry for entry in found if key is None or entry.key == key or entry.key.startswith(key + ".")]
    if not shown:
        assert key is not None
        known = [entry.key for entry in found]
        raise UserError(f"there is no key `{key}`", fix=did_you_mean(key, known))
    return Explained(tuple(shown))
