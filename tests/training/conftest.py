"""A tiny world for runs: a vocabulary and a token store made once, and recipes that take milliseconds a step."""

from __future__ import annotations

import json
import random
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import pytest

from llmtrainer.base.config import load
from llmtrainer.training.prepare import Preparation, TokenizerTraining, prepare, train_tokenizer
from llmtrainer.training.recipe import Recipe

RECIPE = """
run: {run}
model: {{hidden_size: 32, layers: 2, heads: 2, kv_heads: 1, intermediate_size: 64, context_length: 32, dropout: 0.1}}
tokenizer: {world}/tokenizer
data:
  train: {world}/store
  sequence_length: 32
  tokens_per_batch: 64
  sequences_per_step: 5
  held_out: 0.1
optim:
  schedule: {{peak: 3e-3, warmup: 0 steps}}
precision: float32
duration: 12 steps
evaluate: {{every: 4 steps, held_out_rows: 8}}
save: {{every: 3 steps, keep_newest: 2, keep_best: 1}}
seed: 11
"""


@pytest.fixture(scope="session")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with tokenizer/, store/ and text/: 60 short documents of four made-up languages."""
    folder = tmp_path_factory.mktemp("world")
    draw = random.Random(3)
    (folder / "text").mkdir()
    for number in range(60):
        words = ["".join(draw.choices("abcdefgh", k=draw.randint(1, 6))) for _ in range(40)]
        lines = [" ".join(draw.choices(words, k=8)) for _ in range(draw.randint(1, 12))]
        (folder / "text" / f"{number:03d}.txt").write_text("\n".join(lines))
    train_tokenizer(
        TokenizerTraining(data=str(folder / "text"), out=str(folder / "tokenizer"), vocabulary=320)
    )
    prepare(
        Preparation(
            data=str(folder / "text"), out=str(folder / "store"), tokenizer=str(folder / "tokenizer"), workers=1
        )
    )
    return folder


@pytest.fixture
def recipe_file(world: Path, tmp_path: Path) -> Path:
    """The tiny recipe, its run directory below tmp_path."""
    path = tmp_path / "recipe.yaml"
    path.write_text(RECIPE.format(world=world, run=tmp_path / "run"))
    return path


@pytest.fixture
def recipe(recipe_file: Path) -> Callable[..., Recipe]:
    """The tiny recipe with overrides: recipe("duration=4 steps")."""
    return lambda *overrides: load(Recipe, recipe_file, overrides=overrides)


def conversations(count: int, seed: int = 5) -> list[dict[str, str]]:
    """Records of made-up questions and answers."""
    draw = random.Random(seed)
    words = ["".join(draw.choices("abcdefgh", k=draw.randint(1, 6))) for _ in range(40)]
    return [
        {"instruction": " ".join(draw.choices(words, k=4)), "input": "", "output": " ".join(draw.choices(words, k=6))}
        for _ in range(count)
    ]


@pytest.fixture
def chats(world: Path, tmp_path: Path) -> Callable[..., Recipe]:
    """A recipe that fine-tunes on some records."""

    def made(records: Sequence[Mapping[str, str]], name: str, *overrides: str) -> Recipe:
        (tmp_path / f"{name}.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
        (tmp_path / "recipe.yaml").write_text(f"""\
model: {{hidden_size: 32, layers: 2, heads: 2, kv_heads: 1, intermediate_size: 64, context_length: 256, dropout: 0.1}}
tokenizer: {world}/tokenizer
cache: {tmp_path}/cache
data: {{kind: examples, template: alpaca, sequence_length: 256, tokens_per_batch: 512, sequences_per_step: 8}}
optim: {{schedule: {{peak: 3e-3, warmup: 0 steps}}}}
precision: float32
duration: 2 steps
""")
        given = (f"run={tmp_path}/{name}", f"data.train=[{tmp_path}/{name}.jsonl]", "data.workers=1", *overrides)
        return load(Recipe, tmp_path / "recipe.yaml", given)

    return made
