"""The loader: what is written, where it came from, and how it is refused."""

from __future__ import annotations

import copy
import math
import pickle
import random
import string
from pathlib import Path

import pytest
from pydantic import ValidationError

from llmtrainer.base.config import Config, dump, load, load_with_origins, sorted_words
from llmtrainer.base.errors import UserError
from llmtrainer.base.refusal import all_keys
from tests.base.flavours.chocolate import Chocolate
from tests.base.flavours.vanilla import Vanilla
from tests.base.parts import Order
from tests.base.taste import Cone, Flavour, Outsider


def written(folder: Path, text: str) -> Path:
    path = folder / "order.yaml"
    path.write_text(text, encoding="utf-8")
    return path


def refused(file: Path | None = None, *overrides: str, words: tuple[str, ...] = ()) -> UserError:
    with pytest.raises(UserError) as caught:
        load(Order, file, overrides, words)
    return caught.value


def test_the_annotation_decides_what_a_scalar_is(tmp_path: Path) -> None:
    file = written(tmp_path, "chill: 1e-4\nguest: no\nscoops: 1_000\nprices: {on: 3, 4: .5}\nsize: 12\nnote: 07\n")
    order = load(Order, file)
    assert (order.chill, order.guest, order.scoops, order.size, order.note) == (1e-4, "no", 1000, 12, "07")
    assert order.prices == {"on": 3.0, "4": 0.5}
    assert isinstance(order.prices["on"], float)


@pytest.mark.parametrize(
    ("line", "why"),
    [
        ("cup: no", "true | false"), ("cup: 1", "true | false"), ('cup: "true"', "true | false"),
        ("scoops: 2.0", "whole number"), ("scoops: 1e3", "whole number"), ("scoops: true", "whole number"),
        ('scoops: "2"', "whole number"), ("scoops:", "whole number"), ("scoops: [1]", "whole number"),
        ("chill: cold", "number"), ("chill: .inf", "number"), ("chill: nan", "number"),
        ("size: huge", "small | large | whole number"), ("guest: [a]", "text"), ("guest:", "text"),
        ("tables: [1, x]", "whole number"), ("tables: {a: 1}", "list of whole number"),
        ("flavour: vanilla", "kind of Flavour"), ("prices: 3", "number by name"), ("bill: ''", "path | null"),
    ],
)  # fmt: skip
def test_a_value_of_another_type_is_refused_with_its_line(tmp_path: Path, line: str, why: str) -> None:
    error = refused(written(tmp_path, f"# first\n{line}\n"))
    assert error.where == f"{tmp_path / 'order.yaml'}:2"
    assert why in str(error.why)
    assert line.partition(":")[0] in error.what


@pytest.mark.parametrize(
    ("text", "is_file"),
    [
        ("- [a, b]\n- [c, d]\n", False), ("[[a, b]]", False), ("# chats\ncategories:\n- x\ntalks:\n- - a\n", False),
        ("guest: ann\n", True), ("tables: [1]\nothers: [2]\n", True), ("tabels: [1]\n", True), ("", True),
        ("other: x\n", True), ("other: [a\n}", None), ("- [a\n}", False),
    ],
)
def test_a_yaml_file_of_records_is_a_word_and_one_of_keys_the_settings(
    tmp_path: Path, text: str, is_file: bool | None
) -> None:
    file = written(tmp_path, text)
    assert sorted_words(Order, [f"note={file}"]) == (None, [f"note={file}"], [])
    if is_file is None:
        with pytest.raises(UserError, match="is no YAML"):
            sorted_words(Order, [str(file)])
        return
    assert sorted_words(Order, [str(file), "size=1"]) == (
        (file, ["size=1"], []) if is_file else (None, ["size=1"], [str(file)])
    )


def test_a_word_fills_no_field_that_is_given_by_its_key() -> None:
    assert Order.words[:2] == ("guest", "tables")
    order = load(Order, None, ["guest=ann"], ["1", "2"])
    assert (order.guest, order.tables) == ("ann", (1, 2))
    assert "one word too many" in refused(None, "guest=ann", "tables=[1]", words=("bob",)).what


def test_of_a_verb_without_words_a_yaml_file_is_always_the_settings(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="holds no keys"):
        sorted_words(Cone, [str(written(tmp_path, "- [a, b]"))])


