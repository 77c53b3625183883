"""Runs that learn from conversations: what is learned of them, when they end, what continues, whose error is told."""

from __future__ import annotations

import json
import threading
import traceback
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from llmtrainer.base.config import load
from llmtrainer.base.errors import UserError
from llmtrainer.core.batch import Batch
from llmtrainer.core.environment import Feedback
from llmtrainer.core.example import Message
from llmtrainer.core.objective import count, loss_of
from llmtrainer.models.families.llama import Llama
from llmtrainer.models.weights import save_weights
from llmtrainer.tokenizer.chat import Chat
from llmtrainer.tokenizer.tokenizer import load_tokenizer
from llmtrainer.training.checkpoint import read_manifest
from llmtrainer.training.held import Held
from llmtrainer.training.recipe import Recipe
from llmtrainer.training.run import open_trainer, train
from tests.tolerances import FLOAT64_TWO_WAYS

HERE = "tests.training.test_rollout_turns"
SEVERAL = ("rollout.epochs=2", "rollout.answers_per_step=8")
PPO = "{kind: ppo, kl: 0.02, value_weight: 0.5}"
Make = Callable[..., Recipe]


class Game:
    """Three turns; each earns the share of the letter a in it, the last also ten times the record's number."""

    def reset(self, facts: Mapping[str, Any]) -> None:
        self.number, self.turns = facts["number"], 0

    def step(self, text: str) -> tuple[bool, str, float]:
        self.turns += 1
        share = text.count("a") / max(len(text), 1)
        return self.turns == 3, "go on", share + 10.0 * self.number * (self.turns == 3)


def quiet(text: str) -> tuple[bool, str]:
    """Two turns at most, and never a reward."""
    return len(text) % 2 == 0, "go on"


def endless(text: str) -> tuple[bool, str, float]:
    return False, "more", float(len(text))


def useless(text: str) -> Feedback:
    return Feedback(done=False, text="what?", reward=float(len(text)), error=True)


def breaks_down(text: str) -> tuple[bool, str, float]:
    raise ZeroDivisionError("the board has no fields")


def breaks_at_times(text: str) -> tuple[bool, str, float]:
    if len(text) % 2:
        raise KeyError(text)
    return True, "", float(len(text))


@pytest.fixture
def rl(world: Path, tmp_path: Path) -> Make:
    """A recipe that learns from conversations about 12 prompts, in turns of 6 tokens at most: rl("seed=1")."""
    policy = Llama(hidden_size=32, layers=2, heads=2, kv_heads=1, intermediate_size=64, context_length=96).build(320)
    policy.initialise(9)
    save_weights(policy, tmp_path / "base")
    load_tokenizer(world / "tokenizer").save(tmp_path / "base")
    words = ["abc", "a bcd", "efg h", "ha", "c d e f", "gab", "deaf", "bead", "head", "fed", "cab", "dab"]
    records = [json.dumps({"prompt": word, "number": number}) + "\n" for number, word in enumerate(words)]
    (tmp_path / "prompts.jsonl").write_text("".join(records))
    # A policy that knows nothing draws its end too seldom: here a third of all ids end a turn.
    ends = list(range(0, 320, 3))
    (tmp_path / "rl.yaml").write_text(f"""\
run: {tmp_path}/run
model: {{start_from: {tmp_path}/base}}
tokenizer: {tmp_path}/base
cache: {tmp_path}/cache
data:
  {{kind: prompts, train: {tmp_path}/prompts.jsonl, template: completion, prompts_per_step: 4, tokens_per_batch: 160}}
objective: {{kind: grpo}}
rollout:
  group_size: 4
  sampling: {{max_new_tokens: 6, stop_ids: {ends}}}
  environment: {{kind: callback, function: "{HERE}:Game", workers: 2}}
optim: {{schedule: {{kind: constant, peak: 1e-3, warmup: 0 steps}}}}
precision: float32
duration: 4 steps
save: {{every: never}}
seed: 5
""")
    return lambda *overrides: load(Recipe, tmp_path / "rl.yaml", overrides=overrides)


def stepped(recipe: Recipe) -> list[dict[str, float]]:
    with open_trainer(recipe) as trainer:
        return [{"loss": info.loss, "grad_norm": info.grad_norm, **info.metrics} for info in trainer.steps()]


def with_function(name: str) -> str:
    return f"rollout.environment.function={HERE}:{name}"


