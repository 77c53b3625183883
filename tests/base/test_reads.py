"""A setting that nobody read is known by name."""

from __future__ import annotations

from pathlib import Path

from llmtrainer.base.config import dump, forget_reads, load, unread
from llmtrainer.base.explain import entries
from tests.base.parts import Order

SET = ["guest=x", "cone.height=3", "flavour.kind=chocolate", "more=[{pods: 2}]", "cones={a: {shape: b}}"]


def test_what_was_set_and_not_read_is_told_by_its_dotted_name() -> None:
    order = load(Order, None, SET)
    assert unread(order) == ["guest", "flavour", "more.0.pods", "cone.height", "cones.a.shape"]
    assert order.guest == "x" and order.cone is not None and order.cone.crisp
    assert unread(order) == ["flavour", "more.0.pods", "cone.height", "cones.a.shape"]
    assert [part.pods for part in order.more] == [2] and order.cone.height == 3
    assert order.flavour.kind == "chocolate" and order.cones["a"].shape == "b"
    assert unread(order) == []
    forget_reads(order)
    assert unread(order) == ["guest", "flavour", "more.0.pods", "cone.height", "cones.a.shape"]


def test_looking_at_a_config_as_a_whole_is_not_reading() -> None:
    order = load(Order, None, SET)
    assert order == load(Order, None, SET) and dump(order) and hash(order) and order.model_dump() and repr(order)
    assert entries(order, {}) and order.model_dump_json()
    assert len(unread(order)) == 5


def test_defaults_and_validators_do_not_count() -> None:
    assert unread(load(Order)) == []
    assert unread(load(Order, None, ["scoops=1", "flavour.pods=1", "cone.height=8"])) == []     # spelt out
    # The validator of Order reads both, while it is loaded.
    assert unread(load(Order, None, ["cup=true", "cone=null"])) == ["cone", "cup"]


def test_a_dumped_config_has_no_more_to_read_than_the_one_it_was(tmp_path: Path) -> None:
    order = load(Order, None, SET)
    (tmp_path / "o.yaml").write_text(dump(order))
    assert unread(load(Order, tmp_path / "o.yaml")) == unread(order)


def test_two_configs_with_the_same_default_part_do_not_share_what_was_set() -> None:
    one, other = load(Order, None, ["cone.height=3"]), load(Order, None, ["cone.height=3"])
    assert one.cone is not None and one.cone.height == 3
    assert unread(one) == [] and unread(other) == ["cone.height"]


def test_a_changed_copy_reads_for_its_original() -> None:
    order = load(Order, None, ["guest=x"])
    assert order.model_copy(update={"scoops": 3}).guest == "x"
    assert unread(order) == []
