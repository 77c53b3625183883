"""Runs that learn from a teacher: what it says, that it stays, and whom nobody may learn from."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from llmtrainer.base.config import load
from llmtrainer.base.errors import UserError
from llmtrainer.core.batch import TEACHER_IDS, TEACHER_LOGP, TEACHER_TEMPERATURE
from llmtrainer.models.families.llama import Llama
from llmtrainer.models.weights import load_policy, save_weights
from llmtrainer.tokenizer.tokenizer import FileTokenizer, load_tokenizer
from llmtrainer.training.checkpoint import read_manifest
from llmtrainer.training.recipe import Recipe
from llmtrainer.training.run import open_trainer, train
from tests.tolerances import FLOAT64_RUN, FLOAT64_TWO_WAYS
from tests.training.conftest import conversations

Make = Callable[..., Recipe]


def model(world: Path, folder: Path, seed: int, hidden: int = 32, std: float = 0.02, rows: int = 320) -> Path:
    policy = Llama(
        hidden_size=hidden, layers=2, heads=2, intermediate_size=64, context_length=256, init_std=std
    ).build(rows)
    policy.initialise(seed)
    save_weights(policy, folder)
    load_tokenizer(world / "tokenizer").save(folder)
    return folder


@pytest.fixture
def make(world: Path, tmp_path: Path) -> Make:
    """A recipe that distils conversations: make("duration=4 steps"). The teacher is larger, and surer of itself."""
    model(world, tmp_path / "student", 9)
    model(world, tmp_path / "teacher", 3, hidden=48, std=0.1)
    (tmp_path / "chats.jsonl").write_text("".join(json.dumps(record) + "\n" for record in conversations(16)))
    (tmp_path / "prompts.jsonl").write_text(
        "".join(json.dumps({"prompt": record["instruction"]}) + "\n" for record in conversations(12))
    )
    (tmp_path / "distill.yaml").write_text(f"""\
run: {tmp_path}/run
model: {{start_from: {tmp_path}/student}}
tokenizer: {world}/tokenizer
teacher: {{start_from: {tmp_path}/teacher, top_k: 16}}
cache: {tmp_path}/cache
data: {{kind: examples, train: {tmp_path}/chats.jsonl, template: alpaca, sequence_length: 256, tokens_per_batch: 512,
  sequences_per_step: 8, workers: 1}}
