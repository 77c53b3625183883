"""Preference runs: files of comparisons become steps, a killed run goes on, and what cannot be exact is refused."""

from __future__ import annotations

import json
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from pydantic import ValidationError

from llmtrainer.apps.inspect import Inspection, inspect
from llmtrainer.base.config import load
from llmtrainer.base.errors import UserError
from llmtrainer.core.batch import GROUP, HIGH, KL, LIKED, LOW, MARGIN, ROW
from llmtrainer.data.packed import Store
from llmtrainer.training.assemble import engine_of, rows_of, tokenizer_of
from llmtrainer.training.dataset import Opened
from llmtrainer.training.prepare import Preparation, prepare
from llmtrainer.training.recipe import Recipe
from llmtrainer.training.run import train
from tests.training.conftest import conversations

Make = Callable[..., Recipe]


def pairs(count: int, seed: int = 1) -> list[dict[str, Any]]:
    draw = random.Random(seed)

    def word(most: int) -> str:
        return "".join(draw.choices("abcdefgh ", k=draw.randint(2, most)))

    return [{"prompt": "q" + word(20), "chosen": "x" + word(9), "rejected": "y" + word(9)} for _ in range(count)]


def written(path: Path, records: list[Any]) -> Path:
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    return path


@pytest.fixture
def make(world: Path, tmp_path: Path) -> Make:
    written(tmp_path / "pairs.jsonl", pairs(40))
    written(tmp_path / "dev.jsonl", pairs(9, seed=2))
    path = tmp_path / "pairs.yaml"
    path.write_text(f"""\
run: {tmp_path}/run
model: {{hidden_size: 32, layers: 2, heads: 2, kv_heads: 1, intermediate_size: 64, context_length: 256}}
tokenizer: {world}/tokenizer
cache: {tmp_path}/cache
data:
  kind: preferences
  train: {tmp_path}/pairs.jsonl
  evaluate: {{dev: {tmp_path}/dev.jsonl}}
  template: chatml
  sequence_length: 64
  tokens_per_batch: 200
  pairs_per_step: 6
  workers: 1
objective: {{kind: orpo}}
optim: {{schedule: {{peak: 3e-3, warmup: 0 steps}}}}
precision: float32
duration: 6 steps
evaluate: {{every: 3 steps}}
save: {{every: 2 steps}}
seed: 5
""")
    return lambda *overrides: load(Recipe, path, overrides=overrides)


def opened(recipe: Recipe) -> Opened:
    engine, _ = engine_of(recipe)
    folder, tokenizer = tokenizer_of(recipe)
    return rows_of(recipe, folder, tokenizer, engine)


@pytest.mark.parametrize("kind", ["dpo", "simpo", "cpo", "orpo"])
def test_what_compares_two_answers_refuses_records_of_one(make: Make, tmp_path: Path, kind: str) -> None:
    labels = [{"prompt": f"q{n}", "completion": f"x{n}", "label": n % 2 == 0} for n in range(30)]
    path = written(tmp_path / "labels.jsonl", labels)
    wrong = {"data.train": f"data.train={path}", "data.evaluate.dev": f"data.evaluate={{dev: {path}}}"}
    for where, override in wrong.items():
        with pytest.raises(UserError, match=f"`{kind}` compares two answers to a prompt, and no record") as caught:
            free = ", reference_free: true" if kind == "dpo" else ""
            train(make(f"objective={{kind: {kind}{free}}}", override, f"run={tmp_path}/{kind}-{where}"))
        assert caught.value.where == where and "objective.kind=kto" in str(caught.value.fix)


def test_records_that_lack_what_an_objective_reads_are_told_what_to_say(make: Make, tmp_path: Path) -> None:
    lacking = {
        "kto": ("liked_S", "label"), "ordinal": ("low_S", "grade"), "reward, margin: true": ("margin_S", "margin"),
    }
    for kind, (signal, said) in lacking.items():
        more = {
            "ordinal": "model.head={kind: ordinal, classes: 3}", "reward, margin: true": "model.head={kind: score}",
            "kto": f"model={{start_from: {tmp_path}/begun}}",
        }  # fmt: skip
        if kind == "kto":
            train(make("duration=1 steps", f"run={tmp_path}/begun"))
        with pytest.raises(UserError, match=signal) as caught:
            train(make(f"objective={{kind: {kind}}}", more[kind]))
        assert said in str(caught.value.fix) and "data.kind" not in str(caught.value.fix)


