"""Runs that learn from their own answers: what is learned, what does not change it, and what continues."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from llmtrainer.base.config import load
from llmtrainer.base.errors import UserError
from llmtrainer.core.objective import count, loss_of
from llmtrainer.models.families.llama import Llama
from llmtrainer.models.weights import save_weights
from llmtrainer.tokenizer.tokenizer import load_tokenizer
from llmtrainer.training.checkpoint import read_manifest
from llmtrainer.training.recipe import Recipe
from llmtrainer.training.rollout import RolloutSource
from llmtrainer.training.run import open_trainer, train
from tests.tolerances import FLOAT64_TWO_WAYS, FOLLOWED_WEIGHT
from tests.training import toy_rewards

Make = Callable[..., Recipe]


@pytest.fixture
def rl(world: Path, tmp_path: Path) -> Make:
    """A recipe that learns from answers to 12 prompts: rl("duration=4 steps")."""
    policy = Llama(hidden_size=32, layers=2, heads=2, kv_heads=1, intermediate_size=64, context_length=64).build(320)
    policy.initialise(9)
    save_weights(policy, tmp_path / "base")
    load_tokenizer(world / "tokenizer").save(tmp_path / "base")
    words = ["abc", "a bcd", "efg h", "ha", "c d e f", "gab", "deaf", "bead", "head", "fed", "cab", "dab"]
    (tmp_path / "prompts.jsonl").write_text("".join(json.dumps({"prompt": word}) + "\n" for word in words))
    (tmp_path / "rl.yaml").write_text(f"""\
run: {tmp_path}/run
model: {{start_from: {tmp_path}/base}}
tokenizer: {tmp_path}/base
cache: {tmp_path}/cache
data:
  {{kind: prompts, train: {tmp_path}/prompts.jsonl, template: completion, prompts_per_step: 4, tokens_per_batch: 96}}
objective: {{kind: grpo}}
rollout:
  group_size: 4
  sampling: {{max_new_tokens: 8}}
  rewards: [{{kind: function, function: "tests.training.toy_rewards:share_of_a"}}]
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


def events(recipe: Recipe, kind: str) -> list[dict[str, Any]]:
    lines = (Path(recipe.run) / "events.jsonl").read_text().splitlines()
    return [event for event in map(json.loads, lines) if event["kind"] == kind]


SEVERAL = ("rollout.epochs=2", "rollout.answers_per_step=8")


@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
@pytest.mark.parametrize("sampling", ["{max_new_tokens: 8}", "{max_new_tokens: 8, temperature: 0.7, top_k: 20}"])
def test_the_ratio_of_the_first_inner_step_is_exactly_1(rl: Make, precision: str, sampling: str) -> None:
    # Rates as large as this move the policy far from the one that wrote: later steps must show it.
    settings = rl(*SEVERAL, f"precision={precision}", f"rollout.sampling={sampling}", "optim.schedule.peak=3e-2")
    first, *others = stepped(settings)
    assert first["policy/ratio"] == 1.0 and first["policy/moved"] == 0.0
    assert all(step["policy/moved"] > 0.0 for step in others[:3])


def test_answers_that_are_learned_in_one_step_have_the_ratio_1_without_being_read_again(rl: Make) -> None:
    for step in stepped(rl("duration=2 steps")):
        assert step["policy/ratio"] == 1.0


def test_what_sampling_saw_is_what_training_computes(rl: Make) -> None:
    settings = rl(*SEVERAL, "precision=float64", "rollout.sampling.temperature=0.8", "rollout.sampling.top_p=0.9")
    with open_trainer(settings) as trainer:
        for _ in trainer.steps():
            held = trainer.parts.source._held
            assert held.rollout.trainer_logp is not None
            for sampler, policy in zip(held.rollout.old_logp, held.rollout.trainer_logp, strict=True):
                np.testing.assert_allclose(sampler, policy, **FLOAT64_TWO_WAYS)


