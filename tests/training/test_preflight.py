"""Preflight: for each guard data that trips it, by that guard alone, and rows that trip none."""

from __future__ import annotations

import json
import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch

from llmtrainer.base.errors import UserError
from llmtrainer.base.rundir import RunDir
from llmtrainer.base.units import Duration
from llmtrainer.core.objective import Objective
from llmtrainer.core.protocols import Engine, Rule
from llmtrainer.data.packed import FATES, Store
from llmtrainer.models.decoder import Decoder
from llmtrainer.optim.groups import group
from llmtrainer.parallel.engines.single import Single
from llmtrainer.training.preflight import ALL, FILE, longest_batch, preflight
from llmtrainer.training.recipe import Recipe
from llmtrainer.training.run import train
from tests.data.worlds import END, ByteTokenizer, make_store
from tests.training.conftest import conversations
from tests.worlds import tiny_model

OBJECTIVE = Objective.model_validate({"kind": "causal_lm"})
Rows = tuple[list[list[int]], list[list[float]]]


def answers(count: int = 40, seed: int = 0) -> Rows:
    """Prompts that are read and answers that are learned with their end."""
    draw = random.Random(seed)
    rows = [[draw.randrange(97, 123) for _ in range(draw.randrange(6, 30))] + [END] for _ in range(count)]
    return rows, [[0.0] * 3 + [1.0] * (len(row) - 3) for row in rows]


def no_targets(rows: Rows) -> Rows:
    rows[1][7] = [0.0] * len(rows[0][7])
    return rows


def only_the_first_token(rows: Rows) -> Rows:
    rows[1][7] = [1.0] + [0.0] * (len(rows[0][7]) - 1)    # a target that nothing announces is none
    return rows


def ends_not_learned(rows: Rows) -> Rows:
    for weights in rows[1][:30]:
        weights[-1] = 0.0
    return rows


def padded(rows: Rows) -> Rows:
    longest = max(map(len, rows[0]))
    return (
        [row + [END] * (longest - len(row)) for row in rows[0]],
        [weights + [0.0] * (longest - len(weights)) for weights in rows[1]],
    )


def the_same(rows: Rows) -> Rows:
    rows[0][5:15], rows[1][5:15] = [list(rows[0][0])] * 10, [list(rows[1][0])] * 10
    return rows


def too_long(rows: Rows) -> Rows:
    rows[0][6], rows[1][6] = [97] * 33 + [END], [0.0] * 3 + [1.0] * 31
    return rows


def foreign(rows: Rows) -> Rows:
    rows[0][3][4] = 300
    return rows


TRIPS: dict[str, tuple[str, Callable[[Rows], Rows], str]] = {
    "no target": ("zero_targets", no_targets, "1 of 40 rows have nothing to learn, the first of them by hand, docu"),
    "a first token": ("zero_targets", only_the_first_token, "1 of 40 rows have nothing to learn"),
    "no end": ("end_token", ends_not_learned, "learned in 25.0% of the rows"),
    "padding": ("padding", padded, "read as text; the tokenizer pads with its end token"),
    "twice": ("duplicates", the_same, "25.0% of the rows are the same as an earlier one, such as row 6, the same as"),
    "beyond the context": ("context", too_long, "the longest row reads 33 tokens, the model's context is 32; data.seq"),
    "an id too many": ("vocabulary", foreign, "the largest id is 300; the tokenizer has 257 ids"),
}


@dataclass
class Flight:
    run: RunDir
    policy: Decoder
    engine: Engine
    warned: list[str]

    def over(self, store: Store, *allow: str, **settings: Any) -> dict[str, Any]:
        """What preflight.json says afterwards."""
        preflight(
            self.run, store, ByteTokenizer(), self.policy.vocabulary, OBJECTIVE, self.engine,
            **{
                "ends": [END], "context": 32, "tokens_per_batch": 64, "allow": allow, "warn": self.warned.append,
                **settings,
            },
        )  # fmt: skip
        found: dict[str, Any] = json.loads((self.run.path / FILE).read_text())
        return found


