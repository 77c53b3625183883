"""Help from docstrings, and the JSON schema."""

from __future__ import annotations

from typing import Any, Literal

import pytest

from llmtrainer.base.config import Config, load_with_origins, schema
from llmtrainer.base.explain import REQUIRED, entries, help_lines, key_entries, summary, type_name
from llmtrainer.base.refusal import all_keys
from llmtrainer.base.units import Duration
from tests.base.parts import Order
from tests.base.taste import Cone, Flavour


class Tree(Config):
    """A part that holds parts of its own class."""

    branches: tuple[Tree, ...] = ()
    """Smaller trees."""


def test_a_part_that_holds_its_own_class_is_told_once() -> None:
    assert [entry.key for entry in key_entries(Tree)] == ["branches"]
    assert all_keys(Tree, {}) == ["branches"]
    grown, origins = load_with_origins(Tree, None, ["branches=[{branches: [{}]}]"])
    assert list(origins) == ["branches.0.branches.0.branches"] == [entry.key for entry in entries(grown, origins)]


def test_every_value_is_told_with_origin_type_and_help() -> None:
    order, origins = load_with_origins(Order, None, ["flavour.kind=chocolate", "more=[{pods: 2}]"])
    told = {entry.key: entry for entry in entries(order, origins)}
    assert list(told) == list(origins)
    assert (told["flavour.cocoa"].value, told["flavour.cocoa"].origin) == (0.7, "default")
    assert told["flavour.cocoa"].text() == "flavour.cocoa = 0.7\n    number. Share of cocoa."
    assert told["more.0.pods"].text() == "more.0.pods = 2    <- command line\n    whole number. How many."
    kind = told["flavour.kind"]
    assert (kind.value, kind.origin, kind.help) == ("chocolate", "command line", "Dark.")
    assert kind.type == "kind of Flavour: chocolate | vanilla, or a dotted path"
    assert str(kind.file).endswith("tests/base/flavours/chocolate.py")


def test_help_lists_every_key_with_its_default() -> None:
    told = {entry.key: entry.value for entry in key_entries(Order)}
    assert set(all_keys(Order, {})) - set(told) == {"flavour", "cone"}      # told by their own keys
    assert (told["guest"], told["flavour.kind"], told["cone.height"]) == ("nobody", "vanilla", 8.0)
    assert (told["more"], told["more.0.kind"], told["wait"]) == ([], "vanilla", "2 epochs")
    assert any("How many." in line for line in help_lines(Order))

    class Demand(Order):
        """With one thing required."""

        amount: int
        """How much."""

    assert {entry.key: entry.value for entry in key_entries(Demand)}["amount"] == REQUIRED


@pytest.mark.parametrize(
    ("annotation", "name"),
    [
        (int | None, "whole number | null"), (tuple[float, ...], "list of number"), (Duration, "duration"),
        (Literal["a", 1], "a | 1"), (tuple[int, str], "[whole number, text]"), (Cone | None, "Cone | null"),
        (dict[str, bool], "true | false by name"), (Flavour, "kind of Flavour"), (Any, "anything"),
    ],
)  # fmt: skip
def test_types_have_names_that_people_know(annotation: Any, name: str) -> None:
    assert type_name(annotation) == name


def test_the_summary_is_the_first_paragraph_on_one_line() -> None:
    def documented() -> None:
        """One thing,
        and another.

        More.
        """

    assert summary(documented) == "One thing, and another." and summary(None.__class__.__call__) is not None


def test_the_schema_has_one_alternative_per_kind_and_help_for_every_key() -> None:
    found = schema(Order)
    kinds = found["$defs"]["Flavour"]["oneOf"]
    assert [item["properties"]["kind"].get("const") for item in kinds] == ["chocolate", "vanilla", None]
    assert ["kind" in item["required"] for item in kinds] == [True, False, True]    # vanilla is the default
    assert [item.get("additionalProperties") for item in kinds] == [False, False, None]
    assert found["properties"]["wait"]["default"] == "2 epochs"
    assert all(item.get("description") for item in found["properties"].values())
    assert {"type": "string"} in found["$defs"]["Cone"]["anyOf"]      # `cone: wide`