def test_a_prompt_that_is_shared_and_micro_batches_change_no_number(rl: Make) -> None:
    ways = [(), ("rollout.share_prompt=false",), ("data.tokens_per_batch=40",), ("data.tokens_per_batch=4000",)]
    wanted = ("objective.kl=0.1", "objective.entropy=0.01", "precision=float64", *SEVERAL)
    found = []
    for number, way in enumerate(ways):
        found.append(stepped(rl(*wanted, *way, f"run={rl().run}-{number}")))
    for other in found[1:]:
        for step, expected in zip(other, found[0], strict=True):
            for name in ("loss", "grad_norm", "loss/kl", "policy/entropy", "policy/moved", "reward/mean"):
                assert step[name] == pytest.approx(
                    expected[name], rel=FLOAT64_TWO_WAYS["rtol"], abs=FLOAT64_TWO_WAYS["atol"]
                ), name


@pytest.mark.parametrize("objective", ["{kind: grpo, kl: 0.1}", "{kind: grpo, kl: 0.1, kl_in: reward}"])
def test_a_run_that_is_resumed_inside_of_a_rollout_has_the_same_bits(rl: Make, objective: str) -> None:
    wanted = (*SEVERAL, f"objective={objective}", "rollout.sampling.top_k=30")
    straight = rl(*wanted, "duration=7 steps")
    train(straight)
    resumed = ("optim.schedule.length=7 steps", f"run={straight.run}-resumed")
    for duration in ("3 steps", "5 steps", "7 steps"):
        train(rl(*wanted, *resumed, f"duration={duration}"))
    both = [read_manifest(Path(run) / "checkpoints" / "step-00000007")["files"]
            for run in (straight.run, f"{straight.run}-resumed")]
    for name in ("model.safetensors", "optimizer.safetensors"):
        assert both[0][name]["sha256"] == both[1][name]["sha256"], name


def test_a_copy_of_the_weights_writes_the_same_answers(rl: Make) -> None:
    told = []
    for number, weights in enumerate(["shared", "copied"]):
        settings = rl(*SEVERAL, f"rollout.weights={weights}", f"run={rl().run}-{number}", "duration=9 steps")
        train(settings)
        told.append([{k: v for k, v in event.items() if k not in ("time", "rollout/seconds")}
                     for event in events(settings, "rollout")])
    assert len(told[0]) == 3 and told[0] == told[1]


def test_a_copy_that_was_not_renewed_is_refused(rl: Make) -> None:
    with open_trainer(rl("rollout.weights=copied", "duration=3 steps")) as trainer:
        trainer.parts.source._gathering.sampler.sync = lambda: None
        with pytest.raises(UserError, match="does not hold the trainer's weights"):
            for _ in trainer.steps():
                pass


def test_every_answer_is_rewarded_once(rl: Make) -> None:
    toy_rewards.CALLS.clear()
    reward = "[{kind: function, function: 'tests.training.toy_rewards:counted', per: batch}]"
    train(rl(*SEVERAL, f"rollout.rewards={reward}", "duration=8 steps"))
    assert toy_rewards.CALLS == [16, 16]


def test_answers_without_a_reward_shape_no_group_and_are_not_learned(rl: Make) -> None:
    reward = "[{kind: function, function: 'tests.training.toy_rewards:sometimes'}]"
    settings = rl(f"rollout.rewards={reward}", "duration=1 steps", "precision=float64")
    with open_trainer(settings) as trainer:
        trainer.parts.source.batches(0)
        held = trainer.parts.source._held
    rollout = held.rollout
    odd = np.array([answer[0] % 2 == 1 for answer in rollout.answers])
    assert odd.any() and not odd.all()
    assert np.isnan(rollout.reward_R[odd]).all() and not np.isnan(rollout.reward_R[~odd]).any()
    for group in range(4):
        kept = (rollout.group_R == group) & ~odd
        reward_G = rollout.reward_R[kept]
        expected = (reward_G - reward_G.mean()) / (reward_G.std() + 1e-4) if len(reward_G) > 1 else [0.0]
        if len(reward_G) > 1 and reward_G.std() == 0.0:
            expected = np.zeros(len(reward_G))
        for number, value in zip(np.flatnonzero(kept), expected, strict=True):
            np.testing.assert_allclose(held.advantages[number], value, rtol=1e-12)