def test_python_values_are_as_strict_as_yaml() -> None:
    for wrong in ({"scoops": True}, {"scoops": 2.0}, {"cup": 1}, {"guest": 3}, {"chill": "1"}, {"chill": math.inf}):
        with pytest.raises(ValidationError):
            Order.model_validate(wrong)
    assert Order.model_validate({"tables": [1, 2], "bill": "a/b"}).bill == Path("a/b")


def test_later_sources_win_and_every_value_knows_its_origin(tmp_path: Path) -> None:
    file = written(tmp_path, "guest: ann\ncone:\n  shape: flat\n\n  height: 3\nmore:\n- kind: chocolate\n- {pods: 4}\n")
    order, origins = load_with_origins(Order, file, ["cone.height=4", "more.1.pods=5"], ["bob"])
    assert (order.guest, order.cone, order.more[1]) == ("bob", Cone(shape="flat", height=4.0), Vanilla(pods=5))
    told = {key: origin.removeprefix(str(tmp_path) + "/") for key, origin in origins.items() if origin != "default"}
    assert told == {
        "guest": "command line", "cone.shape": "order.yaml:3", "cone.height": "command line",
        "more.0.kind": "order.yaml:7", "more.1.pods": "command line",
    }  # fmt: skip
    assert origins["chill"] == origins["more.1.kind"] == "default"


def test_an_override_of_a_whole_part_replaces_what_the_file_said(tmp_path: Path) -> None:
    file = written(tmp_path, "flavour: {kind: chocolate, cocoa: 0.9}\n")
    order, origins = load_with_origins(Order, file, ["flavour={pods: 3}"])
    assert order.flavour == Vanilla(pods=3)
    assert origins["flavour.pods"] == "command line" and origins["flavour.kind"] == "default"


def test_another_kind_keeps_the_keys_that_it_knows_and_refuses_the_others(tmp_path: Path) -> None:
    assert load(Order, None, ["flavour.pods=2", "flavour.kind=chocolate"]).flavour == Chocolate(pods=2)
    error = refused(written(tmp_path, "flavour: {kind: chocolate, cocoa: 0.9}\n"), "flavour.kind=vanilla")
    assert error.what == "unknown key `flavour.cocoa`"
    assert error.why == "Vanilla has: kind, pods"


def test_a_bare_text_fills_the_shorthand_and_overrides_reach_below_it(tmp_path: Path) -> None:
    file = written(tmp_path, "cone: wide\ncones: {ann: tall}\n")
    order, origins = load_with_origins(Order, file, ["cone.crisp=false"])
    assert order.cone == Cone(shape="wide", crisp=False) and order.cones == {"ann": Cone(shape="tall")}
    assert origins["cone.shape"].endswith(":1") and origins["cones.ann.shape"].endswith(":2")
    assert origins["cones.ann.crisp"] == "default"
    assert load(Order, None, ["cone=null", "cup=true"]).cone is None
    assert load(Order, written(tmp_path, "cone: null\n"), ["cone.shape=x"]).cone == Cone(shape="x")


def test_values_may_hold_equal_signs_brackets_and_colons() -> None:
    order = load(Order, None, ["guest=a=b==c", "note=[x: {y", "bill={odd}.txt", "tables=[3, 4]"])
    assert (order.guest, order.note, order.bill, order.tables) == ("a=b==c", "[x: {y", Path("{odd}.txt"), (3, 4))
    assert load(Order, None, ["tables=3,4"]).tables == (3, 4)
    assert load(Order, None, ["guest="]).guest == ""


@pytest.mark.parametrize("key", [key for key in all_keys(Order, {}) if "." not in key])
def test_every_misspelled_key_is_refused_with_the_nearest_name(key: str) -> None:
    random_ = random.Random(key)
    known = set(all_keys(Order, {}))
    for _ in range(20):
        place = random_.randrange(len(key))
        wrong = key[:place] + random_.choice(["", random_.choice(string.ascii_lowercase)]) + key[place + 1 :]
        if wrong and wrong not in known:
            error = refused(None, f"{wrong}=1")
            assert error.what == f"unknown key `{wrong}`"
            assert error.fix is not None and error.fix.startswith("did you mean `")
            assert len(key) < 5 or key[:4] in error.fix     # `cones` less a letter is nearer to `cone`


def test_a_misplaced_key_is_told_where_it_belongs() -> None:
    assert refused(None, "height=3").fix == "did you mean `cone.height`?"
    nested = refused(None, "cone.hight=3")
    assert (nested.what, nested.fix) == ("unknown key `cone.hight`", "did you mean `height`?")
    assert nested.why == "Cone has: shape, crisp, height"