def first_rollout(recipe: Recipe) -> tuple[Held, list[Batch]]:
    with open_trainer(recipe) as trainer:
        batches = trainer.parts.source.batches(0)
        held = trainer.parts.source._held
    assert held is not None
    return held, batches


def told(recipe: Recipe) -> list[dict[str, Any]]:
    lines = (Path(recipe.run) / "events.jsonl").read_text().splitlines()
    return [event for event in map(json.loads, lines) if event["kind"] == "rollout"]


def of_sequence(batch: Batch, sequence: int) -> torch.Tensor:
    return (batch.sequence_BT == sequence) & (batch.weights_BT > 0)


@pytest.mark.parametrize("share", ["true", "false"])
def test_the_policys_own_ids_are_learned_and_what_the_environment_said_is_read_with_weight_0(
    rl: Make, share: str
) -> None:
    recipe = rl(f"rollout.share_prompt={share}")
    held, batches = first_rollout(recipe)
    said = load_tokenizer(recipe.tokenizer.path).encode_continuation("\ngo on\n")
    several = 0
    for tokens, weights, one in zip(held.rollout.answers, held.rollout.weights, held.written, strict=True):
        assert set(weights.tolist()) <= {0.0, 1.0}
        assert tokens[weights == 1].tolist() == list(one.tokens)
        heard = tokens[weights == 0].tolist()
        assert heard == said * (len(heard) // len(said)) and len(heard) // len(said) <= 2
        several += len(heard) // len(said) == 2
    assert several >= 4
    learned = [
        tuple(batch.targets_BT[of_sequence(batch, sequence)].tolist())
        for batch in batches for sequence in range(batch.sequences)
    ]
    assert sorted(learned) == sorted(one.tokens for one in held.written)
    assert {weight for batch in batches for weight in batch.weights_BT.unique().tolist()} == {0.0, 1.0}


@pytest.mark.parametrize("objective", ["{kind: grpo, kl: 0.1}", "{kind: grpo, loss: gspo, entropy: 0.1}"])
def test_no_gradient_depends_on_targets_that_the_environment_said(rl: Make, objective: str) -> None:
    with open_trainer(rl(f"objective={objective}", "precision=float64", *SEVERAL)) as trainer:
        policy, objective_ = trainer.parts.policy, trainer.parts.objective
        batches = trainer.parts.source.batches(0)
        found = []
        for other in (False, True):
            policy.zero_grad()
            counts = count(batches)
            for batch in batches:
                if other:
                    batch.targets_BT[batch.weights_BT == 0] = 7
                loss_of(objective_.terms(policy(batch, objective_.wants), batch), counts).backward()
            found.append({name: value.grad.clone() for name, value in policy.named_parameters()})
    assert any(value.abs().max() > 0 for value in found[0].values())
    for name, value in found[0].items():
        assert torch.equal(value, found[1][name]), name


@pytest.mark.parametrize(("precision", "more"), [
    ("float32", ()), ("bfloat16", ("rollout.sampling.temperature=0.7", "rollout.sampling.top_k=20")),
    ("float32", (f"objective={PPO}", "model.head={kind: value}")),
])  # fmt: skip
def test_the_ratio_of_the_first_inner_step_is_exactly_1(rl: Make, precision: str, more: tuple[str, ...]) -> None:
    first, *others = stepped(rl(*SEVERAL, *more, f"precision={precision}", "optim.schedule.peak=3e-2"))
    assert first["policy/ratio"] == 1.0 and first["policy/moved"] == 0.0
    assert all(step["policy/moved"] > 0.0 for step in others)


def test_what_sampling_saw_of_every_turn_is_what_training_computes(rl: Make) -> None:
    held, _ = first_rollout(rl(*SEVERAL, "precision=float64", "rollout.sampling.top_p=0.9"))
    assert held.rollout.trainer_logp is not None
    for sampler, policy, weights in zip(
        held.rollout.old_logp, held.rollout.trainer_logp, held.rollout.weights, strict=True
    ):
        np.testing.assert_allclose(sampler, policy, **FLOAT64_TWO_WAYS)
        assert (sampler[weights == 0] == 0).all() and (sampler[weights == 1] < 0).all()


def test_a_prompt_that_is_shared_and_micro_batches_change_no_number(rl: Make) -> None:
    ways = [(), ("rollout.share_prompt=false", "rollout.environment.workers=1"), ("data.tokens_per_batch=4000",)]
    wanted = ("objective.kl=0.1", "precision=float64", "duration=3 steps", *SEVERAL)
    first, *others = [stepped(rl(*wanted, *way, f"run={rl().run}-{number}")) for number, way in enumerate(ways)]
    for other in others:
        for step, expected in zip(other, first, strict=True):
            for name in ("loss", "grad_norm", "loss/kl", "policy/moved", "reward/mean", "rollout/turns"):
                assert step[name] == pytest.approx(
                    expected[name], rel=FLOAT64_TWO_WAYS["rtol"], abs=FLOAT64_TWO_WAYS["atol"]
                ), name


@pytest.mark.parametrize("more", [("rollout.sampling.top_k=30",), (f"objective={PPO}", "model.head={kind: value}")])
def test_a_run_that_is_resumed_inside_of_a_rollout_has_the_same_bits(rl: Make, more: tuple[str, ...]) -> None:
    straight = rl(*SEVERAL, *more, "duration=7 steps")
    train(straight)
    resumed = ("optim.schedule.length=7 steps", f"run={straight.run}-resumed")
    for duration in ("3 steps", "7 steps"):
        train(rl(*SEVERAL, *more, *resumed, f"duration={duration}"))
    both = [read_manifest(Path(run) / "checkpoints" / "step-00000007")["files"]
            for run in (straight.run, f"{straight.run}-resumed")]
    assert both[0].keys() == both[1].keys()
    for name, facts in both[0].items():
        if name.endswith(".safetensors"):
            assert facts["sha256"] == both[1][name]["sha256"], name


def test_weights_that_were_not_renewed_are_refused(rl: Make) -> None:
    with open_trainer(rl("rollout.weights=copied", "duration=3 steps")) as trainer:
        trainer.parts.source._gathering.sampler.sync = lambda: None
        with pytest.raises(UserError, match="does not hold the trainer's weights"):
            for _ in trainer.steps():
                pass


def test_weights_that_change_in_the_middle_of_a_conversation_are_refused(rl: Make) -> None:
    with open_trainer(rl()) as trainer:
        sampler, weight = trainer.parts.source._gathering.sampler, next(trainer.parts.policy.parameters())
        original, before, calls = sampler.sample, weight.detach().clone(), []

        def sample(*given: Any, **rows: Any) -> Any:
            found = original(*given, **rows)
            calls.append(len(found))
            with torch.no_grad():       # other weights for the second turn alone
                weight.copy_(before + 0.01 if len(calls) == 1 else before)
            return found

        sampler.sample = sample
        with pytest.raises(UserError, match="does not hold the trainer's weights"):
            trainer.parts.source.batches(0)


@pytest.mark.parametrize("turns", [1, 2])
def test_no_conversation_of_a_run_has_more_turns_than_it_may(rl: Make, turns: int) -> None:
    recipe = rl(with_function("endless"), f"rollout.environment.max_turns={turns}", "duration=1 steps")
    train(recipe)
    (event,) = told(recipe)
    # Those that were cut in their first turn have no second one.
    assert event["rollout/turns"] == 1.0 if turns == 1 else 1.0 < event["rollout/turns"] <= 2.0
    assert event["rollout/errors"] == 0.0 and event["rollout/ended"] == 0.0


def test_turns_that_are_of_no_use_end_a_conversation_of_a_run(rl: Make) -> None:
    recipe = rl(with_function("useless"), "rollout.environment.max_errors=2", "duration=1 steps")
    train(recipe)
    (event,) = told(recipe)
    assert 1.0 < event["rollout/turns"] <= 2.0 and event["rollout/errors"] == event["rollout/turns"]


def test_no_conversation_goes_beyond_the_context_or_its_tokens(rl: Make) -> None:
    for override, most in (("max_tokens=20", 20), ("max_turns=90", 96)):
        held, _ = first_rollout(rl(with_function("endless"), "rollout.environment.max_turns=90",
                                   f"rollout.environment.{override}", f"run={rl().run}-{most}"))
        prompts = held.rollout.prompts if most == 96 else [()] * len(held.rollout.answers)
        lengths = [len(prompt) + len(answer) for prompt, answer in zip(prompts, held.rollout.answers, strict=True)]
        assert most - 20 < max(lengths) <= most


def test_every_reward_is_that_of_its_own_prompt(rl: Make) -> None:
    held, _ = first_rollout(rl())
    tokenizer = load_tokenizer(rl().tokenizer.path)
    words = {json.loads(line)["prompt"]: json.loads(line)["number"]
             for line in (Path(rl().tokenizer.path).parent / "prompts.jsonl").read_text().splitlines()}
    whole = 0
    for prompt, weights, reward in zip(
        held.rollout.prompts, held.rollout.weights, held.rollout.reward_R, strict=True
    ):
        turns = 1 + int((np.diff(weights) > 0).sum())
        number = words[tokenizer.decode(prompt.tolist(), skip_control=True)]
        assert 10.0 * number * (turns == 3) <= reward <= 10.0 * number + 3.0
        whole += turns == 3 and number > 0
    assert whole >= 2


def test_rewards_are_added_to_the_environments_own_and_each_has_its_name(rl: Make) -> None:
    reward = "{kind: function, function: 'tests.training.toy_rewards:length', name: length, weight: 0.5}"
    recipe = rl(f"rollout.rewards=[{reward}]", "duration=1 steps")
    train(recipe)
    (event,) = told(recipe)
    assert event["reward/mean"] == pytest.approx(
        event["reward/environment"] + 0.5 * event["reward/length"], rel=1e-12
    )
    assert event["reward/length"] == pytest.approx(event["rollout/length"], rel=1e-12)


def test_rewards_may_be_all_that_a_conversation_earns(rl: Make) -> None:
    recipe = rl(with_function("quiet"), "duration=1 steps",
                "rollout.rewards=[{kind: function, function: 'tests.training.toy_rewards:length', name: length}]")
    train(recipe)
    (event,) = told(recipe)
    assert event["reward/mean"] == event["reward/length"] and "reward/environment" not in event
    assert event["rollout/failed"] == 0.0


def test_what_cannot_be_learned_is_refused_by_name(rl: Make) -> None:
    with pytest.raises(UserError, match="nothing says what a conversation is worth"):
        train(rl(with_function("quiet")))
    reward = "{kind: function, function: 'tests.training.toy_rewards:length', name: environment}"
    with pytest.raises(UserError, match="two rewards are called `environment`"):
        train(rl(f"rollout.rewards=[{reward}]"))
    with pytest.raises(UserError, match="did you mean `endless`"):
        train(rl(with_function("endles")))


def test_an_exception_of_the_environment_is_the_runs_with_its_own_traceback(rl: Make) -> None:
    with pytest.raises(ZeroDivisionError, match="the board has no fields") as raised:
        train(rl(with_function("breaks_down")))
    frames = traceback.extract_tb(raised.tb)
    assert any(frame.name == "breaks_down" and frame.line == 'raise ZeroDivisionError("the board has no fields")'
               for frame in frames)  # fmt: skip
    assert not [thread for thread in threading.enumerate() if thread.name.startswith("environment")]


def test_an_exception_may_cost_its_conversation_alone(rl: Make) -> None:
    recipe = rl(with_function("breaks_at_times"), "rollout.environment.exceptions=fail", "duration=2 steps")
    train(recipe)
    events = told(recipe)
    assert len(events) == 2
    for event in events:
        assert 0.0 < event["rollout/failed"] < 1.0
        assert event["rollout/failed"] == event["reward/environment/KeyError"]


def test_feedback_is_read_as_the_template_writes_it(world: Path) -> None:
    tokenizer = load_tokenizer(world / "tokenizer")
    chat = Chat(tokenizer, "chatml")
    asked, reply = [Message("user", "a game?")], Message("user", "no <|im_end|>, go on")
    answered = [*asked, Message("assistant", "It is."), reply]
    written = [*chat.prompt(asked), *tokenizer.encode("It is.")]
    cut, whole = (chat.behind_answer(asked, reply, ended=ended) for ended in (False, True))
    assert [*written, *cut] == chat.prompt(answered)
    assert cut[0] in chat.end_ids and cut[1:] == whole


def test_a_conversation_of_a_run_is_what_the_template_makes_of_it(rl: Make) -> None:
    recipe = rl("data.template=chatml", "data.as_messages=true")
    held, _ = first_rollout(recipe)
    chat = Chat(load_tokenizer(recipe.tokenizer.path), "chatml")
    asked, reply = [Message("user", "ha")], Message("user", "go on")
    heard = chat.behind_answer(asked, reply, ended=False)
    several = 0
    for tokens, weights in zip(held.rollout.answers, held.rollout.weights, strict=True):
        starts = np.flatnonzero(np.diff(weights) < 0) + 1
        for start in starts.tolist():
            ended = int(tokens[start - 1]) in chat.end_ids
            expected = heard[1:] if ended else heard
            assert tokens[start : start + len(expected)].tolist() == expected
            assert not weights[start : start + len(expected)].any()
        several += len(starts) == 2
    assert several >= 2