def test_groups_that_teach_nothing_are_replaced_by_the_next_prompts(rl: Make) -> None:
    reward = "rollout.rewards=[{kind: function, function: 'tests.training.toy_rewards:length'}]"
    plain = rl(reward, "duration=6 steps", "rollout.sampling.max_new_tokens=40")
    redrawn = rl(reward, "duration=6 steps", "rollout.sampling.max_new_tokens=40", "rollout.redraw=4",
                 f"run={plain.run}-redrawn")
    for recipe in (plain, redrawn):
        train(recipe)
    flat = [sum(event["rollout/flat_groups"] for event in events(recipe, "rollout")) for recipe in (plain, redrawn)]
    assert flat[1] < flat[0]
    epochs = [events(recipe, "step")[-1]["epochs"] for recipe in (plain, redrawn)]
    assert epochs[1] > epochs[0]


def test_a_step_whose_answers_have_no_reward_changes_no_weight_and_the_run_goes_on(rl: Make) -> None:
    toy_rewards.CALLS.clear()
    reward = "[{kind: function, function: 'tests.training.toy_rewards:away', per: batch}]"
    settings = rl(f"rollout.rewards={reward}", "duration=3 steps", "rollout.sampling.temperature=2.0")
    weights, skipped = [], []
    with open_trainer(settings) as trainer:
        for info in trainer.steps():
            weights.append([weight.detach().clone() for weight in trainer.parts.policy.parameters()])
            skipped.append(info.skipped)
    assert skipped == [False, True, False]
    assert all(map(torch.equal, weights[0], weights[1])) and not all(map(torch.equal, weights[1], weights[2]))
    assert [event["text"] for event in events(settings, "warning")] == [
        "no answer of this step can be learned from: the weights stay"
    ]
    steps = events(settings, "step")
    assert [event["step"] for event in steps] == [1, 2, 3] and steps[1]["skipped"]
    assert "unrewarded" in events(settings, "rollout")[1]["left_out"]


def test_a_run_whose_answers_teach_nothing_again_and_again_ends_and_says_so(rl: Make) -> None:
    reward = "rollout.rewards=[{kind: function, function: 'tests.training.toy_rewards:alike'}]"
    with pytest.raises(UserError, match="11 steps in a row, up to step 11, had no answer") as caught:
        train(rl(reward, "objective.skip_even_groups=true", "duration=20 steps"))
    assert "rollout.redraw" in str(caught.value.fix)


def test_an_answer_is_trained_by_the_ids_that_were_sampled(rl: Make) -> None:
    with open_trainer(rl("rollout.share_prompt=false")) as trainer:
        source = trainer.parts.source
        assert isinstance(source, RolloutSource)
        batches = source.batches(0)
        held = source._held
        assert held is not None
    learned = []
    for batch in batches:
        for sequence in range(batch.sequences):
            mine = (batch.sequence_BT == sequence) & (batch.weights_BT > 0)
            learned.append(tuple(batch.targets_BT[mine].tolist()))
    assert sorted(learned) == sorted(one.tokens for one in held.written)


def test_the_gradient_of_a_first_step_is_that_of_the_policy_gradient(rl: Make) -> None:
    with open_trainer(rl("precision=float64", "duration=1 steps")) as trainer:
        policy, source, objective = trainer.parts.policy, trainer.parts.source, trainer.parts.objective
        batches = source.batches(0)
        counts = count(batches)
        for batch in batches:
            loss_of(objective.terms(policy(batch, objective.wants), batch), counts).backward()
        found = {name: value.grad.clone() for name, value in policy.named_parameters()}
        policy.zero_grad()
        for batch in batches:
            logp_BT = policy(batch, ("logp",)).logp_BT
            for sequence in range(batch.sequences):
                mine = (batch.sequence_BT == sequence) & (batch.weights_BT > 0)
                advantage = batch.signals["advantage_BT"][mine]
                (-(advantage * logp_BT[mine]).mean() / 16).backward(retain_graph=True)
        for name, value in policy.named_parameters():
            torch.testing.assert_close(found[name], value.grad, **FLOAT64_TWO_WAYS)


