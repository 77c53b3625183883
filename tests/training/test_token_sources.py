"""Ids that another program made: training, evaluate and inspect see what they would see of the text itself."""

from __future__ import annotations

import pickle
import struct
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
import torch

from llmtrainer.apps.inspect import Inspection, inspect
from llmtrainer.base.errors import UserError
from llmtrainer.data.open import find
from llmtrainer.data.packed import Store
from llmtrainer.tokenizer.tokenizer import load_tokenizer
from llmtrainer.training.cache import receipt
from llmtrainer.training.console import voice
from llmtrainer.training.prepare import Preparation, prepare
from llmtrainer.training.recipe import Recipe
from llmtrainer.training.run import train
from llmtrainer.training.use import Evaluation, evaluate
from tests.data.test_megatron import read_pair


@pytest.fixture(autouse=True)
def quiet() -> Iterator[None]:
    with voice(quiet=True):
        yield


@pytest.fixture(scope="module")
def sources(world: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """The world's text as ids in every container."""
    folder = tmp_path_factory.mktemp("ids")
    tokenizer = load_tokenizer(world / "tokenizer")
    documents = [tokenizer.encode(path.read_text()) for path in sorted((world / "text").iterdir())]
    flat = [id for ids in documents for id in (*ids, tokenizer.end)]
    np.save(folder / "a.npy", np.array(flat, dtype=np.uint16))
    torch.save([torch.tensor(ids) for ids in documents], folder / "a.pt")
    (folder / "a.pkl").write_bytes(pickle.dumps({"input_ids": documents}))
    (folder / "a.bin").write_bytes(struct.pack(f"<{len(flat)}H", *flat))
    prepare(Preparation(
        data=str(world / "text"), out=str(folder / "megatron"), tokenizer=str(world / "tokenizer"), workers=1,
        format="megatron",
    ))  # fmt: skip
    return {path.name: path for path in folder.iterdir()}


NAMES = ["a.npy", "a.pt", "a.pkl", "a.bin", "megatron"]


@pytest.mark.parametrize("name", NAMES)
def test_a_store_of_ids_is_the_store_of_their_text(
    world: Path, sources: dict[str, Path], name: str, tmp_path: Path
) -> None:
    made = prepare(Preparation(
        data=str(sources[name]), out=str(tmp_path / "store"), tokenizer=str(world / "tokenizer"), workers=1
    ))  # fmt: skip
    assert Store(tmp_path / "store").fingerprint == Store(world / "store").fingerprint
    assert made.bytes_per_token == receipt(world / "store")["bytes_per_token"]


def test_the_pair_for_megatron_holds_the_documents_of_the_store(
    world: Path, sources: dict[str, Path], tmp_path: Path
) -> None:
    store = Store(world / "store")
    expected = [tuple(store.read(number).tolist()) for number in range(store.documents)]
    assert read_pair(sources["megatron"] / "tokens") == (expected, list(range(store.documents + 1)))
    assert {path.name for path in sources["megatron"].iterdir()} == {"tokens.bin", "tokens.idx", "prepared.json"}
    described = {"data": str(world / "store"), "tokenizer": str(world / "tokenizer"), "out": str(tmp_path / "pair")}
    again = Preparation(**described, format="megatron")    # type: ignore[arg-type]
    assert not prepare(again).reused and prepare(again).reused
    for name in ("tokens.bin", "tokens.idx"):
        assert (tmp_path / "pair" / name).read_bytes() == (sources["megatron"] / name).read_bytes()
    with pytest.raises(UserError, match="a token store already"):
        prepare(Preparation(**described))    # type: ignore[arg-type]


def test_a_run_on_ids_is_the_run_on_their_text(
    recipe: Callable[..., Recipe], sources: dict[str, Path], tmp_path: Path
) -> None:
    of_text = train(recipe("duration=3 steps", f"run={tmp_path}/text"))
    of_ids = train(recipe(
        "duration=3 steps", f"run={tmp_path}/ids", f"data.train={{path: {sources['a.npy']}, workers: 1}}",
        f"cache={tmp_path}/cache",
    ))  # fmt: skip
    assert of_ids.loss == of_text.loss and of_ids.figures == of_text.figures


@pytest.mark.parametrize("name", ["a.npy", "megatron"])
def test_evaluate_and_inspect_take_ids_as_they_are(
    recipe: Callable[..., Recipe], world: Path, sources: dict[str, Path], name: str
) -> None:
    run = train(recipe("duration=2 steps")).run
    of_text = evaluate(Evaluation(model=run, data=str(world / "text")))
    for data in (sources[name], world / "store"):
        of_ids = evaluate(Evaluation(model=run, data=str(data)))
        assert (of_ids.loss, of_ids.tokens, of_ids.bytes) == (of_text.loss, of_text.tokens, of_text.bytes)
    with pytest.raises(UserError, match="a token store stands where text is wanted"):
        find(world / "store")
    rows = [
        inspect(Inspection(source=str(data), tokenizer=str(world / "tokenizer"), rows=60)).json()["rows"]
        for data in (world / "text", sources[name])
    ]
    assert rows[0] == rows[1]


def test_a_recipe_lets_a_pickle_run_its_code_only_where_it_says_so(
    recipe: Callable[..., Recipe], world: Path, tmp_path: Path
) -> None:
    ids = np.fromfile(world / "store" / "tokens-00000.bin", "<u2")
    (tmp_path / "a.pkl").write_bytes(pickle.dumps([slice(0, 1), ids]).replace(b"slice", b"print", 1))
    described = (f"data.train={{path: {tmp_path}/a.pkl, workers: 1}}", f"cache={tmp_path}/cache", "duration=1 steps")
    with pytest.raises(UserError, match=r"wants to run `builtins\.print`"):
        train(recipe(*described))
    with pytest.raises(UserError, match="a document is a NoneType"):    # print was run, and returned nothing
        train(recipe(*described, "data.allow_pickle=true"))


def test_fields_may_be_joined_in_a_recipe(recipe: Callable[..., Recipe], tmp_path: Path) -> None:
    (tmp_path / "a.csv").write_text("title,content\n" + "".join(f"T{n},body {n} of words\n" for n in range(40)))
    chosen = recipe(
        f"data.train={{path: {tmp_path}/a.csv, workers: 1, fields: [title+content]}}", f"cache={tmp_path}/cache",
        "duration=1 steps",
    )  # fmt: skip
    assert train(chosen).step == 1
    (store,) = (path for path in (tmp_path / "cache" / "tokens").iterdir() if not path.name.startswith("."))
    tokenizer = load_tokenizer(chosen.tokenizer.path or "")
    assert tokenizer.decode(Store(store).read(3)[:-1].tolist()) == "T3\nbody 3 of words"
