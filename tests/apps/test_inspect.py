"""inspect: what it shows is what training reads."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch

from llmtrainer.apps.inspect import CRITICAL, LEARNED, PARTLY, READ_ONLY, Inspected, Inspection, Shown, inspect
from llmtrainer.base.config import load, sorted_words
from llmtrainer.base.errors import UserError
from llmtrainer.parallel.engines.single import Single
from llmtrainer.tokenizer.tokenizer import load_tokenizer
from llmtrainer.tokenizer.train import train_vocabulary
from llmtrainer.training.assemble import rows_of, tokenizer_of
from llmtrainer.training.prepare import Preparation, prepare
from llmtrainer.training.recipe import Recipe

TEXTS = [f"def step_{number}(x):\n    return x * {number}  # \u4f60\u597d \U0001f680\n" for number in range(40)]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("inspect")
    train_vocabulary(iter(["".join(TEXTS)]), 300).save(folder / "tokenizer")
    (folder / "data.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in TEXTS))
    (folder / "recipe.yaml").write_text(f"""\
run: {folder}/run
cache: {folder}/cache
model: {{hidden_size: 16, layers: 1, heads: 1, context_length: 64}}
tokenizer: {folder}/tokenizer
data:
  train: {{path: {folder}/data.jsonl, workers: 1}}
  sequence_length: 64
  tokens_per_batch: 128
  sequences_per_step: 5
  held_out: 0.2