def test_the_mean_reward_rises(rl: Make) -> None:
    settings = rl("duration=40 steps", "data.prompts_per_step=8", "rollout.group_size=8", "data.tokens_per_batch=2000",
                  "optim.schedule.peak=1e-2")
    told = stepped(settings)
    before, after = (np.mean([step["reward/mean"] for step in part]) for part in (told[:3], told[-3:]))
    assert after - before >= 0.3


def test_settings_that_cannot_work_are_refused_by_name(rl: Make) -> None:
    wrong = {
        "rollout.rewards=[]": "nothing says what an answer is worth",
        "rollout.answers_per_step=6": "does not divide a rollout",
        "rollout.sampling.repetition_penalty=1.2": "repetition_penalty",
        "objective.kind=causal_lm": "prompts alone have no answers",
        "objective={kind: grpo, kl: 0.1, correction: {bypass: true, weights: token}}": "weighs a gap",
        "objective.correction={reject: token, bounds: [2.0, 0.5]}": "lets nothing stay",
        "objective={kind: grpo, loss: vespo, level: token}": "objective.level does nothing",
    }
    for override, message in wrong.items():
        with pytest.raises(UserError, match=message):
            train(rl(override))


PPO = ("objective={kind: ppo, kl: 0.02, value_weight: 0.5}", "model.head={kind: value}", *SEVERAL)


def test_ppo_has_the_ratio_1_at_first_and_teaches_its_critic(rl: Make) -> None:
    told = stepped(rl(*PPO, "duration=24 steps", "optim.schedule.peak=1e-2"))
    assert told[0]["policy/ratio"] == 1.0
    errors = [step["loss/value"] for step in told]
    assert np.mean(errors[-4:]) < 0.5 * np.mean(errors[:4])


@pytest.mark.parametrize("trunk", ["own", "shared"])
def test_ppo_is_resumed_to_the_bit(rl: Make, trunk: str) -> None:
    wanted = (*PPO, f"model.head.trunk={trunk}", "objective.rewards=running", "objective.kl_target=0.1")
    straight = rl(*wanted, "duration=6 steps")
    train(straight)
    resumed = ("optim.schedule.length=6 steps", f"run={straight.run}-resumed")
    for duration in ("3 steps", "6 steps"):
        train(rl(*wanted, *resumed, f"duration={duration}"))
    both = [read_manifest(Path(run) / "checkpoints" / "step-00000006")["files"]
            for run in (straight.run, f"{straight.run}-resumed")]
    assert both[0].keys() == both[1].keys()
    for name, facts in both[0].items():
        if name.endswith(".safetensors"):
            assert facts["sha256"] == both[1][name]["sha256"], name


def test_the_cost_of_divergence_that_a_rollout_leads_to_is_that_of_the_next_one(rl: Make, world: Path) -> None:
    other = Llama(hidden_size=32, layers=2, heads=2, kv_heads=1, intermediate_size=64, context_length=64).build(320)
    other.initialise(10)
    folder = Path(rl().run).parent / "other"
    save_weights(other, folder)
    load_tokenizer(world / "tokenizer").save(folder)
    beside = (*PPO, "objective.kl=0.5", f"reference.start_from={folder}", "duration=5 steps")
    fixed = rl(*beside)
    moving = rl(*beside, "objective.kl_target=1000", "objective.kl_horizon=16", f"run={fixed.run}-moving")
    first, second = ([step["value/return"] for step in stepped(recipe)] for recipe in (fixed, moving))
    assert first[:4] == second[:4] and first[4] != second[4]    # a rollout is learned in four steps


def test_without_divergence_no_reference_is_built(rl: Make) -> None:
    with open_trainer(rl(*PPO, "objective.kl=0", "duration=1 steps")) as trainer:
        assert trainer.parts.source._reference is None
        for _ in trainer.steps():
            pass