def test_an_unknown_kind_is_refused_with_what_the_folder_has(tmp_path: Path) -> None:
    error = refused(written(tmp_path, "guest: x\nmore:\n- {kind: choclate}\n"))
    assert error.what == "`more.0`: there is no kind `choclate` of Flavour"
    assert error.why == "tests.base.flavours has: chocolate, vanilla"
    assert error.fix == "did you mean `chocolate`?"
    assert str(error.where).endswith(":3")


def test_a_kind_may_be_the_dotted_path_of_a_module_or_a_class() -> None:
    by_class = load(Order, None, ["flavour={kind: tests.base.taste.Outsider, heat: 2}"]).flavour
    assert by_class == Outsider(heat=2.0)
    assert load(Flavour, None, ["kind=tests.base.flavours.chocolate"]) == Chocolate()
    for wrong in ("tests.base.nothing", "tests.base.taste.Cone", "os.path"):
        assert wrong.partition(".")[0] in refused(None, f"flavour.kind={wrong}").what


def test_a_missing_value_is_told_with_its_help() -> None:
    class Demand(Config):
        """Has no default."""

        amount: int
        """How much is wanted."""

    with pytest.raises(UserError) as caught:
        load(Demand)
    error = caught.value
    told = (error.what, error.why, error.fix)
    assert told == ("`amount` is missing", "How much is wanted.", "amount=<whole number>")
    # The misspelled key is why the other one is missing, so it is what has to be told.
    with pytest.raises(UserError, match="unknown key `amont`"):
        load(Demand, None, ["amont=3"])


def test_a_validators_own_error_keeps_its_four_parts(tmp_path: Path) -> None:
    error = refused(written(tmp_path, "cup: true\n"))
    assert (error.what, error.why, error.fix) == ("a cup has no cone", "it stands by itself", "cone=null")
    error = refused(None, "wait=5")
    assert error.what == "`wait`: `5` is no duration" and error.where == "command line"


@pytest.mark.parametrize(
    ("text", "what", "line"),
    [
        ("guest: a\nscoops: 1\nguest: b\n", "`guest` is given twice", ":1 and "),
        ("cone: {shape: a, shape: b}\n", "`cone.shape` is given twice", ":1 and "),
        ("guest: !!python/name:os.system\n", "`guest` has the tag", ":1"),
        ("free: &x {a: *x}\n", "`free.a` contains itself", ":1"),
        ("- a\n- b\n", "holds no keys", ":1"),
        ("guest: [\n", "is no YAML", ":"),
        ("\tguest: x\n", "is no YAML", ":1"),
        ("? [a]\n: b\n", "a key must be text", ":1"),
    ],
)
def test_what_is_no_plain_mapping_is_refused(tmp_path: Path, text: str, what: str, line: str) -> None:
    error = refused(written(tmp_path, text))
    assert what in error.what and line in str(error.where)


def test_files_that_cannot_be_read_are_refused_by_name(tmp_path: Path) -> None:
    file = written(tmp_path, "guest: x\n")
    assert refused(tmp_path / "oder.yaml").fix == "did you mean `order.yaml`?"
    assert "cannot be read" in refused(tmp_path).what
    file.write_bytes(b"guest: \xff\n")
    assert refused(file).where == f"{file}, byte 7"
    assert load(Order, written(tmp_path, "# nothing\n")) == Order()


def test_dump_writes_kinds_defaults_and_none(tmp_path: Path) -> None:
    order = Order(flavour=Chocolate(cocoa=0.1), note="null", bill=Path("x"))
    text = dump(order)
    assert "kind: chocolate" in text and "note: 'null'" in text and "remind: never" in text
    assert load(Order, written(tmp_path, text)) == order
    assert "note:" in dump(Order()) and load(Order, written(tmp_path, dump(Order()))).note is None


def test_a_field_typed_by_a_base_class_dumps_all_of_its_kind() -> None:
    order = Order(more=(Chocolate(cocoa=0.2), Outsider(heat=3.0)))
    assert order.model_dump()["more"] == order.plain()["more"]
    assert order.plain()["more"][1] == {"kind": "tests.base.taste.Outsider", "heat": 3.0}


def test_equal_configs_are_equal_whatever_was_read() -> None:
    one, other = Order(prices={"a": 1.0}), Order(prices={"a": 1.0})
    assert one.guest == "nobody" and one == other and hash(one) == hash(other)
    assert one != Order() and Vanilla(pods=0) != Chocolate(pods=0)
    assert pickle.loads(pickle.dumps(one)) == one == copy.deepcopy(one)
    with pytest.raises(ValidationError):
        one.guest = "x"  # type: ignore[misc]


