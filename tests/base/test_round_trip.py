"""What is dumped loads back equal, whatever is in it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from hypothesis import given, settings
from hypothesis import strategies as st

from llmtrainer.base.config import dump, load, load_with_origins
from llmtrainer.base.text import read_yaml, typed
from llmtrainer.base.units import Bytes, Duration, Every
from tests.base.flavours.chocolate import Chocolate
from tests.base.flavours.vanilla import Vanilla
from tests.base.parts import Order
from tests.base.taste import Cone, Outsider

# Surrogates are no text: a file could not hold them.
ODD = (
    "null", "~", "", "no", "1e-4", "007", "true", " a ", "a: b", "# x", "- x", "'", '"', "a\n\n b\n", "\x85",
    "\u2028", "\ufeff", "\xa0", "[a]", "{a: 1}", "a=b", "*x", "&x", "!x", "@", "%", "\t", "\0", "\x1b", "\U0001f600",
)  # fmt: skip
texts = st.text(st.characters(exclude_categories=["Cs"]), max_size=12) | st.sampled_from(ODD)
floats = st.floats(allow_nan=False, allow_infinity=False)
amounts = st.floats(min_value=1e-6, max_value=1e18)
durations = st.builds(Duration, amounts, st.sampled_from(["steps", "tokens", "epochs", "minutes"]))
cones = st.builds(Cone, shape=texts, crisp=st.booleans(), height=floats)
flavours = (
    st.builds(Vanilla, pods=st.integers())
    | st.builds(Chocolate, cocoa=floats, cone=cones)
    | st.builds(Outsider, heat=floats)
)
anything = st.recursive(
    st.none() | st.booleans() | st.integers() | floats | texts,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(texts, inner, max_size=3),
    max_leaves=6,
)
orders = st.builds(
    Order,
    guest=texts,
    tables=st.lists(st.integers(), max_size=3).map(tuple),
    flavour=flavours,
    more=st.lists(flavours, max_size=3).map(tuple),
    cone=st.none() | cones,
    scoops=st.integers(min_value=1),
    chill=floats,
    size=st.sampled_from(["small", "large"]) | st.integers(),
    wait=durations,
    remind=st.builds(Every, st.none() | durations),
    box=st.builds(Bytes, st.integers(min_value=0, max_value=2**50)),
    note=st.none() | texts,
    bill=st.none() | texts.filter(lambda text: "\0" not in text and text != "").map(Path),
    prices=st.dictionaries(texts, floats, max_size=3),
    cones=st.dictionaries(texts, cones, max_size=2),
    pair=st.tuples(st.integers(), texts),
    free=st.dictionaries(texts, anything, max_size=3),
)


def loaded(text: str) -> Order:
    return Order.model_validate(read_yaml(text, "dump")[0])


@settings(max_examples=200, deadline=None)
@given(orders)
def test_a_dump_loads_back_equal(order: Order) -> None:
    again = loaded(dump(order))
    assert again == order and hash(again) == hash(order)
    assert dump(again) == dump(order)


@settings(max_examples=50, deadline=None)
@given(orders)
def test_what_json_says_loads_back_equal(order: Order) -> None:
    assert Order.model_validate(json.loads(order.model_dump_json())) == order


@settings(max_examples=50, deadline=None)
@given(texts.filter(lambda text: "\0" not in text), st.integers(min_value=1), floats, st.booleans())
def test_an_override_reads_what_the_value_prints(note: str, scoops: int, chill: float, crisp: bool) -> None:
    overrides = [f"guest={note}", f"scoops={scoops}", f"chill={chill}", f"cone.crisp={crisp}"]
    order, origins = load_with_origins(Order, None, overrides)
    assert (order.guest, order.scoops, order.chill, order.cone) == (note, scoops, chill, Cone(crisp=crisp))
    given_ = {key for key, origin in origins.items() if origin == "command line"}
    assert given_ == {"guest", "scoops", "chill", "cone.crisp"}


@settings(max_examples=50, deadline=None)
@given(anything)
def test_a_value_that_is_typed_already_is_left_alone(value: Any) -> None:
    assert typed(Any, value) == value


def test_the_dump_is_what_a_person_would_write() -> None:
    lines = dump(Order(flavour=Chocolate(), wait=Duration(2e9, "tokens"))).splitlines()
    assert lines[2:5] == ["flavour:", "  kind: chocolate", "  cocoa: 0.7"]
    assert "wait: 2000000000 tokens" in lines and "cup: false" in lines and "note: null" in lines


def test_an_empty_file_of_defaults_equals_the_defaults() -> None:
    assert loaded("") == Order() == load(Order)
