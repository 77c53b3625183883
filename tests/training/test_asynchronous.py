"""A process that writes rollouts ahead: what it changes (nothing), what is never lost, and who ends whom."""

from __future__ import annotations

import json
import os
import random
import signal
import subprocess
import sys
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest

from llmtrainer.base.config import load
from llmtrainer.base.errors import UserError
from llmtrainer.base.events import read_events
from llmtrainer.base.rundir import RunDir
from llmtrainer.models.families.llama import Llama
from llmtrainer.models.weights import save_weights
from llmtrainer.rewards.function import Function
from llmtrainer.tokenizer.tokenizer import load_tokenizer
from llmtrainer.training import checkpoint
from llmtrainer.training.recipe import Recipe
from llmtrainer.training.run import train
from tests.training.nursery import Life, Nursery, nursery

REWARDS = "tests.training.slow_rewards"
BYPASS = "objective.correction.bypass=true"
SEVERAL = ("rollout.epochs=2", "rollout.answers_per_step=4")
REASONS = {"even", "unrewarded", "rejected"}
FILES = ("model.safetensors", "optimizer.safetensors", "rollout.safetensors")


@pytest.fixture(scope="module")
def gate(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("gate") / "gate"
    os.mkfifo(path)
    return path


@pytest.fixture(scope="module")
def forks(gate: Path) -> Iterator[Nursery]:
    with nursery(GATE=str(gate)) as found:
        yield found


@pytest.fixture
def kills(request: pytest.FixtureRequest) -> int:
    return int(request.config.getoption("--kills")) // 10


@pytest.fixture
def file(world: Path, tmp_path: Path, kills: int) -> Path:
    """A recipe that learns from the answers to different prompts, more than a test can draw, two answers to each of
    four in a rollout."""
    policy = Llama(hidden_size=16, layers=1, heads=2, kv_heads=1, intermediate_size=32, context_length=64).build(320)
    policy.initialise(9)
    save_weights(policy, tmp_path / "base")
    load_tokenizer(world / "tokenizer").save(tmp_path / "base")
    with (tmp_path / "prompts.jsonl").open("w") as out:
        for number in range(64 + 4 * 4 * kills):
            word = "".join("abcdefgh"[number >> shift & 7] for shift in (9, 6, 3, 0))
            out.write(json.dumps({"prompt": word, "number": number}) + "\n")
    (tmp_path / "rl.yaml").write_text(f"""\
run: {tmp_path}/run
model: {{start_from: {tmp_path}/base}}
tokenizer: {tmp_path}/base
cache: {tmp_path}/cache
data:
  {{kind: prompts, train: {tmp_path}/prompts.jsonl, template: completion, prompts_per_step: 4, tokens_per_batch: 96}}
objective: {{kind: grpo}}
rollout:
  group_size: 2
  sampling: {{max_new_tokens: 6}}
  share_prompt: false
  rewards: [{{kind: function, function: "{REWARDS}:share_of_a", per: batch}}]
optim: {{schedule: {{kind: constant, peak: 1e-2, warmup: 0 steps, length: 40 steps}}}}
precision: float32
duration: 6 steps
save: {{every: never}}
seed: 5
""")
    return tmp_path / "rl.yaml"


@pytest.fixture
def recipe(file: Path) -> Callable[..., Recipe]:
    return lambda *overrides: load(Recipe, file, overrides=overrides)


def hashes(run: Path, step: int, files: tuple[str, ...] = FILES) -> dict[str, str]:
    """SHA-256 of what a checkpoint holds of the run's state."""
    told = checkpoint.read_manifest(RunDir(run).checkpoint(step))["files"]
    return {name: told[name]["sha256"] for name in files}


def rollouts(run: Path) -> list[dict[str, Any]]:
    """The event of every rollout; a continued run repeats some, and the last line counts."""
    events = {event["rollout"]: event for event in read_events(run / "events.jsonl") if event["kind"] == "rollout"}
    return [events[number] for number in sorted(events)]


def untimed(events: list[dict[str, Any]]) -> list[dict[str, Any]]:
    return [{k: v for k, v in e.items() if k not in ("time", "rollout/seconds", "rollout/waited")} for e in events]


def done(life: Life) -> Life:
    assert life.last == {"done": True}, life.last
    return life


@pytest.mark.parametrize(
    "overrides",
    [
        (*SEVERAL, "objective.kl=0.1", "rollout.sampling.top_k=30", "rollout.redraw=2", "rollout.weights=copied",
         "data.held_out=0.1", "evaluate.every=3 steps"),
        ("objective={kind: ppo, kl: 0.02, rewards: running}", "model.head={kind: value}", *SEVERAL,
         "rollout.environment={kind: callback, function: 'tests.training.test_rollout_turns:Game', max_turns: 3}",
         "rollout.rewards=[]"),
    ],
    ids=["grpo", "ppo"],
)  # fmt: skip
def test_with_staleness_0_a_run_is_to_the_bit_the_one_without_that_process(
    forks: Nursery, recipe: Callable[..., Recipe], file: Path, tmp_path: Path, overrides: tuple[str, ...]
) -> None:
    train(recipe(*overrides, f"run={tmp_path}/alone"))
    done(forks.whole(file, *overrides, "rollout.max_staleness=0"))
    assert hashes(tmp_path / "run", 6) == hashes(tmp_path / "alone", 6)
    assert untimed(rollouts(tmp_path / "run")) == untimed(rollouts(tmp_path / "alone"))
    both = [untimed([e for e in read_events(tmp_path / run / "events.jsonl") if e["kind"] == "evaluate"])
            for run in ("run", "alone")]    # fmt: skip
    assert both[0] == both[1] and len(both[0]) == (2 if "evaluate.every=3 steps" in overrides else 0)


def test_every_rollout_is_written_by_the_weights_of_so_many_steps_before_it_is_learned(
    forks: Nursery, file: Path, tmp_path: Path
) -> None:
    life = done(forks.whole(file, BYPASS, *SEVERAL, "rollout.max_staleness=6", "duration=13 steps"))
    versions = [line["version"] for line in life.lines if "version" in line]
    assert len(set(versions)) == 13    # every step changes the weights
    found = rollouts(tmp_path / "run")
    # Four steps to a rollout: number n is learned from step 4 n on.
    assert [event["version"] for event in found] == [versions[step] for step in (0, 0, 2, 6)]
    assert [event["rollout/staleness"] for event in found] == [0, 4, 6, 6]


def test_a_run_with_stale_rollouts_continues_to_the_bit_wherever_it_was_stopped(
    forks: Nursery, file: Path, tmp_path: Path
) -> None:
    wanted = (BYPASS, *SEVERAL, "rollout.max_staleness=6", "rollout.redraw=1")
    done(forks.whole(file, *wanted, "duration=11 steps", f"run={tmp_path}/whole"))
    # Saving waits for what is being written: that must not change it either.
    for duration in (6, 11):
        done(forks.whole(file, *wanted, f"duration={duration} steps", "save.every=1 steps"))
    assert hashes(tmp_path / "run", 11) == hashes(tmp_path / "whole", 11)
    assert untimed(rollouts(tmp_path / "run")) == untimed(rollouts(tmp_path / "whole"))


def conserved(run: Path, trained: dict[int, list[list[int]]], answers: int) -> None:
    """Every prompt that was drawn is learned with all its answers that count, once, or has a recorded reason."""
    found = rollouts(run)
    starts = [event["drawn"][0] for event in found]
    stops = [event["drawn"][1] for event in found]
    assert starts == [0, *stops[:-1]]     # no draw is in two rollouts, and none in between
    left_out = [draw for event in found for draws in event["left_out"].values() for draw in draws]
    assert len(left_out) == len(set(left_out)) and set(left_out) <= set(range(stops[-1]))
    counts = Counter(tuple(prompt) for prompts in trained.values() for prompt in prompts)
    # As many prompts as draws: every prompt of the data is another, and the data is larger.
    assert len(counts) == stops[-1] - len(left_out)
    assert max(counts.values()) <= answers


def test_prompts_that_are_not_learned_have_a_recorded_reason(forks: Nursery, file: Path, tmp_path: Path) -> None:
    close = ("objective.correction.reject=mean", "objective.correction.bounds=[0.98, 1.02]")
    life = done(forks.whole(
        file, *close, "rollout.max_staleness=2", "rollout.redraw=2", "duration=20 steps"
    ))  # fmt: skip
    conserved(tmp_path / "run", {line["step"]: line["prompts"] for line in life.steps}, answers=2)
    assert {reason for event in rollouts(tmp_path / "run") for reason in event["left_out"]} == REASONS


def test_killed_at_random_moments_nothing_is_lost_or_learned_twice(
    forks: Nursery, file: Path, tmp_path: Path, kills: int
) -> None:
    """kill -9 of the trainer or of the sampler, while rollouts are written, scored, learned and saved."""
    draw = random.Random(9)
    wanted = (BYPASS, "rollout.max_staleness=3", "rollout.reward_workers=2", f"duration={4 * kills} steps")
    done(forks.whole(file, *wanted, f"run={tmp_path}/whole"))
    trained: dict[int, list[list[int]]] = {}
    for kill in range(kills + 1):
        steps, spin, both = draw.randint(1, 3), draw.randrange(200_000), draw.random() < 0.5
        for life, line in forks.live(file, *wanted, "save.every=1 steps", paced=True):
            trained |= {line["step"]: line["prompts"]} if "step" in line else {}
            if kill < kills and len(life.steps) == steps and "step" in line:
                for _ in range(spin):   # a moment anywhere within what follows
                    pass
                sampler = psutil.Process(life.sampler)
                os.kill(life.pid if both else life.sampler, signal.SIGKILL)
        if kill < kills:
            assert life.last.get("status") == signal.SIGKILL if both else life.last["error"] == "ChildProcessError"
            sampler.wait(timeout=60)    # it never outlives its trainer
    assert life.last == {"done": True}
    assert sorted(trained) == list(range(1, 4 * kills + 1))
    conserved(tmp_path / "run", trained, answers=2)
    assert hashes(tmp_path / "run", 4 * kills) == hashes(tmp_path / "whole", 4 * kills)
    assert untimed(rollouts(tmp_path / "run")) == untimed(rollouts(tmp_path / "whole"))


def test_weights_that_did_not_arrive_are_noticed_before_anything_is_learned(forks: Nursery, file: Path) -> None:
    life = forks.whole(file, BYPASS, "rollout.max_staleness=1", change="skip_a_sync")
    # Rollouts 0 and 1 are by the first weights, which it has; the next says it is by others.
    assert life.last["error"] == "UserError" and "does not hold the trainer's weights" in life.last["text"]
    assert [line["step"] for line in life.steps] == [1, 2]


def test_rewards_are_worked_out_while_the_trainer_learns(forks: Nursery, file: Path) -> None:
    # The reward of the second rollout waits for the first step: where one waits for the other, it waits in vain.
    reward = f"rollout.rewards=[{{kind: function, function: '{REWARDS}:behind_a_gate', per: batch}}]"
    done(forks.whole(file, BYPASS, reward, "rollout.max_staleness=1", "duration=3 steps", change="open_the_gate"))


def test_rollouts_are_scored_at_the_same_time_by_several_workers(forks: Nursery, file: Path) -> None:
    reward = f"rollout.rewards=[{{kind: function, function: '{REWARDS}:two_together', per: batch}}]"
    wanted = (BYPASS, reward, "rollout.max_staleness=1", "rollout.reward_workers=2", "duration=1 steps")
    done(forks.whole(file, *wanted))


def test_an_exception_in_the_other_process_is_told_as_it_is(forks: Nursery, file: Path) -> None:
    environment = f"rollout.environment={{kind: callback, function: '{REWARDS}:breaks'}}"
    life = forks.whole(file, environment, "rollout.rewards=[]", "rollout.max_staleness=0")
    # Of a class that no other process can make from its text.
    assert (life.last["error"], life.last["text"]) == ("RuntimeError", "Broken: 7: the environment is out of order")
    assert "slow_rewards.py" in life.last["cause"] and "in breaks" in life.last["cause"]


def test_older_weights_without_a_correction_are_refused(recipe: Callable[..., Recipe]) -> None:
    with pytest.raises(UserError, match="nothing corrects for it"):
        train(recipe("rollout.max_staleness=1"))


def test_a_setting_of_the_other_process_without_it_is_refused(recipe: Callable[..., Recipe]) -> None:
    with pytest.raises(UserError, match=r"`rollout.reward_workers` was set and nothing read it"):
        train(recipe("rollout.reward_workers=2"))


def test_a_function_that_no_other_process_can_import_is_refused(recipe: Callable[..., Recipe]) -> None:
    found = recipe("rollout.max_staleness=0")
    rewards = (Function.given(lambda answer: 1.0),)
    given = found.model_copy(update={"rollout": found.rollout.model_copy(update={"rewards": rewards})})
    with pytest.raises(UserError, match="cannot be handed to the process"):
        train(given)


def test_ctrl_c_ends_both_with_a_full_checkpoint(file: Path, tmp_path: Path) -> None:
    words = [sys.executable, "-m", "llmtrainer", "train", str(file), BYPASS, "rollout.max_staleness=2", "--json",
             "duration=100000 steps"]    # fmt: skip
    with subprocess.Popen(
        words, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, start_new_session=True
    ) as child:
        assert child.stderr is not None
        assert any("step 1 " in line for line in child.stderr)
        others = psutil.Process(child.pid).children(recursive=True)
        os.killpg(child.pid, signal.SIGINT)
        out, _ = child.communicate(timeout=120)
    told = json.loads(out)
    assert child.returncode == 3 and told["stopped"] == "SIGINT"
    folder = RunDir(tmp_path / "run").newest_checkpoint()
    assert folder.name == f"step-{told['step']:08d}" and checkpoint.verify(folder) is None
    _, alive = psutil.wait_procs(others, timeout=60)
    assert len(others) >= 1 and not alive


def test_what_a_user_can_mend_in_a_reward_is_told_as_such(forks: Nursery, file: Path) -> None:
    reward = f"rollout.rewards=[{{kind: function, function: '{REWARDS}:refuses'}}]"
    *_, error, code = forks.whole(file, reward, "rollout.max_staleness=0", command=True).lines
    assert error == {"error": {
        "what": "the judge is not at home", "where": "a test", "why": "it is late", "fix": "come back tomorrow",
    }}  # fmt: skip
    assert code == {"code": 2}