def test_pretraining_beside_reinforcement_adds_its_gradient(rl: Make, world: Path) -> None:
    beside = f"beside={{kind: documents, train: {world}/store, sequence_length: 32, sequences_per_step: 3}}"

    def gradients(*overrides: str) -> dict[str, torch.Tensor]:
        with open_trainer(rl("precision=float64", "duration=1 steps", *overrides)) as trainer:
            policy, objective = trainer.parts.policy, trainer.parts.objective
            batches = trainer.parts.source.batches(0)
            counts = count(batches)
            for batch in batches:
                loss_of(objective.terms(policy(batch, objective.wants), batch), counts).backward()
            return {name: value.grad.clone() for name, value in policy.named_parameters()}

    alone = gradients()
    mixed = {
        weight: gradients(
            f"objective={{kind: mix, main: {{kind: grpo}}, weight: {weight}}}", beside, f"run={rl().run}-{weight}"
        )
        for weight in (0.0, 0.5, 1.0)
    }
    for name, value in alone.items():
        assert torch.equal(mixed[0.0][name], value), name
        torch.testing.assert_close(mixed[1.0][name] - value, 2 * (mixed[0.5][name] - value), **FLOAT64_TWO_WAYS)
    assert any(not torch.equal(mixed[1.0][name], value) for name, value in alone.items())


def test_rows_beside_and_an_objective_beside_belong_together(rl: Make, world: Path) -> None:
    with pytest.raises(UserError, match="nothing says what that learns"):
        train(rl("objective={kind: mix, main: {kind: grpo}}"))
    with pytest.raises(UserError, match="has none beside it"):
        train(rl(f"beside={{kind: documents, train: {world}/store, sequence_length: 32}}"))


def test_the_reference_follows_the_policy_by_its_share_after_every_rollout(rl: Make) -> None:
    wanted = ("objective.kl=0.1", "rollout.mix_reference=0.25", "optim.schedule.peak=1e-2")
    with open_trainer(rl(*wanted, "duration=3 steps")) as trainer:
        policy, following = trainer.parts.policy, trainer.parts.source._following
        expected = {name: value.clone() for name, value in following.reference.named_parameters()}
        for _ in trainer.steps():
            if trainer.progress.step < 3:
                for name, value in policy.named_parameters():
                    expected[name] = 0.75 * expected[name] + 0.25 * value.detach()
        for name, value in following.reference.named_parameters():
            torch.testing.assert_close(value, expected[name], rtol=0, atol=FOLLOWED_WEIGHT)


def test_a_reference_that_moved_is_there_again_after_a_resume(rl: Make) -> None:
    wanted = ("objective.kl=0.1", "rollout.mix_reference=0.25", "optim.schedule.peak=1e-2")
    straight = rl(*wanted, "duration=4 steps")
    told = stepped(straight)
    resumed = ("optim.schedule.length=4 steps", f"run={straight.run}-resumed")
    train(rl(*wanted, *resumed, "duration=2 steps"))
    assert [step["loss/kl"] for step in stepped(rl(*wanted, *resumed))] == [step["loss/kl"] for step in told[2:]]


def test_held_out_prompts_are_answered_and_never_learned(rl: Make) -> None:
    wanted = ("data.held_out=0.4", "evaluate.every=1 steps", "duration=2 steps")
    settings = rl(*wanted)
    plain = stepped(rl("data.held_out=0.4", "duration=2 steps", f"run={settings.run}-plain"))
    told = stepped(settings)
    found = events(settings, "evaluate")
    assert [step["loss"] for step in told] == [step["loss"] for step in plain]
    assert len(found) == 2 and all(0.0 <= event["held_out/reward"] <= 1.0 for event in found)
    with open_trainer(rl(*wanted, f"run={settings.run}-again")) as trainer:
        prompts = trainer.parts.source._prompts
        (examine,) = trainer.parts.evaluate.__self__._examined.values()
        asked = {tuple(prompts.prompt(draw).tokens) for draw in range(len(prompts))}
        held = {tuple(examine.args[0].prompt(draw).tokens) for draw in examine.args[0].draws(0)}
        assert held and not asked & held