def test_an_id_beyond_the_vocabulary_is_refused_with_its_line(make: Make, tmp_path: Path) -> None:
    records = [
        {"prompt": [5, 6], "chosen": [7], "rejected": [8]}, {"prompt": [5], "chosen": [9, 99_999], "rejected": [7]},
    ]  # fmt: skip
    path = written(tmp_path / "ids.jsonl", records)
    with pytest.raises(UserError, match="the id 99,999") as caught:
        train(make(f"data.train={path}"))
    assert "ids.jsonl" in str(caught.value.where) and "2" in str(caught.value.where)


def test_ties_among_ranked_answers_are_not_taken_for_answers_that_were_cut(make: Make, tmp_path: Path) -> None:
    records = [{"prompt": one["prompt"], "answers": ["a", one["chosen"], one["rejected"]], "scores": [1, 2, 2]}
               for one in pairs(20)]
    path = written(tmp_path / "ties.jsonl", records)
    train(make(f"data.train={path}", "data.evaluate={}", "duration=1 steps"))


def test_a_run_learns_to_tell_answers_apart_and_says_what_it_found(
    make: Make, capsys: pytest.CaptureFixture[str]
) -> None:
    asked = ("evaluate.every=never", "save.every=never", "optim.schedule.peak=1e-2", "objective.kind=simpo")
    done = train(make("duration=30 steps", *asked))
    assert done.figures["dev/preference/accuracy"] == 1.0
    told = capsys.readouterr().err
    assert "format texts (known by `prompt`, `chosen`, `rejected`)" in told and "-- answer 1, the best" in told
    assert "40  records in all, which became 80 rows" in told


def test_a_step_does_not_depend_on_shared_prompts_nor_on_micro_batches(make: Make, tmp_path: Path) -> None:
    losses = []
    for name, *overrides in (
        ("shared",), ("apart", "data.share_prompt=false"), ("small", "data.tokens_per_batch=80"),
    ):  # fmt: skip
        done = train(make(f"run={tmp_path}/{name}", "precision=float64", "data.evaluate={}", *overrides))
        losses.append(done.loss)
    assert losses == pytest.approx([losses[0]] * 3, rel=1e-9)


def test_a_run_that_goes_on_ends_with_the_bits_of_one_that_was_never_stopped(make: Make, tmp_path: Path) -> None:
    whole = train(make(f"run={tmp_path}/whole"))
    train(make(f"run={tmp_path}/halves", "duration=4 steps", "optim.schedule.length=6 steps"))
    halves = train(make(f"run={tmp_path}/halves", "optim.schedule.length=6 steps"))
    assert halves.step == whole.step == 6 and halves.loss == whole.loss
    weights = [
        (tmp_path / name / "checkpoints" / "step-00000006" / "model.safetensors").read_bytes()
        for name in ("whole", "halves")
    ]
    assert weights[0] == weights[1]


def test_a_run_does_not_go_on_with_other_comparisons(make: Make, tmp_path: Path) -> None:
    train(make("duration=2 steps"))
    written(tmp_path / "pairs.jsonl", pairs(40, seed=8))
    with pytest.raises(UserError, match="the data changed"):
        train(make())


def test_preferences_from_a_trained_model_have_a_reference_and_begin_at_log_2(
    make: Make, chats: Callable[..., Recipe], tmp_path: Path
) -> None:
    train(chats(conversations(16), "sft", "model.dropout=0"))
    done = train(
        make(f"model={{start_from: {tmp_path}/sft}}", "objective.kind=dpo", "duration=1 steps", "data.evaluate={}")
    )
    assert done.loss == pytest.approx(0.693147, abs=1e-5)


def test_labels_without_pairs_are_learned_by_kto(make: Make, chats: Callable[..., Recipe], tmp_path: Path) -> None:
    train(chats(conversations(16), "sft", "model.dropout=0"))
    records = [
        {"prompt": pair["prompt"], "completion": pair[side], "label": side == "chosen"}
        for pair in pairs(10) for side in ("chosen", "rejected")
    ]  # fmt: skip
    done = train(
        make(
            f"model={{start_from: {tmp_path}/sft}}", "objective.kind=kto", "duration=1 steps", "data.evaluate={}",
            f"data.train={written(tmp_path / 'l.jsonl', records)}", "data.tokens_per_batch=4096",
        )
    )
    assert done.loss == pytest.approx(0.5, abs=1e-5), "the policy is its reference: half of sigmoid(0) on either side"


