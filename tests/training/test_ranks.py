"""Runs of two processes: for every objective and kind of data they learn, write, measure and say what one does."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tests.processes import Processes, processes  # noqa: F401  a fixture
from tests.tolerances import FLOAT64_RUN
from tests.training.conftest import conversations
from tests.training.runs_of_ranks import cached, evaluated, poisoned, ran
from tests.training.test_preferences import pairs, written
from tests.training.test_teacher import model

HERE = "tests.training.test_ranks"
TWO = ("engine.kind=ddp", "engine.find_unused_parameters=true")
Files = Callable[[str], Path]


def worth(answer: Any) -> float | None:
    """The more characters the better; of some answers, nothing is known."""
    return None if answer.tokens[0] % 7 == 0 else len(answer.text) / 10


def guesses(text: str) -> tuple[bool, str, float]:
    """A conversation that ends early at times."""
    return len(text) % 3 == 0, "go on", float(len(text) % 5)


COMMON = """\
run: {folder}/one
model: {{start_from: {folder}/base}}
tokenizer: {folder}/base
cache: {folder}/cache
optim: {{schedule: {{kind: constant, peak: 1e-2, warmup: 0 steps}}, rule: {{kind: adamw}}, clip: 0.5}}
precision: float64
engine: {{device: cpu}}
duration: 3 steps
seed: 5
"""
EVALUATE = "evaluate: {{every: 2 steps, suites: [{{path: {folder}/texts, max_length: 16, tokens_per_batch: 64}}]}}\n"
PROMPTS = """\
data: {{kind: prompts, train: {folder}/prompts.jsonl, template: completion, prompts_per_step: 3, tokens_per_batch: 60,
  held_out: 0.3}}
evaluate: {{every: 2 steps}}
"""
ROLLOUT = """\
rollout:
  group_size: {group}
  epochs: 2
  sampling: {{{{max_new_tokens: 6, temperature: 0.9, top_p: 0.9}}}}
  rewards: [{{{{kind: function, function: "{here}:worth"}}}}]
"""
PAIRS = """\
data: {{kind: preferences, train: {folder}/pairs.jsonl, evaluate: {{dev: {folder}/dev.jsonl}}, template: chatml,
  sequence_length: 64, tokens_per_batch: 120, pairs_per_step: 5, workers: 1}}
evaluate: {{every: 2 steps}}
"""
LIKED = PAIRS.replace("pairs.jsonl", "liked.jsonl").replace("dev.jsonl", "liked.jsonl") + """\
reference: {{start_from: {folder}/other}}
"""
EXAMPLES = """\
data: {{kind: examples, train: {folder}/chats.jsonl, template: alpaca, sequence_length: 256, tokens_per_batch: 512,
  sequences_per_step: 5, workers: 1, held_out: 0.2}}
