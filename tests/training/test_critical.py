"""Critical tokens: how much each token of a row counts, against hand arithmetic."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from llmtrainer.base.config import load
from llmtrainer.base.errors import UserError
from llmtrainer.base.events import steps
from llmtrainer.data.budget_source import BudgetSource
from llmtrainer.data.critical import Critical, critical_of
from llmtrainer.data.source import DiskSource
from llmtrainer.tokenizer.tokenizer import FileTokenizer, load_tokenizer
from llmtrainer.training.recipe import Recipe
from llmtrainer.training.run import open_trainer, train
from tests.data.worlds import make_store
from tests.tolerances import FLOAT32_LOSS

DOCUMENTS = [[9, 5, 3, 5], [5, 5, 7]]
CRITICAL = Critical({5: 2.5, 3: 0.0})


def test_a_critical_token_counts_alpha_wherever_something_announces_it(tmp_path: Path) -> None:
    store = make_store(tmp_path / "text", DOCUMENTS, vocabulary=10)
    settings = {"sequence_length": 6, "tokens_per_batch": 6, "seed": 0, "shuffle": False, "prefetch": False}
    rows = DiskSource(store, rows_per_step=1, critical=CRITICAL, **settings)
    # The first token of each document counts nothing: nothing of its own document stands before it.
    assert rows.row(0, 0)["weights"] == [0.0, 2.5, 0.0, 2.5, 0.0, 2.5, 1.0]
    assert rows.fingerprint != DiskSource(store, rows_per_step=1, **settings).fingerprint


def test_alpha_multiplies_the_weight_that_a_token_has(tmp_path: Path) -> None:
    weights = [[0.0, 0.0, 1.0, 2.0], [0.0, 1.0, 1.0]]
    store = make_store(tmp_path / "chats", DOCUMENTS, vocabulary=10, weights=weights)
    rows = BudgetSource(
        store, sequence_length=6, sequences_per_step=2, tokens_per_batch=6, seed=0, shuffle=False, prefetch=False,
        critical=CRITICAL,
    )
    assert [rows.row(0, place)["weights"] for place in (0, 1)] == [[0.0, 0.0, 0.0, 5.0], [0.0, 2.5, 1.0]]


def test_a_token_is_named_by_control_token_text_or_id(world: Path) -> None:
    tokenizer = load_tokenizer(world / "tokenizer")
    (name, number), (letter,) = next(iter(tokenizer.control.items())), tokenizer.encode("a")
    found = critical_of({name: 2.0, "a": 3.0, "#0": 4.0}, tokenizer)
    assert found is not None and found.facts == sorted([(number, 2.0), (letter, 3.0), (0, 4.0)])
    assert critical_of({}, tokenizer) is None


@pytest.mark.parametrize(
    ("named", "what"),
    [({"a!?b": 2.0}, "tokens and not one"), ({"#999999": 2.0}, "no token 999,999"), ({"": 2.0}, "0 tokens"),
     ({"a": 2.0, "#A": 3.0}, "named twice")],
)
def test_what_is_not_one_token_is_refused(world: Path, named: dict[str, float], what: str) -> None:
    tokenizer: FileTokenizer = load_tokenizer(world / "tokenizer")
    named = {name.replace("#A", f"#{tokenizer.encode('a')[0]}"): alpha for name, alpha in named.items()}
    with pytest.raises(UserError, match=what) as caught:
        critical_of(named, tokenizer)
    assert caught.value.where == "data.critical"


def test_a_run_learns_by_the_weighted_mean_and_measures_without_it(
    recipe: Callable[..., Recipe], world: Path, tmp_path: Path
) -> None:
    tokenizer = load_tokenizer(world / "tokenizer")
    (letter,) = tokenizer.encode("a")
    words = ("duration=1 steps", "model.dropout=0")
    with open_trainer(recipe(*words)) as trainer:
        parts = trainer.parts
        total, weight = 0.0, 0.0
        for batch in parts.source.batches(0):
            out = parts.policy.eval()(batch, ("logp",))
            alpha_BT = torch.where(batch.targets_BT == letter, 3.0, 1.0) * batch.weights_BT
            total -= float((alpha_BT * out.logp_BT).sum().detach())
            weight += float(alpha_BT.sum())
    named = "data.critical={a: 3.0}"
    plain, critical, one = tmp_path / "plain", tmp_path / "critical", tmp_path / "one"
    for folder, more in ((plain, ()), (critical, (named,)), (one, ("data.critical={a: 1.0}",))):
        train(recipe(*words, *more, f"run={folder}"))
    losses = {folder: steps(folder / "events.jsonl")[0]["loss"] for folder in (plain, critical, one)}
    assert losses[critical] == pytest.approx(total / weight, rel=FLOAT32_LOSS)
    assert losses[one] == losses[plain] and not math.isclose(losses[critical], losses[plain], rel_tol=1e-4)
    before = [
        json.loads(line)["held_out/loss"] for folder in (plain, one)
        for line in (folder / "events.jsonl").read_text().splitlines() if '"evaluate"' in line
    ]
    assert before and len(set(before)) == 1
    assert load(Recipe, critical / "recipe.yaml").data.plain()["critical"] == {"a": 3.0}
