"""What a frozen model said of rows: found again by content, worked out once, and never believed when damaged."""

from __future__ import annotations

import gc
import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from llmtrainer.apps.cli import main
from llmtrainer.base.config import load
from llmtrainer.base.errors import UserError
from llmtrainer.core.batch import REFERENCE, Batch
from llmtrainer.data.branches import AnswerRows, collate_comparisons
from llmtrainer.data.collate import Row, end_to_end
from llmtrainer.models.decoder import Decoder
from llmtrainer.training.cache_reference import CachedReference, cache_reference
from llmtrainer.training.logp_cache import LogpCache, key_of, keys_of
from llmtrainer.training.recipe import Recipe
from llmtrainer.training.reference import LiveReference
from llmtrainer.training.run import open_trainer, train
from tests.tolerances import FLOAT32_LOSS
from tests.training.conftest import conversations
from tests.training.test_preferences import pairs, written
from tests.training.test_teacher import model

Make = Callable[..., Recipe]
CACHED = "reference.cached=true"


@pytest.fixture
def make(world: Path, tmp_path: Path) -> Make:
    """A recipe that prefers answers: make("duration=4 steps")."""
    model(world, tmp_path / "base", 9)
    model(world, tmp_path / "other", 4, std=0.1)
    written(tmp_path / "pairs.jsonl", pairs(24))
    written(tmp_path / "dev.jsonl", pairs(5, seed=2))
    (tmp_path / "dpo.yaml").write_text(f"""\
run: {tmp_path}/run
model: {{start_from: {tmp_path}/base}}
tokenizer: {world}/tokenizer
cache: {tmp_path}/cache
reference: {{start_from: {tmp_path}/other}}
data: {{kind: preferences, train: {tmp_path}/pairs.jsonl, evaluate: {{dev: {tmp_path}/dev.jsonl}}, template: chatml,
  sequence_length: 64, tokens_per_batch: 300, pairs_per_step: 8, workers: 1}}
objective: {{kind: dpo}}
optim: {{schedule: {{peak: 3e-3, warmup: 0 steps}}}}
precision: float32
duration: 4 steps
evaluate: {{every: 2 steps}}
save: {{every: never}}
seed: 5
""")
    return lambda *overrides: load(Recipe, tmp_path / "dpo.yaml", overrides=overrides)


def told(recipe: Recipe) -> list[float]:
    """Losses, gradient norms and evaluations of a run."""
    with open_trainer(recipe) as trainer:
        steps = [(info.loss, info.grad_norm) for info in trainer.steps()]
        figures = [value for name, value in sorted(trainer.figures.items()) if name.startswith("dev/")]
    return [number for step in steps for number in step] + figures


def near(numbers: list[float]) -> Any:
    return pytest.approx(numbers, abs=FLOAT32_LOSS, rel=FLOAT32_LOSS)


@contextmanager
def counted(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[int]]:
    """How many sequences a live reference was asked for, batch by batch."""
    asked: list[int] = []
    ask = LiveReference.__call__

    def count(self: LiveReference, batch: Batch) -> Batch:
        asked.append(batch.sequences)
        return ask(self, batch)

    with monkeypatch.context() as patch:
        patch.setattr(LiveReference, "__call__", count)
        yield asked


def shards(recipe: Recipe) -> list[Path]:
    return sorted((Path(recipe.cache) / "logp").glob("*/*.safetensors"))


def filled(recipe: Recipe) -> tuple[int, int, int]:
    done = cache_reference(recipe)
    return done.rows, done.computed, done.checked


# 58 rows: two of each of 24 pairs to learn and 5 to measure.


def test_a_cached_run_has_the_numbers_of_a_live_one(make: Make, tmp_path: Path) -> None:
    live = told(make(f"run={tmp_path}/live"))
    cached = told(make(f"run={tmp_path}/cached", CACHED))
    assert len(live) > 8 and cached == near(live)