@pytest.fixture
def flight(tmp_path: Path) -> Flight:
    policy = tiny_model(torch.float32)
    engine = Single(device="cpu").start("float32")
    engine.prepare(policy, Rule.model_validate({"kind": "adamw"}), group(policy.named_parameters(), ()))
    (tmp_path / "run").mkdir()
    return Flight(RunDir(tmp_path / "run"), policy, engine, [])


def store_of(folder: Path, rows: Rows) -> Store:
    return make_store(folder / "store", rows[0], weights=rows[1], shard_tokens=10**6)


def write_fates(store: Store, fates: Sequence[tuple[str, int]]) -> None:
    lines, first = [], 1
    for fate, number in fates:
        run = {"source": 0, "first": first, "last": first + number - 1, "fate": fate, "rows": number}
        lines.append(json.dumps({**run, "place": None, "why": None}))
        first += number
    (store.path / FATES).write_text("\n".join(lines) + "\n")


def test_rows_with_learned_answers_trip_nothing_and_are_written_down(flight: Flight, tmp_path: Path) -> None:
    rows = answers()
    store = store_of(tmp_path, rows)
    write_fates(store, [("kept", 36), ("cut", 2), ("too long", 2)])
    told = flight.over(store)
    assert [guard["name"] for guard in told["guards"]] == [
        "zero_targets", "end_token", "truncation", "context", "padding", "duplicates", "vocabulary", "memory",
    ]  # fmt: skip
    assert all(guard["ok"] and not guard["allowed"] for guard in told["guards"]) and not flight.warned
    assert told["figures"]["rows"] == 40 and told["figures"]["tokens"] == sum(map(len, rows[0]))
    assert told["figures"]["targets"] == sum(map(sum, rows[1])) and told["figures"]["ended"] == 40
    assert len(told["rows"]) == 10
    for shown in told["rows"]:
        text = "".join(map(chr, rows[0][shown["row"] - 1][:-1]))
        assert shown["pieces"] == [{"read": text[:3]}, {"learned": text[3:] + "<|endoftext|>"}]


@pytest.mark.parametrize("case", TRIPS)
def test_each_guard_has_data_that_trips_it_alone_and_a_name_that_allows_it(
    flight: Flight, tmp_path: Path, case: str
) -> None:
    name, spoil, detail = TRIPS[case]
    store = store_of(tmp_path, spoil(answers()))
    with pytest.raises(UserError, match=name) as error:
        flight.over(store)
    assert detail in str(error.value.why) and f"allow=[{name}]" in str(error.value.fix)
    told = json.loads((flight.run.path / FILE).read_text())
    assert [guard["name"] for guard in told["guards"] if not guard["ok"]] == [name]
    if name != "vocabulary":    # an id without an embedding can be allowed, not computed
        told = flight.over(store, name)
        assert [guard["name"] for guard in told["guards"] if guard["allowed"]] == [name]
        assert detail in flight.warned[0]


def test_answers_that_were_cut_are_counted_by_the_fates_of_their_records(flight: Flight, tmp_path: Path) -> None:
    store = store_of(tmp_path, answers())
    write_fates(store, [("kept", 30), ("cut", 8), ("too long", 1), ("targets cut away", 1)])
    with pytest.raises(UserError, match="truncation") as error:
        flight.over(store)
    assert "25.0% of 40 records did not fit (1 too long, 8 cut, 1 targets cut away), 20% may" in str(error.value.why)
    with pytest.raises(UserError, match="truncation"):
        flight.over(store, max_dropped_share=0.24)
    assert flight.over(store, max_dropped_share=0.25)["guards"][2] == {
        "name": "truncation", "ok": True, "allowed": False,
        "detail": "25.0% of 40 records did not fit (1 too long, 8 cut, 1 targets cut away), 25% may: answers that "
        "break off teach to break off",
    }
    assert flight.over(store, "truncation")["guards"][2]["allowed"]
    write_fates(store, [("kept", 40)])
    assert flight.over(store)["guards"][2]["ok"]