"""
TAUGHT = "objective: {{kind: distill{more}}}\nteacher: {{start_from: {folder}/other, top_k: 20}}\n"
RECIPES = {
    "pretrain": EVALUATE + "data: {{train: {folder}/texts, sequence_length: 24, tokens_per_batch: 48, "
                "sequences_per_step: 5, held_out: 0.2}}\n",
    "sft": EVALUATE + EXAMPLES,
    "dpo": PAIRS + "objective: {{kind: dpo}}\nreference: {{start_from: {folder}/other, cached: true}}\n",
    "kto_pair": PAIRS + "objective: {{kind: dpo, loss: kto_pair}}\nreference: {{start_from: {folder}/other}}\n",
    "kto": LIKED + "objective: {{kind: kto}}\n",
    "kto_own": LIKED + "objective: {{kind: kto, point: own}}\n",
    "reward": PAIRS + "objective: {{kind: reward}}\n",
    "distill": EXAMPLES + TAUGHT.replace("{more}", "").replace("top_k: 20", "top_k: 20, cached: true"),
    "own_answers": PROMPTS + TAUGHT.replace("{more}", ", coefficient: 1.0, divergence: reverse_kl")
                   + "rollout: {{group_size: 1, sampling: {{max_new_tokens: 6}}}}\n",
    "grpo": PROMPTS + ROLLOUT.format(group=4, here=HERE).replace("epochs: 2", "epochs: 2\n  redraw: 1")
            + "objective: {{kind: grpo, kl: 0.1}}\n",
    "ppo": PROMPTS + ROLLOUT.format(group=1, here=HERE) + "objective: {{kind: ppo, kl: 0.05}}\n",
    "talks": PROMPTS + ROLLOUT.format(group=2, here=HERE).replace(
        'rewards: [{{kind: function, function: "' + HERE + ':worth"}}]',
        'environment: {{kind: callback, function: "' + HERE + ':guesses", workers: 2, max_turns: 3}}',
    ) + "objective: {{kind: grpo}}\n",
    "mix": PROMPTS + ROLLOUT.format(group=4, here=HERE)
           + "objective: {{kind: mix, main: {{kind: grpo}}, weight: 0.1}}\n"
           "beside: {{kind: documents, train: {folder}/texts, sequences_per_step: 3, sequence_length: 24, "
           "tokens_per_batch: 60}}\n",
}  # fmt: skip
MORE = {
    "pretrain": ("optim.ema={decay: 0.9}", "evaluate.ema=true", "evaluate.prompts=[abc]", "evaluate.max_new_tokens=3"),
    "reward": ("model.head={kind: score}", "log.spread=true"), "ppo": ("model.head={kind: value}",),
}  # fmt: skip


@pytest.fixture
def files(world: Path, tmp_path: Path) -> Files:
    """The recipe of a name, with all that it reads."""
    model(world, tmp_path / "base", 9)
    model(world, tmp_path / "other", 4, std=0.1)
    (tmp_path / "texts").mkdir()
    for number, record in enumerate(conversations(14)):
        (tmp_path / "texts" / f"{number}.txt").write_text(record["output"] * (1 + number % 3))
    words = ["abc", "a bcd", "efg h", "ha", "c d e f", "gab", "deaf", "bead", "head", "fed", "cab", "dab", "bad"]
    written(tmp_path / "prompts.jsonl", [{"prompt": word} for word in words])
    written(tmp_path / "pairs.jsonl", pairs(24))
    written(tmp_path / "dev.jsonl", pairs(5, seed=2))
    liked = [{"prompt": one["prompt"], "completion": one["chosen"], "label": place % 3 > 0}
             for place, one in enumerate(pairs(24))]
    written(tmp_path / "liked.jsonl", liked)
    written(tmp_path / "chats.jsonl", conversations(20))

    def made(name: str) -> Path:
        (tmp_path / f"{name}.yaml").write_text((COMMON + RECIPES[name]).format(folder=tmp_path))
        return tmp_path / f"{name}.yaml"

    return made


def apart(found: Any, expected: Any, where: str = "") -> list[str]:
    """Where two results differ by more than rounding."""
    if isinstance(expected, dict):
        assert set(found) == set(expected), where
        return [line for name in expected for line in apart(found[name], expected[name], f"{where}/{name}")]
    if where == "/answers":
        return [] if found == expected else [where]
    if isinstance(expected, list) and expected and isinstance(expected[0], dict):
        both = enumerate(zip(found, expected, strict=True))
        return [line for place, (one, other) in both for line in apart(one, other, f"{where}/{place}")]
    same = np.allclose(found, expected, rtol=FLOAT64_RUN, atol=1e-12, equal_nan=True)
    return [] if same else [f"{where}: {found} and not {expected}"[:200]]


@pytest.mark.parametrize("name", sorted(RECIPES))
def test_two_processes_run_as_one_and_go_on_with_the_same_bits(
    name: str, files: Files, processes: Processes  # noqa: F811
) -> None:
    file, more = files(name), (*MORE.get(name, ()), "optim.schedule.length=3 steps")
    one = ran(file, more)
    together = (*more, *TWO, f"cache={file.parent}/cache-two")
    two = processes.run(2, ran, file, (*together, f"run={file.parent}/two"))
    for found in two:
        assert apart(found, one) == []
    processes.run(2, ran, file, (*together, f"run={file.parent}/again", "duration=2 steps"))
    again = processes.run(2, ran, file, (*together, f"run={file.parent}/again"))
    for found, whole in zip(again, two, strict=True):
        assert [len(found["steps"]), len(whole["steps"])] == [1, 3]
        # As text, where what is no number equals itself.
        assert repr(found) == repr(whole | {key: whole[key][2:] for key in ("steps", "answers")})
    first, second = (
        [json.loads(line) for line in (file.parent / run / "events.jsonl").read_text().splitlines()]
        for run in ("one", "two")
    )
    assert [event["kind"] for event in first] == [event["kind"] for event in second], "each event is written once"


@pytest.mark.parametrize("name", ["grpo", "ppo", "talks", "own_answers"])
def test_processes_with_a_piece_of_the_model_each_write_the_answers_that_one_writes(
    name: str, files: Files, processes: Processes  # noqa: F811
) -> None:
    file, more = files(name), MORE.get(name, ())
    one = ran(file, more)
    for found in processes.run(2, ran, file, (*more, "engine.kind=fsdp2", f"run={file.parent}/two")):
        assert apart(found, one) == []


@pytest.mark.parametrize(("kind", "how"), [("ddp", "weight"), ("ddp", "gradient"), ("fsdp2", "gradient")])
def test_a_number_that_is_none_on_one_rank_stops_both_with_its_rank_step_and_parameter(
    kind: str, how: str, files: Files, processes: Processes  # noqa: F811
) -> None:
    """Under fsdp2 a bad weight is every rank's: all of them gather it."""
    bad = "model.layers.1.mlp.up_proj.weight"
    for told in processes.run(2, poisoned, files("sft"), TWO if kind == "ddp" else (f"engine.kind={kind}",), bad, how):
        assert "not a number" in told and "step 2" in told and f"rank 1, first bad parameter: {bad}" in told, told