def test_a_word_is_an_override_only_if_a_key_stands_before_its_first_equal_sign() -> None:
    arguments = ["guests = 1", "def f(a=1): pass", "guest=a=b", "cone.hight=3", "--", "cup=true", "--json"]
    assert sorted_words(Order, arguments) == (
        None, ["guest=a=b", "cone.hight=3"], ["guests = 1", "def f(a=1): pass", "cup=true", "--json"],
    )  # fmt: skip


def test_dashes_and_options_are_the_same_as_overrides(tmp_path: Path) -> None:
    file = written(tmp_path, "prices: {a-b: 1}\n")
    arguments = [str(file), "--prices.a-b", "2", "--cone.crisp=false", "--cup", "--scoops", "-1", "w"]
    found, overrides, words = sorted_words(Order, arguments)
    assert (found, words) == (file, ["w"])
    assert overrides == ["prices.a-b=2", "cone.crisp=false", "cup=true", "scoops=-1"]
    assert load(Order, found, overrides[:2]).prices == {"a-b": 2.0}

    class Long(Order):
        """Has an underscore."""

        ice_cream: int = 0
        """How much."""

    assert [load(Long, None, [f"{key}=3"]).ice_cream for key in ("ice-cream", "ice_cream")] == [3, 3]
    assert sorted_words(Long, ["ice-cream=3", "--ice-cream", "4"])[1] == ["ice-cream=3", "ice-cream=4"]


@pytest.mark.parametrize(
    ("arguments", "what"),
    [
        (["--scops", "3"], "unknown key `scops`"), (["--scoops"], "`--scoops` has no value"),
        (["--scoops", "--cup"], "`--scoops` has no value"), (["gest=ann"], "unknown key `gest`"),
    ],
)  # fmt: skip
def test_what_is_nearly_an_override_is_refused_and_never_taken_for_a_word(arguments: list[str], what: str) -> None:
    with pytest.raises(UserError) as caught:
        sorted_words(Order, arguments)
    assert caught.value.what == what


def test_a_key_may_belong_to_a_kind_that_is_chosen_later_on_the_line(tmp_path: Path) -> None:
    assert sorted_words(Order, ["flavour.cocoa=1", "flavour.kind=chocolate"])[1][0] == "flavour.cocoa=1"
    file = written(tmp_path, "flavour: {kind: chocolate}\n")
    assert sorted_words(Order, [str(file), "flavour.cocoa=1"])[1:] == (["flavour.cocoa=1"], [])


def test_words_fill_the_named_fields_and_the_last_takes_all_that_are_left() -> None:
    order = load(Order, None, ["scoops=2"], ["null", "1", "2"])
    assert (order.guest, order.tables, order.scoops) == ("null", (1, 2), 2)
    assert refused(None, words=("ann", "x")).where == "command line"
    with pytest.raises(UserError, match="`b` is one word too many"):
        load(Cone, None, (), ["b"])
    with pytest.raises(UserError, match="unknown key `shap`"):
        load(Cone, None, (), ["shap=b"])


def test_a_setting_behind_the_two_dashes_is_sent_in_front_of_them() -> None:
    _, overrides, words = sorted_words(Cone, ["--", "height=2"])
    with pytest.raises(UserError, match="one word too many") as caught:
        load(Cone, None, overrides, words)
    assert caught.value.fix == "put height=2 before the `--`"


def test_the_name_of_a_kind_in_a_list_is_answered_with_a_list_that_loads() -> None:
    fix = refused(None, "more=[chocolate]").fix or ""
    assert fix.endswith("as in more='[{kind: chocolate}]'")
    assert load(Order, None, ["more=[{kind: chocolate}]"]).more[0].kind == "chocolate"


def test_an_item_of_a_list_can_be_set_but_not_added(tmp_path: Path) -> None:
    file = written(tmp_path, "tables: [1, 2]\nmore: [{pods: 1}]\n")
    assert load(Order, file, ["tables.1=5", "more.0.pods=7"]) == Order(tables=(1, 5), more=(Vanilla(pods=7),))
    assert refused(file, "tables.2=5").why == "the list has 2 items, counted from 0"
    below = refused(file, "guest.x=5")
    assert (below.what, below.why) == ("unknown key `guest.x`", "text has no keys")