objective: {{kind: distill, coefficient: 1.0}}
optim: {{schedule: {{kind: constant, peak: 1e-2, warmup: 0 steps}}}}
precision: float32
duration: 4 steps
save: {{every: never}}
seed: 5
""")
    return lambda *overrides: load(Recipe, tmp_path / "distill.yaml", overrides=overrides)


OWN_ANSWERS = (
    "data={kind: prompts, train: FOLDER/prompts.jsonl, template: completion, prompts_per_step: 4, "
    "tokens_per_batch: 200}",
    "rollout.group_size=2", "rollout.sampling.max_new_tokens=6",
)  # fmt: skip


def own_answers(make: Make, *overrides: str) -> Recipe:
    folder = str(Path(make().run).parent)
    return make(*(item.replace("FOLDER", folder) for item in OWN_ANSWERS), *overrides)


def stepped(recipe: Recipe) -> list[float]:
    with open_trainer(recipe) as trainer:
        return [info.loss for info in trainer.steps()]


@pytest.mark.parametrize("divergence", ["forward_kl", "jensen_shannon"])
def test_a_run_comes_near_its_teacher(make: Make, divergence: str) -> None:
    losses = stepped(make("duration=20 steps", f"objective.divergence={divergence}", "objective.temperature=2.0"))
    assert losses[-1] < 0.5 * losses[0]


@pytest.mark.parametrize("divergence", ["forward_kl", "reverse_kl", "jensen_shannon"])
def test_of_itself_a_policy_is_0_away(make: Make, tmp_path: Path, divergence: str) -> None:
    itself = f"teacher.start_from={tmp_path}/student"
    with open_trainer(make(itself, f"objective.divergence={divergence}", "precision=float64")) as trainer:
        first = next(iter(trainer.steps()))
    assert abs(first.loss) < FLOAT64_TWO_WAYS["atol"] and first.grad_norm < FLOAT64_RUN
    assert first.metrics["distill/agreement"] == 1.0


def test_the_teacher_says_the_likeliest_ids_of_its_softmax_at_the_objectives_temperature(
    make: Make, tmp_path: Path
) -> None:
    with open_trainer(make("objective.temperature=2.0", "precision=float64")) as trainer:
        batch = trainer.parts.source.batches(0)[0]
        (annotate,) = trainer.parts.annotators
        told = annotate(batch).signals
        read = load_policy(tmp_path / "teacher", torch.float64).eval()
        with torch.no_grad():
            dense = (read.hidden(batch) @ read.head_weight.t() / 2.0).log_softmax(-1)
    counts = batch.weights_BT > 0
    best = dense.topk(16, dim=-1)
    assert torch.equal(told[TEACHER_IDS][counts], best.indices[counts])
    torch.testing.assert_close(told[TEACHER_LOGP][counts], best.values[counts], **FLOAT64_TWO_WAYS)
    assert float(told[TEACHER_TEMPERATURE]) == 2.0 and not told[TEACHER_LOGP][~counts].any()


@pytest.mark.parametrize("where", ["rows", "own"])
def test_a_distilled_run_that_goes_on_ends_with_the_bits_of_one_that_never_stopped(make: Make, where: str) -> None:
    made = make if where == "rows" else lambda *more: own_answers(make, "rollout.epochs=2", *more)
    straight = made("duration=5 steps")
    train(straight)
    for duration in ("3 steps", "5 steps"):
        train(made(f"run={straight.run}-again", "optim.schedule.length=5 steps", f"duration={duration}"))
    both = [
        read_manifest(Path(run) / "checkpoints" / "step-00000005") for run in (straight.run, f"{straight.run}-again")
    ]
    for name in ("model.safetensors", "optimizer.safetensors"):
        assert both[0]["files"][name]["sha256"] == both[1]["files"][name]["sha256"], name
    assert both[0]["teacher_sha256"] == both[1]["teacher_sha256"] and len(both[0]["teacher_sha256"]) == 64


def test_a_policy_learns_from_what_the_teacher_says_of_its_own_answers(make: Make) -> None:
    settings = own_answers(make, "duration=20 steps", "objective.divergence=reverse_kl")
    losses = stepped(settings)
    assert sum(losses[-3:]) < 0.6 * sum(losses[:3])
    told = [json.loads(line) for line in (Path(settings.run) / "events.jsonl").read_text().splitlines()]
    rollouts = [event for event in told if event["kind"] == "rollout"]
    assert len(rollouts) == 20 and not any(name.startswith("reward") for name in rollouts[0])


def test_a_teacher_that_was_changed_meanwhile_is_refused(make: Make, world: Path, tmp_path: Path) -> None:
    train(make("duration=2 steps"))
    model(world, tmp_path / "teacher", 4, hidden=48, std=0.1)
    with pytest.raises(UserError, match="the teacher changed"):
        train(make())


def test_a_teacher_may_have_rows_of_padding_that_the_policy_has_not(make: Make, world: Path, tmp_path: Path) -> None:
    model(world, tmp_path / "teacher", 3, rows=384)
    with open_trainer(make("teacher.top_k=320")) as trainer:
        (annotate,) = trainer.parts.annotators
        assert int(annotate(trainer.parts.source.batches(0)[0]).signals[TEACHER_IDS].max()) < 320
        assert all(info.loss < float("inf") for info in trainer.steps())


def test_a_teacher_that_speaks_of_other_ids_is_refused_by_name(make: Make, tmp_path: Path) -> None:
    path = tmp_path / "teacher" / "tokenizer.json"
    described = json.loads(path.read_text())
    words = described["model"]["vocab"]
    one, other = [name for name in words if len(name) > 1][-2:]
    words[one], words[other] = words[other], words[one]
    path.write_text(json.dumps(described))
    assert isinstance(load_tokenizer(path.parent), FileTokenizer)
    with pytest.raises(UserError, match="another tokenizer") as caught:
        train(make())
    assert one in str(caught.value) and other in str(caught.value)


@pytest.mark.parametrize(
    ("settings", "why"),
    [
        (["teacher={}"], "none is named"), (["teacher.start_from=runs/nowhere"], "nowhere"),
        (["teacher.top_k=321"], "there are 320 ids"), (["objective={kind: causal_lm}"], "nothing read it"),
    ],
)  # fmt: skip
def test_what_cannot_teach_is_refused(make: Make, settings: list[str], why: str) -> None:
    with pytest.raises(UserError, match=why):
        train(make(*settings))


@pytest.mark.parametrize(
    ("settings", "why"),
    [
        (["objective.coefficient=0.5"], "imitate its own answers"), (["rollout.redraw=1"], "asks for no reward"),
        (["rollout.rewards=[{kind: numeric}]"], "asks for no reward"), (["teacher.cached=true"], "nothing read it"),
    ],
)  # fmt: skip
def test_what_means_nothing_for_own_answers_is_refused(make: Make, settings: list[str], why: str) -> None:
    with pytest.raises(UserError, match=why):
        train(own_answers(make, *settings))