def test_a_tracker_that_raises_on_its_third_call_costs_one_warning_whatever_the_number_of_processes(
    files: Files, processes: Processes  # noqa: F811
) -> None:
    file = files("sft")
    tracked = ("log.trackers=[{kind: tests.training.fake_trackers.Recording, raise_at: 3}]", "duration=5 steps")
    two = processes.run(2, ran, file, (*TWO, *tracked))
    assert all(len(found["steps"]) == 5 for found in two)
    events = [json.loads(line) for line in (file.parent / "one" / "events.jsonl").read_text().splitlines()]
    assert [event["step"] for event in events if event["kind"] == "step"] == [1, 2, 3, 4, 5]
    (warning,) = (event["text"] for event in events if event["kind"] == "warning")
    assert "switched off" in warning and events[-1]["kind"] == "end"


def test_what_one_process_saved_in_the_middle_of_a_rollout_two_go_on_with(
    files: Files, processes: Processes  # noqa: F811
) -> None:
    file, further = files("grpo"), "optim.schedule.length=6 steps"
    whole = ran(file, ("duration=6 steps", further, f"run={file.parent}/whole"))
    ran(file, ("duration=3 steps", further))
    for found in processes.run(2, ran, file, (*TWO, "duration=6 steps", further)):
        assert apart({"steps": found["steps"], "answers": found["answers"]},
                     {"steps": whole["steps"][3:], "answers": whole["answers"][3:]}) == []


def test_every_rank_reads_its_share_of_what_is_measured_and_the_figures_are_those_of_one(
    files: Files, processes: Processes  # noqa: F811
) -> None:
    file = files("pretrain")
    figures, tokens = evaluated(file, ())
    (first, mine), (second, other) = processes.run(2, evaluated, file, (*TWO, f"run={file.parent}/two"))
    assert first == second and set(first) == set(figures) and "perplexity/documents" in figures
    for name, value in figures.items():
        assert first[name] == pytest.approx(value, rel=1e-12), name
    assert tokens <= mine + other <= 1.2 * tokens and min(mine, other) > 0.3 * tokens


def test_measuring_changes_nothing_that_two_processes_learn(files: Files, processes: Processes) -> None:  # noqa: F811
    file = files("sft")
    often, never = (
        processes.run(2, ran, file, (*TWO, f"evaluate.every={every}", f"run={file.parent}/{number}"))
        for number, every in enumerate(("1 steps", "never"))
    )
    assert [found["weights"] for found in often] == [found["weights"] for found in never]


def test_two_processes_ask_a_reference_once_and_half_as_often_each_and_keep_what_one_would(
    files: Files, processes: Processes  # noqa: F811
) -> None:
    file = files("dpo")
    computed, passes, known = cached(file, ())
    (first, mine, one), (second, other, two) = processes.run(2, cached, file, (*TWO, f"cache={file.parent}/two"))
    assert first == second == computed and mine == other == 4 and passes == 6
    assert one == two == known, "bit for bit"
