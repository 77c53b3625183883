"""What every format of conversations, and of comparisons, must do, whichever keys it reads."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from typing import Any

import pytest

from llmtrainer.base.errors import UserError
from llmtrainer.base.kinds import find_kind, kinds_in
from llmtrainer.data.format import ComparisonFormat, Format

BASES: dict[str, type[Format] | type[ComparisonFormat]] = {"formats": Format, "comparisons": ComparisonFormat}
KINDS = [f"{name}.{kind}" for name, base in BASES.items() for kind in kinds_in(base.folder) if kind != "auto"]


def made(kind: str) -> Format | ComparisonFormat:
    name, _, kind = kind.partition(".")
    return find_kind(BASES[name], BASES[name].folder, kind)()    # type: ignore[type-abstract, arg-type]


def without_a_key(record: Any, path: str = "") -> Iterator[tuple[str, Any]]:
    """The record without each of its keys in turn, however deep, and the path of that key."""
    if isinstance(record, dict):
        for key, value in record.items():
            yield f"{path}{key}", {name: item for name, item in record.items() if name != key}
            for where, changed in without_a_key(value, f"{path}{key}."):
                yield where, {**record, key: changed}
    if isinstance(record, list):
        for place, value in enumerate(record):
            for where, changed in without_a_key(value, f"{path}{place}."):
                yield where, [*record[:place], changed, *record[place + 1 :]]


@pytest.mark.parametrize("kind", KINDS)
def test_the_sample_of_a_format_becomes_what_it_says_and_stays_as_it_was(kind: str) -> None:
    format = made(kind)
    record, meant = format.sample
    before = copy.deepcopy(record)
    assert format.matches(record) and format.example(record) == meant
    assert record == before


@pytest.mark.parametrize("kind", KINDS)
def test_a_key_that_is_taken_away_is_named_or_was_not_needed(kind: str) -> None:
    format = made(kind)
    record = format.sample[0]
    named = []
    for path, changed in without_a_key(record):
        try:
            format.example(changed)
        except UserError as error:
            assert error.where is not None and f"`{path}`" in error.where, f"{path}: {error}"
            named.append(path)
    assert named or isinstance(record[0], str), "nothing of this format is needed"


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("record", [None, 7, "text", [], {}, [[]], {"messages": 3}, {"messages": [None]}, [None, {}]])
def test_a_record_that_is_no_such_thing_is_refused_by_a_user_error(kind: str, record: Any) -> None:
    format = made(kind)
    assert not format.matches(record)
    with pytest.raises(UserError):
        format.example(record)


@pytest.mark.parametrize("kind", KINDS)
def test_the_sample_of_a_format_fits_no_other(kind: str) -> None:
    record = made(kind).sample[0]
    others = [other for other in KINDS if other.partition(".")[0] == kind.partition(".")[0]]
    assert [other for other in others if made(other).matches(record)] == [kind]