def test_a_cached_run_that_goes_on_ends_with_the_bits_of_one_that_never_stopped(make: Make, tmp_path: Path) -> None:
    train(make(CACHED, f"run={tmp_path}/whole", f"cache={tmp_path}/elsewhere"))
    for duration in ("2 steps", "4 steps"):
        train(make(CACHED, f"run={tmp_path}/halves", "optim.schedule.length=4 steps", f"duration={duration}"))
    whole, halves = (
        (tmp_path / name / "checkpoints" / "step-00000004" / "model.safetensors").read_bytes()
        for name in ("whole", "halves")
    )
    assert whole == halves


def test_rows_of_an_objective_beside_need_no_reference_in_the_cache(make: Make, world: Path, tmp_path: Path) -> None:
    mixed = (
        "objective={kind: mix, main: {kind: dpo}, weight: 0.5}", "duration=2 steps", "evaluate.every=never",
        f"beside={{kind: documents, train: {world}/store, sequence_length: 32, sequences_per_step: 3}}",
    )
    live, cached = (told(make(*mixed, f"run={tmp_path}/{n}", *more)) for n, more in enumerate(((), (CACHED,))))
    assert cached == near(live)
    with pytest.raises(UserError, match="its rows are not cached"):
        train(make(*mixed, "objective.beside.kind=tests.training.nearness.Near", CACHED, f"run={tmp_path}/two"))


def test_what_a_teacher_said_is_cached_too(make: Make, tmp_path: Path) -> None:
    (tmp_path / "chats.jsonl").write_text("".join(json.dumps(record) + "\n" for record in conversations(12)))
    distill = (
        f"data={{kind: examples, train: {tmp_path}/chats.jsonl, template: alpaca, sequence_length: 256, "
        "tokens_per_batch: 300, sequences_per_step: 5, workers: 1, held_out: 0.2}",
        "objective={kind: distill, temperature: 2.0}", "reference={}", f"teacher={{start_from: {tmp_path}/other}}",
    )
    live = told(make(*distill, f"run={tmp_path}/live"))
    cached = told(make(*distill, f"run={tmp_path}/cached", "teacher.cached=true"))
    assert cached == near(live)


def test_the_reference_leaves_memory(make: Make) -> None:
    def models() -> int:
        gc.collect()
        return sum(type(one) is Decoder for one in gc.get_objects())

    def more(*settings: str) -> int:
        before = models()
        with open_trainer(make(*settings, "duration=1 steps")) as trainer:
            next(iter(trainer.steps()))
            return models() - before

    assert more("run=" + make().run + "-live") == 2
    assert more(CACHED) == 1


