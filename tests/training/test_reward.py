"""Runs that train a reward model: it learns, is saved, goes on, and tells the spread of its gaps."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from llmtrainer.base.config import load
from llmtrainer.base.errors import UserError
from llmtrainer.base.events import read_events, steps
from llmtrainer.base.rundir import RunDir
from llmtrainer.core.randomness import derive
from llmtrainer.models.decoder import Decoder
from llmtrainer.training.check import check
from llmtrainer.training.models import load_model
from llmtrainer.training.recipe import Recipe
from llmtrainer.training.run import train
from tests.tolerances import FLOAT64_RUN
from tests.training.pairs import make_pairs

RECIPE = """\
model: {{hidden_size: 32, layers: 2, heads: 2, intermediate_size: 64, context_length: 32, head: {{kind: score}}}}
tokenizer: {world}/tokenizer
data: {{kind: tests.training.pairs.Pairs, path: {pairs}, sequence_length: 32}}
objective: {{kind: reward}}
optim: {{schedule: {{peak: 3e-3, warmup: 0 steps}}}}
precision: float32
duration: 6 steps
"""

Make = Callable[..., Recipe]


@pytest.fixture(scope="module")
def pairs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_pairs(tmp_path_factory.mktemp("pairs"))


@pytest.fixture
def reward(world: Path, pairs: Path, tmp_path: Path) -> Make:
    path = tmp_path / "recipe.yaml"
    path.write_text(RECIPE.format(world=world, pairs=pairs))
    return lambda name, *overrides: load(Recipe, path, [f"run={tmp_path / name}", *overrides])


def test_a_planted_preference_is_learned_in_far_fewer_than_200_steps(reward: Make, tmp_path: Path) -> None:
    result = train(reward("run", "duration=40 steps", "save.every=never"))
    assert result.figures["held_out/preference/accuracy"] > 0.95
    first = next(iter(steps(tmp_path / "run" / "events.jsonl")))
    assert first["preference/accuracy"] < 0.95 < 1.0 < first["loss"] / result.figures["held_out/loss"]


def test_evaluations_tell_mean_deviation_and_quantiles_of_the_gaps_and_draw_them(reward: Make, tmp_path: Path) -> None:
    result = train(reward("run", "duration=4 steps", "evaluate.every=2 steps", "log.spread=true"))
    plots = tmp_path / "run" / "plots"
    assert sorted(path.name for path in plots.iterdir()) == [
        f"held_out-gap-step-0000000{step}.{ending}" for step in (2, 4) for ending in ("json", "png")
    ]
    assert (plots / "held_out-gap-step-00000004.png").read_bytes().startswith(b"\x89PNG")
    told = json.loads((plots / "held_out-gap-step-00000004.json").read_text())
    gaps = np.array(told["values"])
    assert told["step"] == 4 and len(gaps) == 100
    figures = {name.rpartition("/")[2]: value for name, value in result.figures.items() if "/gap/" in name}
    wanted = {
        "mean": gaps.mean(), "std": gaps.std(), "p5": np.percentile(gaps, 5), "p25": np.percentile(gaps, 25),
        "median": np.median(gaps), "p75": np.percentile(gaps, 75), "p95": np.percentile(gaps, 95),
    }  # fmt: skip
    assert figures == pytest.approx(wanted) and gaps.std() > 0
    assert result.figures["held_out/preference/margin"] == pytest.approx(gaps.mean(), rel=1e-5)
    assert result.figures["held_out/preference/accuracy"] == pytest.approx(float((gaps > 0).mean()))
    lines = [json.loads(line) for line in (tmp_path / "run" / "spread.jsonl").read_text().splitlines()]
    means = {event["step"]: event["preference/margin"] for event in steps(tmp_path / "run" / "events.jsonl")}
    assert [line["step"] for line in lines] == [1, 2, 3, 4] and all(len(line["gap"]) == 8 for line in lines)
    assert [np.mean(line["gap"]) for line in lines] == pytest.approx(list(means.values()), rel=1e-5)


def test_gaps_are_written_only_where_there_are_any(reward: Make, tmp_path: Path) -> None:
    train(reward("run", "duration=1 steps"))
    assert not (tmp_path / "run" / "spread.jsonl").exists()
    with pytest.raises(UserError, match="has no numbers to write"):
        train(reward("other", "log.spread=true", "objective={kind: ordinal}", "model.head={kind: ordinal, classes: 4}"))


def test_a_run_that_was_stopped_goes_on_to_the_same_weights(reward: Make, tmp_path: Path) -> None:
    overrides = ("data.pairs_per_batch=3", "optim.schedule.length=4 steps")
    train(reward("whole", "duration=4 steps", *overrides))
    train(reward("parts", "duration=2 steps", *overrides))
    train(reward("parts", "duration=4 steps", *overrides))
    whole, parts = (
        load_file(RunDir(tmp_path / name).newest_checkpoint() / "model.safetensors") for name in ("whole", "parts")
    )
    assert set(whole) == set(parts) and "score.weight" in whole and "lm_head.weight" not in whole
    assert all(torch.equal(whole[name], parts[name]) for name in whole)


def test_a_checkpoint_is_a_reward_model_for_transformers(reward: Make, tmp_path: Path) -> None:
    transformers = pytest.importorskip("transformers", reason="it is what others load the checkpoint with")
    train(reward("run"))
    folder = RunDir(tmp_path / "run").newest_checkpoint()
    model = transformers.AutoModelForSequenceClassification.from_pretrained(folder).eval()
    ours = load_model(tmp_path / "run")
    assert isinstance(ours, Decoder) and torch.equal(model.score.weight, ours.score.weight)    # type: ignore[union-attr]


def test_the_head_learns_at_its_own_rate(reward: Make, tmp_path: Path) -> None:
    def moved(name: str, *overrides: str) -> tuple[float, float]:
        """How far the head and a matrix have come in one step of a rule that moves everything by the rate."""
        run = reward(name, "duration=1 steps", "optim.rule={kind: lion, weight_decay: 0.0}", *overrides)
        first = run.model.build(320)
        assert isinstance(first, Decoder)
        train(run)
        now = load_file(RunDir(tmp_path / name).newest_checkpoint() / "model.safetensors")
        first.initialise(derive(run.seed, "initialise"))
        before = dict(first.named_parameters())
        head, matrix = "score.weight", "model.layers.0.mlp.up_proj.weight"
        return tuple(float((now[n] - before[n].detach()).abs().max()) for n in (head, matrix))    # type: ignore[return-value]

    plain = moved("plain")
    fast = moved("fast", "optim.groups=[{match: 'score.*', rate: 10, decay: 0}]")
    assert plain[0] == pytest.approx(plain[1], rel=1e-3)
    assert fast[0] == pytest.approx(10 * plain[0], rel=1e-3) and fast[1] == pytest.approx(plain[1], rel=1e-3)


def test_a_head_that_begins_at_0_costs_log_2_at_the_first_step(reward: Make, tmp_path: Path) -> None:
    train(reward("run", "duration=1 steps", "model.head.init=zero"))
    (first,) = steps(tmp_path / "run" / "events.jsonl")
    assert first["loss/reward"] == pytest.approx(np.log(2), abs=1e-6)
    assert first["reward/chosen"] == 0.0 == first["preference/accuracy"]


def test_graded_answers_are_learned_by_ordinal_regression(reward: Make, tmp_path: Path) -> None:
    result = train(reward(
        "run", "duration=60 steps", "objective={kind: ordinal}", "model.head={kind: ordinal, classes: 4}",
        "save.every=never",
    ))  # fmt: skip
    assert result.figures["held_out/ordinal/accuracy"] > 0.95
    policy = load_model(tmp_path / "run")
    assert isinstance(policy, Decoder) and policy.score is not None and policy.score.cut_points_K is not None
    assert bool((policy.score.cut_points_K.diff() > 0).all())


@pytest.mark.parametrize(
    ("overrides", "told"),
    [
        (["model.head=null"], "needs a model with a head of the kind `score`"),
        (["objective.kind=ordinal"], "needs a model with a head of the kind `ordinal`"),
        (["objective.kind=causal_lm"], "asks a head of the kind `score` for nothing"),
    ],
)
def test_an_objective_and_a_head_that_do_not_belong_together_are_refused(
    reward: Make, overrides: list[str], told: str
) -> None:
    with pytest.raises(UserError, match=told):
        train(reward("run", *overrides))


def test_a_trained_model_gets_a_head_and_a_reward_model_keeps_its_own(reward: Make, tmp_path: Path) -> None:
    """From a language model; on from the reward model; and no second head over the first."""
    base = reward("base", "model.head=null", "objective.kind=causal_lm", "duration=1 steps")
    train(base)
    start = [f"model={{start_from: {tmp_path / 'base'}, head: {{kind: score, scale: 0.1}}}}", "duration=2 steps"]
    train(reward("first", *start))
    first = load_model(tmp_path / "first")
    again = f"model={{start_from: {tmp_path / 'first'}}}"
    train(reward("second", again, "duration=1 steps", "optim.schedule.peak=1e-9"))
    second = load_model(tmp_path / "second")
    assert isinstance(first, Decoder) and isinstance(second, Decoder)
    assert first.score is not None and second.score is not None
    assert float(first.score.weight.detach().std()) == pytest.approx(0.1 / 33**0.5, rel=0.5)
    assert torch.allclose(first.score.weight, second.score.weight, atol=1e-7)
    with pytest.raises(UserError, match=r"`model\.head\.scale` was set and nothing read it"):
        train(reward("third", f"model={{start_from: {tmp_path / 'first'}, head: {{kind: score, scale: 0.1}}}}"))
    with pytest.raises(UserError, match="has a head of the kind `score` already"):
        train(reward(
            "fourth", f"model={{start_from: {tmp_path / 'first'}, head: {{kind: ordinal, classes: 3}}}}",
            "objective.kind=ordinal",
        ))  # fmt: skip
    with pytest.raises(UserError, match="asks which token follows"):
        train(reward("fifth", again, "objective.kind=causal_lm"))


def test_adapters_and_a_head_are_trained_saved_and_continued_together(reward: Make, tmp_path: Path) -> None:
    train(reward("base", "model.head=null", "objective.kind=causal_lm", "duration=1 steps"))
    model = f"model={{start_from: {tmp_path / 'base'}, adapter: {{kind: lora, rank: 4}}, head: {{kind: score}}}}"
    train(reward("whole", model, "save.every=2 steps", "duration=4 steps"))
    folder = RunDir(tmp_path / "whole").newest_checkpoint()
    stored = load_file(folder / "adapter_model.safetensors")
    config = json.loads((folder / "adapter_config.json").read_text())
    assert config["task_type"] == "SEQ_CLS" and config["modules_to_save"] == ["score"]
    assert stored["base_model.model.score.weight"].shape == (1, 32) and not (folder / "model.safetensors").exists()
    opened = load_model(tmp_path / "whole")
    assert isinstance(opened, Decoder) and opened.score is not None and not opened.worded
    assert torch.equal(opened.score.weight, stored["base_model.model.score.weight"])
    events = read_events(tmp_path / "whole" / "events.jsonl")
    assert len([event for event in events if event["kind"] == "step"]) == 4


def test_a_critic_of_its_own_is_a_folder_within_the_checkpoint(reward: Make, tmp_path: Path, world: Path) -> None:
    """An objective that asks for values trains policy and critic; both are there again when the run goes on."""
    head = "model.head={kind: value, trunk: own}"
    settings = (head, "objective.kind=tests.training.valued.Valued", "save.every=2 steps")
    train(reward("whole", *settings, "duration=4 steps"))
    folder = RunDir(tmp_path / "whole").newest_checkpoint()
    policy, critic = (load_model(path) for path in (folder, folder / "critic"))
    assert isinstance(policy, Decoder) and isinstance(critic, Decoder)
    assert policy.worded and policy.score is None and critic.score is not None and not critic.worded
    (tmp_path / "parts").mkdir()
    train(reward("parts", *settings, "duration=2 steps", "optim.schedule.length=4 steps"))
    train(reward("parts", *settings, "duration=4 steps", "optim.schedule.length=4 steps"))
    other = RunDir(tmp_path / "parts").newest_checkpoint()
    for name in ("model.safetensors", "critic/model.safetensors"):
        assert (folder / name).read_bytes() == (other / name).read_bytes(), name


def test_a_shared_trunk_has_both_heads_and_the_policy_still_writes(reward: Make, tmp_path: Path) -> None:
    head = "model.head={kind: value, trunk: shared}"
    train(reward("run", head, "objective.kind=tests.training.valued.Valued", "duration=2 steps"))
    policy = load_model(tmp_path / "run")
    assert isinstance(policy, Decoder) and policy.worded and policy.score is not None
    assert policy.cache(1, 4) is not None


def test_a_dry_run_of_a_reward_model_passes(reward: Make) -> None:
    found = check(reward("run"))
    names = ["data", "plan", "steps", "memory", "save", "evaluate", "resume"]
    assert [item.name for item in found.checks if item.ok] == names


def test_how_a_step_is_cut_into_micro_batches_changes_no_loss(reward: Make, tmp_path: Path) -> None:
    for name, pairs in (("whole", 8), ("cut", 3)):
        train(reward(name, "duration=3 steps", "precision=float64", f"data.pairs_per_batch={pairs}"))
    whole, cut = ([event["loss"] for event in steps(tmp_path / name / "events.jsonl")] for name in ("whole", "cut"))
    assert whole == pytest.approx(cut, rel=FLOAT64_RUN)


def test_adapters_of_a_policy_and_a_critic_of_its_own_go_on_together(reward: Make, tmp_path: Path) -> None:
    """The critic begins as a reward model; the adapter alone stands for the policy."""
    train(reward("base", "model.head=null", "objective.kind=causal_lm", "duration=1 steps"))
    train(reward("judge", f"model={{start_from: {tmp_path / 'base'}, head: {{kind: score}}}}", "duration=1 steps"))
    head = f"head: {{kind: value, start_from: {tmp_path / 'judge'}}}"
    model = f"model={{start_from: {tmp_path / 'base'}, adapter: {{kind: lora, rank: 2}}, {head}}}"
    settings = (model, "objective.kind=tests.training.valued.Valued", "optim.schedule.length=4 steps")
    train(reward("whole", *settings, "duration=4 steps"))
    train(reward("parts", *settings, "duration=2 steps"))
    train(reward("parts", *settings, "duration=4 steps"))
    whole, parts = (RunDir(tmp_path / name).newest_checkpoint() for name in ("whole", "parts"))
    for name in ("adapter_model.safetensors", "critic/model.safetensors"):
        assert (whole / name).read_bytes() == (parts / name).read_bytes(), name
    began, now = (load_model(path) for path in (tmp_path / "judge", whole / "critic"))
    assert isinstance(began, Decoder) and isinstance(now, Decoder) and began.score is not None and now.score is not None
    moved = float((began.score.weight - now.score.weight).detach().abs().max())
    assert 0 < moved < 0.1      # a new head would be elsewhere altogether


def test_a_class_of_transformers_is_trained_as_a_reward_model_and_continued(reward: Make, tmp_path: Path) -> None:
    transformers = pytest.importorskip("transformers", reason="its class is what is trained")
    torch.manual_seed(0)
    config = transformers.GPT2Config(
        n_embd=32, n_layer=2, n_head=4, vocab_size=320, n_positions=64, attn_pdrop=0.0, embd_pdrop=0.0, resid_pdrop=0.0
    )
    transformers.GPT2LMHeadModel(config).save_pretrained(tmp_path / "base")
    model = f"model={{kind: hf, start_from: {tmp_path / 'base'}, head: {{kind: score}}}}"
    settings = (model, "optim.schedule.length=12 steps", "optim.schedule.peak=1e-2")
    train(reward("whole", *settings, "duration=12 steps"))
    train(reward("parts", *settings, "duration=6 steps"))
    result = train(reward("parts", *settings, "duration=12 steps"))
    assert result.figures["held_out/preference/accuracy"] > 0.8
    whole, parts = (RunDir(tmp_path / name).newest_checkpoint() for name in ("whole", "parts"))
    assert (whole / "model.safetensors").read_bytes() == (parts / "model.safetensors").read_bytes()
    assert json.loads((whole / "config.json").read_text())["architectures"] == ["GPT2ForSequenceClassification"]


def test_a_moving_average_of_policy_and_critic_is_kept_and_continued(reward: Make, tmp_path: Path) -> None:
    settings = (
        "model.head={kind: value}", "objective.kind=tests.training.valued.Valued", "optim.ema.decay=0.5",
        "optim.schedule.length=4 steps",
    )  # fmt: skip
    train(reward("whole", *settings, "duration=4 steps"))
    train(reward("parts", *settings, "duration=2 steps"))
    train(reward("parts", *settings, "duration=4 steps"))
    whole, parts = (RunDir(tmp_path / name).newest_checkpoint() for name in ("whole", "parts"))
    for name in ("ema/model.safetensors", "ema/critic/model.safetensors"):
        assert (whole / name).read_bytes() == (parts / name).read_bytes(), name
    assert (whole / "ema/critic/model.safetensors").read_bytes() != (whole / "critic/model.safetensors").read_bytes()
