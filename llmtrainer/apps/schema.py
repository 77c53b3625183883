"""schema: what editors complete and check a recipe with."""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import Any

from llmtrainer.base.config import Config
from llmtrainer.base.config import schema as schema_of
from llmtrainer.base.result import Result
from llmtrainer.base.verbs import verb_named


class SchemaRequest(Config):
    """Which schema."""

    verb: str = "train"
    """Whose config file: a verb of `llmtrainer --help`."""


@dataclass(frozen=True)
class Schema(Result):
    """The schema itself, also as text."""

    schema: dict[str, Any]

    def json(self) -> dict[str, Any]:
        return self.schema

    def text(self) -> str:
        return json.dumps(self.schema, indent=2)


def schema(request: SchemaRequest) -> Schema:
    """JSON schema of a config file: help texts included, one alternative per kind."""
    return Schema(schema_of(verb_named(request.verb).config_type()))