def test_every_row_is_read_once_over_epochs_orders_batches_and_runs(
    make: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with counted(monkeypatch) as asked:
        told(make(CACHED, "duration=7 steps"))
        assert sum(asked) == 58
        asked.clear()
        for number, other in enumerate(("seed=6", "data.tokens_per_batch=120", "data.share_prompt=false")):
            told(make(CACHED, f"run={tmp_path}/run-{number}", "duration=1 steps", other))
            # Only what is checked: the first comparison, and one row in a hundred.
            assert 2 <= sum(asked) <= 10
            asked.clear()


def test_only_new_rows_are_read_when_data_grows_is_put_in_another_order_or_is_changed(
    make: Make, tmp_path: Path
) -> None:
    assert filled(make())[:2] == (58, 58)
    grown = [*reversed(pairs(24)), *pairs(3, seed=7)]
    written(tmp_path / "pairs.jsonl", grown)
    assert filled(make())[:2] == (64, 6)
    grown[3] = {**grown[3], "chosen": "quite another answer"}
    written(tmp_path / "pairs.jsonl", grown)
    assert filled(make())[:2] == (64, 1)
    assert filled(make())[:2] == (64, 0)


def test_rows_that_are_there_twice_are_read_once(make: Make, tmp_path: Path) -> None:
    one, *others = pairs(12)
    records = [{**one, "rejected": other["rejected"]} for other in others]
    path = written(tmp_path / "same.jsonl", records)
    same = (f"data.train={path}", "data.evaluate={}")
    assert filled(make(*same))[:2] == (22, 12)
    live, cached = (told(make(*same, f"run={tmp_path}/{n}", *more)) for n, more in enumerate(((), (CACHED,))))
    assert cached == near(live)


def test_a_killed_fill_goes_on_behind_its_last_shard(make: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(LogpCache.__init__, "__defaults__", (1,))    # a shard for every row
    ask = LiveReference.__call__
    calls = []

    def dies(self: LiveReference, batch: Batch) -> Batch:
        calls.append(batch.sequences)
        if len(calls) == 3:
            raise KeyboardInterrupt
        return ask(self, batch)

    with monkeypatch.context() as patch:
        patch.setattr(LiveReference, "__call__", dies)
        with pytest.raises(KeyboardInterrupt):
            cache_reference(make())
    assert len(shards(make())) == calls[0] + calls[1]
    (left,) = {path.parent for path in shards(make())}
    (left / ".partial-1").write_text("what a killed process left")
    assert filled(make())[:2] == (58, 58 - calls[0] - calls[1])
    assert not list(left.glob(".partial*"))


@pytest.mark.parametrize("damage", ["a bit", "its end"])
def test_a_damaged_shard_is_named_removed_and_read_anew(
    make: Make, damage: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(LogpCache.__init__, "__defaults__", (1,))
    live = told(make(f"run={make().run}-live"))
    cache_reference(make())
    victim = shards(make())[7]
    content = bytearray(victim.read_bytes())
    content[-3] ^= 1
    victim.write_bytes(content if damage == "a bit" else content[:-8])
    capsys.readouterr()
    cached = told(make(CACHED))
    assert victim.name in capsys.readouterr().err
    assert cached == near(live)
    assert victim in shards(make())    # the same words in a file of the same name


def test_words_that_the_model_does_not_say_any_more_are_refused(make: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    add = LogpCache.add

    def lie(self: LogpCache, key: bytes, said: dict[str, Any]) -> None:
        add(self, key, {name: value - 0.5 for name, value in said.items()})

    with monkeypatch.context() as patch:
        patch.setattr(LogpCache, "add", lie)
        cache_reference(make())
    with pytest.raises(UserError, match="something else than the model does now") as caught:
        train(make(CACHED))
    assert "rm -r" in str(caught.value)


def test_another_model_or_precision_has_words_of_its_own(make: Make, tmp_path: Path) -> None:
    filled(make())
    assert filled(make(f"reference.start_from={tmp_path}/base"))[:2] == (58, 58)
    assert filled(make("precision=float64"))[:2] == (58, 58)
    assert len({path.parent for path in shards(make())}) == 3


def test_an_adapters_own_model_is_a_reference_that_can_be_cached(make: Make, tmp_path: Path) -> None:
    beside = (f"model={{start_from: {tmp_path}/base, adapter: {{kind: lora, rank: 4}}}}", "reference.start_from=null")
    live = told(make(*beside, f"run={tmp_path}/live"))
    cached = told(make(*beside, CACHED))
    assert cached == near(live) and cached[0] == pytest.approx(np.log(2), abs=FLOAT32_LOSS)


def test_the_command_fills_the_cache_and_says_what_it_did(
    make: Make, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    make()
    words = ["cache-reference", str(tmp_path / "dpo.yaml"), "--json", "--quiet"]
    assert main(words) == 0
    first = json.loads(capsys.readouterr().out)
    assert (first["rows"], first["computed"], first["reused"], first["checked"]) == (58, 58, 0, 0)
    assert main(words) == 0
    again = json.loads(capsys.readouterr().out)
    assert (again["rows"], again["computed"], again["reused"]) == (58, 0, 58) and again["checked"] >= 1
    assert not Path(make().run).exists()
    with counted(monkeypatch) as asked:
        told(make(CACHED, "duration=1 steps"))
    assert sum(asked) <= 10


@pytest.mark.parametrize(
    ("settings", "why"),
    [
        (["objective.kind=orpo", "reference={}"], "neither reference nor teacher"),
        (["objective={kind: distill}", "reference={}"], "none is named"),
    ],
)  # fmt: skip
def test_the_command_refuses_a_recipe_that_asks_nobody(make: Make, settings: list[str], why: str) -> None:
    with pytest.raises(UserError, match=why):
        cache_reference(make(*settings))


def test_rows_that_are_cut_anew_in_every_epoch_are_refused(make: Make, world: Path) -> None:
    text = (f"data={{train: {world}/store, sequence_length: 32, tokens_per_batch: 64}}", "data.sequences_per_step=5")
    near = "objective={kind: tests.training.nearness.Near}"
    with pytest.raises(UserError, match="not worth keeping"):
        train(make(*text, near, CACHED, "evaluate.every=never"))


def test_the_result_reads_as_text() -> None:
    done = CachedReference((Path("a"), Path("b")), 1234, 1000, 234, 3, 0)
    assert "1,234 rows: 1,000 read now, 234 known" in done.text() and "kept in a, b" in done.text()


def rows() -> list[tuple[list[int], list[float]]]:
    return [
        ([5, 6, 7, 8], [0, 0, 1, 1]), ([5, 6, 7, 9], [0, 0, 1, 1]), ([5, 6, 7, 8], [0, 0, 1, 0]),
        ([5, 6, 7, 8], [0, 0, 0, 1]), ([5, 6, 8, 8], [0, 0, 1, 1]), ([4, 6, 7, 8], [0, 0, 1, 1]),
    ]  # fmt: skip


def test_keys_tell_apart_what_a_model_would_speak_of_differently_and_nothing_else() -> None:
    keys = [key_of(np.array(tokens), np.array(weights)) for tokens, weights in rows()]
    assert len(set(keys)) == len(keys) and None not in keys
    # What follows the last target is never read on its account; nor does it matter how much a target counts.
    assert key_of(np.array([5, 6, 7, 99]), np.array([0, 0, 1, 0])) == keys[2]
    assert key_of(np.array([5, 6, 7, 8], dtype=np.uint16), np.array([1, 0, 0.5, 2])) == keys[0]
    assert key_of(np.array([5, 6, 7, 8]), np.array([0, 0, 1, 1]), np.array([1])) != keys[0]
    assert key_of(np.array([5, 6]), np.array([1, 0])) is None and key_of(np.array([5, 6]), None) is not None


@pytest.mark.parametrize("share", [True, False])
def test_a_row_has_one_key_however_it_stands_in_a_batch(share: bool) -> None:
    made = [(np.array(tokens), np.array(weights, dtype=np.float32)) for tokens, weights in rows()]
    keys = [key_of(*row) for row in made]
    alone = end_to_end([Row(tokens, np.zeros(4, dtype=np.int32), 0, weights) for tokens, weights in made])
    assert keys_of(alone) == keys
    compared = [
        AnswerRows(tuple(made[n][0] for n in pair), tuple(made[n][1] for n in pair), 2, 0, 0)
        for pair in ((0, 1), (2, 3), (4, 0))
    ]
    batch = collate_comparisons(compared, share=share, liked=False, margin=False)
    assert keys_of(batch) == [keys[n] for n in (0, 1, 2, 3, 4, 0)]


def test_what_was_said_is_read_back_to_the_bit_also_by_another_process_later(tmp_path: Path) -> None:
    cache = LogpCache(tmp_path / "said", {"what": "a test"}, shard_bytes=40)
    said = {bytes([n] * 16): {REFERENCE: np.arange(n, dtype=np.float64) / 3} for n in range(1, 9)}
    with cache.filling():
        for key, value in said.items():
            cache.add(key, value)
    for one in (cache, LogpCache(tmp_path / "said", {})):
        assert len(one) == 8
        assert all(np.array_equal(one[key][REFERENCE], value[REFERENCE]) for key, value in said.items())
        assert len(one.nothing()[REFERENCE]) == 0 and one.nothing()[REFERENCE].dtype == np.float64
    assert json.loads((tmp_path / "said" / "about.json").read_text()) == {"what": "a test"}
    assert torch.from_numpy(cache[bytes([3] * 16)][REFERENCE]).dtype == torch.float64