def test_the_longest_rows_are_computed_first_and_what_does_not_fit_is_said_before_the_first_step(
    flight: Flight, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    rows = answers()
    store = store_of(tmp_path, rows)
    lengths = sorted((len(row) - 1 for row in rows[0]), reverse=True)
    batch = longest_batch(store, 64)
    assert int(batch.position_BT.max()) + 1 == lengths[0]
    assert batch.input_tokens == sum(lengths[: batch.sequences]) <= 64 < sum(lengths[: batch.sequences + 1])
    assert longest_batch(store, 5).input_tokens == lengths[0], "the longest alone, whatever the budget"
    before = {name: p.detach().clone() for name, p in flight.policy.named_parameters()}
    flight.over(store)
    for name, p in flight.policy.named_parameters():
        assert torch.equal(p, before[name]) and p.grad is None, "nothing is learned from it"

    def full(*_: object) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 9 GiB")

    monkeypatch.setattr(flight.engine, "forward", full)
    with pytest.raises(UserError, match="memory") as error:
        flight.over(store)
    assert "does not fit the memory: CUDA out of memory" in str(error.value.why)
    assert flight.over(store, "memory")["guards"][-1]["detail"] == "the longest rows were not tried"


def test_several_guards_are_told_together(flight: Flight, tmp_path: Path) -> None:
    store = store_of(tmp_path, the_same(ends_not_learned(answers())))
    with pytest.raises(UserError, match="guards: end_token, duplicates") as error:
        flight.over(store)
    assert "allow=[end_token, duplicates]" in str(error.value.fix)
    with pytest.raises(UserError, match="a guard: duplicates"):
        flight.over(store, "end_token")


def test_nothing_is_looked_at_where_that_was_asked_for(flight: Flight, tmp_path: Path) -> None:
    store = store_of(tmp_path, no_targets(answers()))
    with pytest.raises(FileNotFoundError):
        flight.over(store, ALL)


def test_every_rank_stops_when_one_does(flight: Flight, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    store = store_of(tmp_path, answers())
    monkeypatch.setattr(flight.engine, "rank", 1)
    monkeypatch.setattr(flight.engine, "sum", lambda numbers: {name: value + 1 for name, value in numbers.items()})
    with pytest.raises(UserError, match="another rank"):
        flight.over(store)


def test_a_fine_tuning_run_begins_with_it_and_learns_what_it_would_without(chats: Callable[..., Recipe]) -> None:
    looked, unlooked = (
        chats(conversations(30), name, *allow) for name, allow in (("looked", ()), ("not", ("allow=preflight",)))
    )
    weights = []
    for recipe in (looked, unlooked):
        assert train(recipe).step == 2
        weights.append((Path(recipe.run) / "checkpoints/step-00000002/model.safetensors").read_bytes())
    assert weights[0] == weights[1]
    told = json.loads((Path(looked.run) / FILE).read_text())
    assert all(guard["ok"] for guard in told["guards"]) and told["figures"]["rows"] == 30
    assert not (Path(unlooked.run) / FILE).exists()
    (Path(looked.run) / FILE).unlink()
    assert train(looked.model_copy(update={"duration": Duration.parse("3 steps")})).step == 3
    assert not (Path(looked.run) / FILE).exists(), "a run that continues was looked at when it began"


def test_a_run_that_a_guard_stops_goes_on_when_the_guard_is_allowed_by_name(
    chats: Callable[..., Recipe], capsys: pytest.CaptureFixture[str]
) -> None:
    records = conversations(20) + conversations(20)
    with pytest.raises(UserError, match="a guard: duplicates") as error:
        train(chats(records, "twice"))
    assert "50.0% of the rows are the same" in str(error.value.why)
    recipe = chats(records, "twice", "allow=[duplicates]")
    assert train(recipe).step == 2
    events = [json.loads(line) for line in (Path(recipe.run) / "events.jsonl").read_text().splitlines()]
    assert any("allowed `duplicates`" in event.get("text", "") for event in events if event["kind"] == "warning")
    capsys.readouterr()