""")
    return folder


def shown(folder: Path, source: str, **settings: Any) -> list[dict[str, Any]]:
    told = inspect(Inspection(source=str(folder / source), **settings)).json()
    json.dumps(told, allow_nan=False)
    rows: list[dict[str, Any]] = told["rows"]
    return rows


def test_a_document_is_shown_whole_with_its_end_and_only_its_first_token_is_not_learned(folder: Path) -> None:
    tokenizer = load_tokenizer(folder / "tokenizer")
    rows = shown(folder, "data.jsonl", tokenizer=str(folder / "tokenizer"), rows=3, step=1)
    assert len(rows) == 3
    for row, text in zip(rows, TEXTS[3:6], strict=True):
        ids = [*tokenizer.encode(text), tokenizer.end]
        assert row["tokens"] == ids
        assert "".join(row["pieces"]) == text + "<|endoftext|>"
        assert row["weights"] == [0.0] + [1.0] * (len(ids) - 1)
        assert row["positions"] == list(range(len(ids)))
        assert row["document"] == [0] * len(ids)


def test_a_token_store_shows_what_its_text_shows(folder: Path) -> None:
    tokenizer = str(folder / "tokenizer")
    prepare(Preparation(data=str(folder / "data.jsonl"), out=str(folder / "store"), tokenizer=tokenizer, workers=1))
    of_text = shown(folder, "data.jsonl", tokenizer=tokenizer, rows=40)
    assert shown(folder, "store", tokenizer=tokenizer, rows=40) == of_text


@pytest.mark.parametrize("step", [0, 7])
def test_a_recipes_rows_are_those_of_the_batches_that_training_reads(folder: Path, step: int) -> None:
    recipe = load(Recipe, folder / "recipe.yaml")
    tokenizer_folder, tokenizer = tokenizer_of(recipe)
    batches = rows_of(recipe, tokenizer_folder, tokenizer, Single(device="cpu").start("float32")).train.batches(step)
    rows = shown(folder, "recipe.yaml", step=step, rows=99)
    trained = [
        {name: getattr(batch, f"{name}_BT")[b] for name in ("tokens", "targets", "weights", "position", "document")}
        for batch in batches for b in range(batch.tokens_BT.shape[0])
    ]
    assert len(rows) == len(trained) == 5
    for row, batch in zip(rows, trained, strict=True):
        n = int((batch["document"] >= 0).sum())
        assert len(row["tokens"]) == n + 1
        assert torch.equal(torch.tensor(row["tokens"][:-1]), batch["tokens"][:n])
        assert torch.equal(torch.tensor(row["tokens"][1:]), batch["targets"][:n])
        assert torch.equal(torch.tensor(row["weights"][1:]), batch["weights"][:n])
        assert torch.equal(torch.tensor(row["positions"][:-1]).int(), batch["position"][:n])
        assert torch.equal(torch.tensor(row["document"][:-1]).int(), batch["document"][:n])


def test_marked_tokens_add_up_to_the_targets_of_the_title(folder: Path) -> None:
    told = inspect(Inspection(source=str(folder / "recipe.yaml"), rows=2))
    for title, row in zip(re.findall(r"^row .*$", told.text(), re.MULTILINE), told.rows, strict=True):
        assert f"{sum(row.weights):.0f} of them learned" in title


def test_the_held_out_part_has_other_documents_than_training(folder: Path) -> None:
    def numbers(part: str) -> set[str]:
        pieces = [piece for row in shown(folder, "recipe.yaml", part=part, rows=99) for piece in row["pieces"]]
        return set(re.findall(r"step_(\d+)\(", "".join(pieces)))

    train, held_out = numbers("train"), numbers("held_out")
    assert train and held_out
    assert not train & held_out


@pytest.mark.parametrize("given", [{"template": "llama3"}, {"date": "2026-01-01"}, {"fields": ("body",)}])
def test_what_the_recipe_says_itself_is_refused_beside_it(folder: Path, given: dict[str, object]) -> None:
    with pytest.raises(UserError, match="says itself how its data is read") as caught:
        shown(folder, "recipe.yaml", **given)
    assert f"overrides=[data.{next(iter(given))}=" in str(caught.value.fix)


def test_the_first_token_of_a_row_is_learned_nowhere(folder: Path) -> None:
    (folder / "empty.jsonl").write_text('{"prompt": "", "response": "abc"}\n')
    (row,) = shown(folder, "empty.jsonl", tokenizer=str(folder / "tokenizer"), template="chatml")
    assert row["weights"][0] == 0.0 and sum(row["weights"]) == len(row["weights"]) - 1


def test_a_run_directory_shows_the_rows_of_its_recipe(folder: Path) -> None:
    run = folder / "a-run"
    run.mkdir()
    (run / "recipe.yaml").write_text((folder / "recipe.yaml").read_text())
    assert shown(folder, "a-run") == shown(folder, "recipe.yaml")


def test_overrides_change_the_recipe(folder: Path) -> None:
    (row, *_) = shown(folder, "recipe.yaml", overrides=("data.sequence_length=32",))
    assert len(row["tokens"]) == 33


ROW = Shown(
    tokens=[0, 1, 2, 3, 4], pieces=["ask\n", "half ", "no\nw ", "<|end|>", "\x1b[2J"],
    weights=[0.0, 0.5, 1.0, 2.5, 0.0], positions=[0, 1, 2, 3, 0], document=[0, 0, 0, 0, 1],
)


def test_without_colour_the_weight_stands_in_front_of_its_text() -> None:
    assert Inspected("x", 0, [ROW]).text().splitlines() == [
        "row 0: 5 tokens in 2 documents, 3 of them learned, their weights add up to 4",
        "     0 | ask",
        "   0.5 | half ",
        "     1 | no",
        "       | w ",
        "   2.5 | <|end|>",
        "-- document 1",
        "     0 | \\x1b[2J",
    ]


def test_with_colour_every_line_of_every_stretch_has_its_own_and_ends_it() -> None:
    text = Inspected("x", 0, [ROW], colored=True).text()
    for stretch in (
        f"{READ_ONLY}ask\x1b[0m", f"{PARTLY}half \x1b[0m", f"{LEARNED}no\x1b[0m", f"{LEARNED}w \x1b[0m",
        f"{CRITICAL}<|end|>\x1b[0m", f"{READ_ONLY}-- document 1\x1b[0m", f"{READ_ONLY}\\x1b[2J\x1b[0m",
    ):
        assert stretch in text
    assert text.startswith("weights  ")


def test_boundaries_stand_between_tokens() -> None:
    row = Shown([1, 2], ["ab", "c"], [1.0, 1.0], [0, 1], [0, 0])
    assert "     1 | ab|c|" in Inspected("x", 0, [row], boundaries=True).text()


def test_colour_is_for_terminals_unless_asked_for(folder: Path) -> None:
    def colored(**settings: Any) -> bool:
        wish = Inspection(source=str(folder / "data.jsonl"), tokenizer=str(folder / "tokenizer"), **settings)
        return "\x1b" in inspect(wish).text()

    assert not colored()
    assert colored(color="always")


@pytest.mark.parametrize(("source", "settings", "what"), [
    ("data.jsonl", {}, "text alone has no tokens"),
    ("data.jsonl", {"tokenizer": "tokenizer", "step": 99}, "there are no documents 396 and following"),
    ("data.jsonl", {"tokenizer": "tokenizer", "part": "held_out"}, "`part` is for recipes"),
    ("data.jsonl", {"tokenizer": "tokenizer", "overrides": ("seed=1",)}, "`overrides` is for recipes"),
    ("recipe.yaml", {"tokenizer": "tokenizer"}, "the recipe has its own tokenizer"),
    ("recipe.yaml", {"overrides": ("data.held_out=0.0",), "part": "held_out"}, "the recipe holds nothing out"),
    ("nothing.yaml", {}, "there is no file"),
    ("nothing.txt", {"tokenizer": "tokenizer"}, "no file or folder"),
])
def test_what_cannot_be_shown_is_refused(folder: Path, source: str, settings: dict[str, Any], what: str) -> None:
    if "tokenizer" in settings:
        settings = {**settings, "tokenizer": str(folder / settings["tokenizer"])}
    with pytest.raises(UserError, match=what):
        inspect(Inspection(source=str(folder / source), **settings))


def test_a_recipe_on_the_command_line_is_the_source_and_no_config_of_inspect() -> None:
    file, overrides, words = sorted_words(Inspection, ["recipe.yaml", "step=3", "--rows", "2"])
    assert load(Inspection, file, overrides, words) == Inspection(source="recipe.yaml", step=3, rows=2)


def test_an_empty_file_is_called_what_it_is(folder: Path) -> None:
    (folder / "nothing.jsonl").write_text("")
    with pytest.raises(UserError, match="there is nothing in it to show"):
        shown(folder, "nothing.jsonl", tokenizer=str(folder / "tokenizer"), template="chatml")