def test_labels_and_margins_are_signals_and_files_of_two_sorts_are_refused(make: Make, tmp_path: Path) -> None:
    assert opened(make()).signals == (GROUP, ROW)
    margins = [{**record, "margin": 2.5} for record in pairs(5)]
    rows = opened(make(f"data.train={written(tmp_path / 'm.jsonl', margins)}"))
    assert rows.signals == (GROUP, ROW, MARGIN) and rows.train is not None
    assert set(rows.train.batches(0)[0].signals[MARGIN].tolist()) == {2.5}
    rows.train.close()
    liked = [{"prompt": "a", "completion": "b" * number, "label": number % 2 == 0} for number in range(1, 6)]
    path = written(tmp_path / "l.jsonl", liked)
    rows = opened(make(f"data.train={path}"))
    assert rows.signals == (GROUP, ROW, LIKED, KL) and rows.train is not None
    (batch,) = rows.train.batches(0)
    assert batch.sequences == 6 and set(batch.signals[LIKED].tolist()) == {0.0, 1.0}
    rows.train.close()
    with pytest.raises(UserError, match="some say whether one was liked"):
        opened(make(f"data.train={path},{tmp_path}/pairs.jsonl"))


@pytest.mark.parametrize(
    ("settings", "why"),
    [
        (["model.dropout=0.1"], "dropout"), (["model.neftune=5"], "neftune"),
        (
            ["model.rope_scaling={kind: dynamic, factor: 16, original_context: 16}"], "rope_scaling",
        ),
    ],
)  # fmt: skip
def test_what_would_not_be_exact_is_refused_by_name_and_runs_apart(
    make: Make, tmp_path: Path, settings: list[str], why: str
) -> None:
    with pytest.raises(UserError, match="cannot share the prompt") as error:
        train(make("duration=1 steps", *settings))
    assert why in str(error.value) and error.value.fix == "data.share_prompt=false"
    train(make("duration=1 steps", *settings, "data.share_prompt=false", "data.evaluate={}"))


@pytest.mark.parametrize(
    "setting",
    [
        "data.tokens_per_step=100", "data.sequences_per_step=4", "data.max_prompt_length=64",
        "data={kind: preferences, train: a, too_long: drop, max_prompt_length: 8}",
    ],
)  # fmt: skip
def test_settings_that_would_mean_nothing_are_refused(make: Make, setting: str) -> None:
    with pytest.raises((UserError, ValidationError)):
        make(setting)


def test_the_preflight_looks_at_comparisons(make: Make, tmp_path: Path) -> None:
    train(make("duration=1 steps"))
    found = json.loads((tmp_path / "run" / "preflight.json").read_text())
    names = {guard["name"]: guard["ok"] for guard in found["guards"]}
    assert names["equal_answers"] and names["empty_answers"] and names["memory"] and names["duplicates"]
    blank = [{**record, "chosen": ""} for record in pairs(20)]
    with pytest.raises(UserError, match="empty_answers"):
        train(make(f"data.train={written(tmp_path / 'e.jsonl', blank)}", f"run={tmp_path}/empty"))


def test_an_answer_that_is_compared_with_several_others_is_no_duplicate(make: Make, tmp_path: Path) -> None:
    one, *others = pairs(12)
    records = [{**one, "rejected": other["rejected"]} for other in others]
    train(make("duration=1 steps", f"data.train={written(tmp_path / 'd.jsonl', records)}"))
    with pytest.raises(UserError, match="duplicates"):
        train(make(f"data.train={written(tmp_path / 'd.jsonl', [one] * 5)}", f"run={tmp_path}/same"))


def test_a_store_of_the_other_sort_is_refused_by_the_kind_that_reads_it(make: Make, tmp_path: Path) -> None:
    rows = opened(make())
    assert rows.train is not None
    folder = rows.train.store.path
    rows.train.close()
    assert Store(folder).comparisons == 40
    again = opened(make(f"data.train={folder}"))
    assert again.train is not None and again.train.fingerprint == rows.train.fingerprint
    again.train.close()
    with pytest.raises(UserError, match=r"data.kind=preferences"):
        opened(make(f"data={{kind: examples, train: {folder}, template: chatml}}"))


def test_prepare_makes_the_store_that_a_run_makes_and_refuses_what_means_nothing(
    make: Make, world: Path, tmp_path: Path
) -> None:
    def asked(**settings: Any) -> Preparation:
        return Preparation(**{
            "data": str(tmp_path / "pairs.jsonl"), "out": str(tmp_path / "store"), "format": "comparisons",
            "tokenizer": str(world / "tokenizer"), "template": "chatml", "max_length": 64, "workers": 1, **settings,
        })  # fmt: skip

    done = prepare(asked())
    assert done.json()["documents"] == 80 and done.json()["formats"] == ["texts"]
    one, other = opened(make()), opened(make(f"data.train={tmp_path}/store"))
    assert one.train is not None and other.train is not None
    assert one.train.fingerprint == other.train.fingerprint
    one.train.close()
    other.train.close()
    for wrong in ({"learn": "everything"}, {"too_long": "split"}, {"format": "auto", "prompt_cut": "keep_start"}):
        with pytest.raises(UserError):
            prepare(asked(**wrong, out=str(tmp_path / "other")))


def test_inspect_shows_the_prompt_once_and_every_answer_behind_it(make: Make, tmp_path: Path) -> None:
    shown = inspect(Inspection(source=str(tmp_path / "pairs.yaml"), rows=1)).json()["rows"][0]
    assert set(shown["answer"]) == {-1, 0, 1}
    text = [
        "".join(piece for piece, answer in zip(shown["pieces"], shown["answer"], strict=True) if answer == number)
        for number in (-1, 0, 1)
    ]
    assert text[0].startswith("q") and "x" in text[1] and "y" in text[2]
    assert max(shown["weights"]) == 1.0 and torch.tensor(shown["positions"]).min() == 0


def test_inspect_shows_a_bare_file_of_comparisons_an_answer_a_row(make: Make, world: Path, tmp_path: Path) -> None:
    shown = inspect(
        Inspection(
            source=str(tmp_path / "pairs.jsonl"), tokenizer=str(world / "tokenizer"), template="chatml", rows=2
        )
    ).json()["rows"]
    first = pairs(1)[0]
    for row, answer in zip(shown, (first["chosen"], first["rejected"]), strict=True):
        learned = "".join(piece for piece, weight in zip(row["pieces"], row["weights"], strict=True) if weight)
        assert "".join(row["pieces"]).startswith(first["prompt"]) and learned.startswith(answer)


def test_grades_from_a_file_are_learned_as_classes(make: Make, tmp_path: Path) -> None:
    records: list[dict[str, Any]] = [
        {"prompt": f"film {number}: ", "completion": "abc"[number % 3] * 4, "stars": number % 3 + 1}
        for number in range(30)
    ]
    records[7]["stars"] = [1, 2]    # somebody was not sure
    path = written(tmp_path / "grades.jsonl", records)
    asked = (
        "model.head={kind: ordinal, classes: 3}", f"data.train={path}", f"data.evaluate={{dev: {path}}}",
        "data.format={kind: graded, lowest: 1}", "objective.kind=ordinal", "evaluate.every=never",
        "save.every=never", "optim.schedule.peak=1e-2", "data.pairs_per_step=15",
        "optim.groups=[{match: 'score.*', rate: 5}]",
    )  # fmt: skip
    rows = opened(make(*asked))
    assert rows.signals == (GROUP, ROW, LOW, HIGH) and rows.train is not None
    low_S, high_S = (torch.cat([batch.signals[name] for batch in rows.train.batches(0)]) for name in (LOW, HIGH))
    assert bool((low_S < high_S).all()) and int(high_S.max()) == 3
    rows.train.close()
    done = train(make(*asked, "duration=30 steps"))
    assert done.figures["dev/ordinal/accuracy"] > 0.8, done.figures
    with pytest.raises(UserError, match="a text is graded with the classes"):
        train(make(*asked, f"run={tmp_path}/few", "model.head={kind: ordinal, classes: 2}"))


def test_pairs_of_segments_from_a_file_are_learned_each_within_itself(make: Make, tmp_path: Path) -> None:
    made = pairs(40)
    records = [
        {
            "prompt": one["prompt"],
            "segments": [{key: item[key] for key in ("chosen", "rejected")} for item in (one, two)],
        }
        for one, two in zip(made[::2], made[1::2], strict=True)
    ]
    path = written(tmp_path / "segments.jsonl", records)
    asked = (
        f"data.train={path}", f"data.evaluate={{dev: {path}}}", "objective={kind: segments, reference: false}",
        "evaluate.every=never", "save.every=never", "optim.schedule.peak=1e-2", "duration=30 steps",
    )  # fmt: skip
    done = train(make(*asked))
    assert done.figures["dev/preference/accuracy"] > 0.95, done.figures


def test_grades_and_comparisons_are_not_learned_together(make: Make, tmp_path: Path) -> None:
    path = written(tmp_path / "g.jsonl", [{"prompt": "a", "completion": "b", "grade": 1}])
    with pytest.raises(UserError, match="some say how good one is"):
        opened(make(f"data.train={path},{tmp_path}/pairs.jsonl"))
