"""The policy-gradient surrogate: by hand, against its formulas in numpy, its slopes, and what its averages ignore."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace

import numpy as np
import pytest
import torch
from torch import Tensor

from llmtrainer.core.batch import ADVANTAGE, OLD, REFERENCE, ROLLOUT, Batch, Outputs
from llmtrainer.core.objective import count, loss_of
from llmtrainer.objectives.grpo import GRPO, PRESETS
from tests.objectives.comparisons import Sides, answers, per_unit, placed
from tests.objectives.rollouts import rollout_of
from tests.tolerances import FLOAT64_LOGITS


def settings(**fields: object) -> GRPO:
    return GRPO.model_validate(fields)


Rows = list[list[float]]
LOGP: Rows = [[-1.0, -1.2], [-0.5, -0.6, -0.7, -0.8]]
OLDS: Rows = [[-1.1, -1.1], [-0.6] * 4]


def step(logp: Rows, old: Rows, advantage: list[float], **signals: Rows) -> Sides:
    out, batch = answers(logp)
    each = [[value] * len(row) for value, row in zip(advantage, logp, strict=True)]
    told = {OLD: placed(old, batch), ADVANTAGE: placed(each, batch)}
    return out, replace(batch, signals={**told, **{name: placed(rows, batch) for name, rows in signals.items()}})


@pytest.mark.parametrize(("fields", "expected"), [
    # Tokens: -e^.1, -e^-.1 of the first answer, e^.1, 1, e^-.1, e^-.2 of the second.
    ({"loss": "grpo"}, (-2.0100083 / 2 + 3.8287392 / 4) / 2),
    ({"loss": "bnpo"}, (-2.0100083 + 3.8287392) / 6),
    ({"loss": "dr_grpo", "max_new_tokens": 8}, (-2.0100083 + 3.8287392) / 16),
    # Mean log-ratios 0 and -0.05.
    ({"loss": "grpo", "level": "sequence"}, (-1 + 0.9512294) / 2),
    ({"loss": "bnpo", "level": "sequence"}, (-2 + 4 * 0.9512294) / 6),
    ({"loss": "dr_grpo", "level": "sequence", "max_new_tokens": 8}, (-2 + 4 * 0.9512294) / 16),
    ({"loss": "luspo", "clip_low": 0.2, "clip_high": 0.28}, (-2 + 4 * 0.9512294) / 2),
    # Sums of log-ratios 0 and -0.2.
    ({"loss": "rloo"}, (-1 + 0.8187308) / 2),
])  # fmt: skip
def test_the_surrogate_of_two_answers_by_hand(fields: dict[str, object], expected: float) -> None:
    wide = {"clip_low": 0.2, "clip_high": 0.28, **fields}
    found = per_unit(settings(**wide), step(LOGP, OLDS, [1.0, -1.0]))
    assert found["loss/policy"] == pytest.approx(expected, abs=5e-8)


def test_the_divergence_from_the_reference_by_hand() -> None:
    # The reference gives every token 0.3 nats more: e^.3 - .3 - 1 = 0.0498588, however it is averaged.
    further = [[value + 0.3 for value in row] for row in LOGP]
    sides = step(LOGP, OLDS, [1.0, -1.0], **{REFERENCE: further})
    for fields in ({"loss": "grpo"}, {"loss": "bnpo"}, {"loss": "gspo"}):
        assert per_unit(settings(kl=0.1, **fields), sides)["loss/kl"] == pytest.approx(0.0498588, abs=5e-8)
    assert per_unit(settings(kl=0.1, kl_estimator="k2"), sides)["loss/kl"] == pytest.approx(0.045)
    out, batch = sides
    with_kl, without = (loss_of(settings(kl=weight).terms(out, batch), count([batch])) for weight in (0.1, 0.0))
    assert float((with_kl - without).detach()) == pytest.approx(0.00498588, abs=5e-9)
    assert settings().reads == (OLD, ADVANTAGE) and settings(kl=0.1).reads == (OLD, ADVANTAGE, REFERENCE)


def restated(kind: str, r: np.ndarray, log_w: float, a: float, logp: np.ndarray) -> np.ndarray:
    """What each token of one answer costs, from the papers' formulas; r at its level."""
    low, high = PRESETS[kind].clip_low, PRESETS[kind].clip_high
    match kind:
        case "cispo":
            return -np.minimum(r, 1 + high) * a * logp
        case "sapo":
            t = 1.0 if a > 0 else 1.05
            return -4 / t / (1 + np.exp(-t * (r - 1))) * a
        case "vespo":
            k, rate = (2.0, 3.0) if a >= 0 else (3.0, 2.0)
            w = math.exp(log_w)
            return -math.exp(rate) * w**k * math.exp(-rate * w) * a * logp
        case _:
            return -np.minimum(r * a, np.clip(r, 1 - low, 1 + high) * a)


@pytest.mark.parametrize("kind", sorted(PRESETS))
def test_every_method_is_its_papers_formula_on_random_answers(kind: str) -> None:
    draw = np.random.default_rng(5)
    lengths, advantage = [3, 7, 1, 5], [1.3, -0.7, 0.4, -1.1]
    logp = [draw.uniform(-3, -0.1, n) for n in lengths]
    old = [row + draw.normal(0, 0.5, len(row)) for row in logp]
    costs = []
    for mine, theirs, a in zip(logp, old, advantage, strict=True):
        gap = mine - theirs
        level = {"token": gap, "sequence": gap.mean() + 0 * gap, "product": gap.sum() + 0 * gap}[PRESETS[kind].level]
        costs.append(restated(kind, np.exp(level), gap.sum(), a, mine))
    expected = {
        "answer": np.mean([cost.mean() for cost in costs]), "token": np.concatenate(costs).mean(),
        "length": np.concatenate(costs).sum() / (4 * 9), "sum": np.mean([cost.sum() for cost in costs]),
    }[PRESETS[kind].average]  # fmt: skip
    sides = step([row.tolist() for row in logp], [row.tolist() for row in old], advantage)
    objective = settings(loss=kind, max_new_tokens=9 if kind == "dr_grpo" else None)
    assert per_unit(objective, sides)["loss/policy"] == pytest.approx(expected, abs=FLOAT64_LOGITS)


def slope(sides: Sides, objective: GRPO) -> Tensor:
    out, batch = sides
    assert out.logp_BT is not None
    return torch.autograd.grad(loss_of(objective.terms(out, batch), count([batch])), out.logp_BT)[0]


@pytest.mark.parametrize("kind", sorted(set(PRESETS) - {"cispo", "vespo"}))
def test_gradients_are_finite_differences(kind: str) -> None:
    further = [[value + 0.3 for value in row] for row in LOGP]
    out, batch = step(LOGP, [[-1.5, -1.1], [-0.6, -0.9, -0.7, -0.5]], [1.0, -1.0], **{REFERENCE: further})
    objective, counts = settings(loss=kind, kl=0.1, max_new_tokens=8 if kind == "dr_grpo" else None), count([batch])

    def loss_at(logp_BT: Tensor) -> Tensor:
        return loss_of(objective.terms(replace(out, logp_BT=logp_BT), batch), counts)

    assert torch.autograd.gradcheck(loss_at, (out.logp_BT,))


@pytest.mark.parametrize("kind", ["cispo", "vespo"])
def test_weights_that_are_not_differentiated_leave_a_plain_policy_gradient(kind: str) -> None:
    sides = step(LOGP, [[-1.5, -1.1], [-0.6, -0.9, -0.7, -0.5]], [1.0, -1.0])
    found = slope(sides, settings(loss=kind))
    weight_BT = torch.zeros_like(found)
    for row, (mine, theirs, a) in enumerate(zip(LOGP, [[-1.5, -1.1], [-0.6, -0.9, -0.7, -0.5]], (1, -1), strict=True)):
        gap = np.array(mine) - np.array(theirs)
        # With logp = -1 throughout, what a token costs is its weight times its advantage.
        weight = restated(kind, np.exp(gap), float(gap.sum()), float(a), -np.ones(len(gap)))
        weight_BT[row, 1 : 1 + len(gap)] = torch.from_numpy(weight)
    torch.testing.assert_close(found, -weight_BT / 6, rtol=0, atol=FLOAT64_LOGITS)


@pytest.mark.parametrize("kind", sorted(set(PRESETS) - {"rloo", "gspo", "luspo"}))
def test_at_the_first_inner_step_the_gradient_is_the_policy_gradient(kind: str) -> None:
    objective = settings(loss=kind, max_new_tokens=8 if kind == "dr_grpo" else None)
    sides = step(LOGP, LOGP, [1.0, -1.0])
    assert per_unit(objective, sides)["policy/ratio"] == 1.0
    share = {"answer": [1 / 2 / 2, 1 / 4 / 2], "token": [1 / 6, 1 / 6], "length": [1 / 16, 1 / 16]}
    first, second = share[PRESETS[kind].average]
    expected = torch.zeros(2, 5, dtype=torch.float64)
    expected[0, 1:3], expected[1, 1:5] = -first, second
    torch.testing.assert_close(slope(sides, objective), expected, rtol=0, atol=FLOAT64_LOGITS)


def test_delta_caps_only_the_branch_that_is_not_clipped() -> None:
    # Ratio e^2 = 7.39. A good token is clipped at 1.2 either way; a bad one costs 7.39, or delta.
    sides = step([[-1.0], [-1.0]], [[-3.0], [-3.0]], [1.0, -1.0])
    assert per_unit(settings(), sides)["loss/policy"] == pytest.approx((-1.2 + math.exp(2)) / 2)
    assert per_unit(settings(delta=4.0), sides)["loss/policy"] == pytest.approx((-1.2 + 4.0) / 2)
    # A delta below 1 + clip_high: the smaller of the two still decides.
    assert per_unit(settings(delta=1.1), sides)["loss/policy"] == pytest.approx((-1.1 + 1.2) / 2)


def test_shares_of_clipped_tokens_are_told() -> None:
    sides = step([[-1.0, -1.0], [-1.0, -1.0]], [[-3.0, -1.0], [-1.0, -0.2]], [1.0, -1.0])
    found = per_unit(settings(), sides)
    assert found["policy/clipped_high"] == 0.25 and found["policy/clipped_low"] == 0.25
    assert found["policy/surprise"] == 1.0


def padded(sides: Sides, more: int) -> Sides:
    """The same answers in a batch that is wider by so many columns of padding."""
    out, batch = sides

    def wide(value: Tensor, fill: float) -> Tensor:
        return torch.nn.functional.pad(value, (0, more), value=fill)

    assert out.logp_BT is not None
    return Outputs(logp_BT=wide(out.logp_BT.detach(), 0.0).requires_grad_()), Batch(
        wide(batch.tokens_BT, 0), wide(batch.targets_BT, 0), wide(batch.weights_BT, 0), wide(batch.document_BT, -1),
        wide(batch.position_BT, 0), wide(batch.sequence_BT, -1), batch.place_B, batch.dropout_key,
        {name: wide(value, 0.0) for name, value in batch.signals.items()},
    )  # fmt: skip


@pytest.mark.parametrize("kind", sorted(PRESETS))
def test_no_constant_comes_from_the_width_of_a_batch(kind: str) -> None:
    objective = settings(loss=kind, max_new_tokens=8 if kind == "dr_grpo" else None)
    narrow, wide = step(LOGP, OLDS, [1.0, -1.0]), padded(step(LOGP, OLDS, [1.0, -1.0]), 5)
    torch.testing.assert_close(slope(wide, objective)[:, :5], slope(narrow, objective), rtol=0, atol=FLOAT64_LOGITS)
    assert per_unit(objective, wide) == pytest.approx(per_unit(objective, narrow), abs=FLOAT64_LOGITS)


@pytest.mark.parametrize("fields", [{"loss": "dr_grpo"}, {"average": "length"}, {"overlong": 4}])
def test_a_constant_that_is_missing_is_an_error(fields: dict[str, object]) -> None:
    with pytest.raises(ValueError, match=r"needs objective\.max_new_tokens"):
        settings(**fields)


def test_a_divergence_whose_gradient_is_nothing_is_refused_in_the_loss() -> None:
    with pytest.raises(ValueError, match="does nothing in the loss"):
        settings(kl=0.1, kl_estimator="k1")
    settings(kl=0.1, kl_estimator="k1", kl_in="reward")


def test_what_an_environment_said_between_turns_is_not_trained() -> None:
    out, batch = step(LOGP, OLDS, [1.0, -1.0])
    weights = batch.weights_BT.clone()
    weights[1, 2:4] = 0.0
    found = per_unit(settings(), (out, replace(batch, weights_BT=weights)))
    assert found["loss/policy"] == pytest.approx((-2.0100083 / 2 + (math.exp(0.1) + math.exp(-0.2)) / 2) / 2)


def test_the_entropy_that_is_wanted_high_is_taken_off_the_loss() -> None:
    out, batch = step(LOGP, OLDS, [1.0, -1.0])
    entropy_BT = placed([[1.0, 2.0], [3.0, 2.0, 2.0, 2.0]], batch)
    objective = settings(entropy=0.01)
    assert objective.wants == ("logp", "entropy") and settings().wants == ("logp",)
    sides = replace(out, entropy_BT=entropy_BT), batch
    assert per_unit(objective, sides)["policy/entropy"] == pytest.approx(2.0)
    losses = [float(loss_of(each.terms(*sides), count([batch])).detach()) for each in (objective, settings())]
    assert losses[0] - losses[1] == pytest.approx(-0.02)


def credits(objective: GRPO, rewards: list[float], groups: list[int], **more: object) -> list[float]:
    """The credit of the first token of each answer."""
    return [float(row[0]) for row in objective.credit(rollout_of(rewards, groups, **more))]  # type: ignore[arg-type]


def test_credit_compares_answers_of_a_group_by_either_deviation() -> None:
    one = [1.0, 0.0, 0.0, 1.0], [0, 0, 0, 0]
    assert credits(settings(), *one) == pytest.approx([0.9998000, -0.9998, -0.9998, 0.9998], abs=5e-8)
    assert credits(settings(scale="sample"), *one)[0] == pytest.approx(0.8658754, abs=5e-8)
    assert credits(settings(loss="dr_grpo", max_new_tokens=8), *one) == [0.5, -0.5, -0.5, 0.5]
    assert credits(settings(loss="rloo"), *one) == pytest.approx([2 / 3, -2 / 3, -2 / 3, 2 / 3])
    whole = settings().credit(rollout_of([1.0, 0.0], [0, 0], lengths=[3, 1]))
    assert [len(row) for row in whole] == [3, 1] and len(set(whole[0])) == 1


Kinds = list[tuple[str, Callable[[], GRPO]]]
COMPARING: Kinds = [
    ("group", settings), ("leave_one_out", lambda: settings(loss="rloo")),
    ("group_whitened", lambda: settings(advantage="group_whitened")),
]  # fmt: skip
each_comparing = pytest.mark.parametrize("make", [make for _, make in COMPARING], ids=[name for name, _ in COMPARING])


@each_comparing
def test_an_answer_alone_or_among_equals_gets_exactly_nothing(make: Callable[[], GRPO]) -> None:
    found = credits(make(), [0.3, 0.1, 0.1, 0.1, 1.0, 0.0], [0, 1, 1, 1, 2, 2])
    assert found[:4] == [0.0] * 4 and found[4] > 0 > found[5]


@each_comparing
def test_an_answer_without_a_reward_changes_the_credit_of_no_other(make: Callable[[], GRPO]) -> None:
    with_it = credits(make(), [1.0, math.nan, 0.0, 0.5, 0.2, 0.9], [0, 0, 0, 0, 1, 1])
    without = credits(make(), [1.0, 0.0, 0.5, 0.2, 0.9], [0, 0, 0, 1, 1])
    assert with_it[:1] + with_it[2:] == without and with_it[1] == 0.0


@each_comparing
def test_groups_of_any_size_in_any_order_get_the_same_numbers(make: Callable[[], GRPO]) -> None:
    draw = np.random.default_rng(7)
    rewards, groups = draw.normal(size=12), np.array([0, 0, 0, 1, 1, 2, 2, 2, 2, 2, 3, 3])
    whole = np.array(credits(make(), rewards.tolist(), groups.tolist()))
    order = draw.permutation(12)
    assert credits(make(), rewards[order].tolist(), groups[order].tolist()) == whole[order].tolist()


def test_whitened_credit_has_mean_0_and_deviation_1_over_every_token() -> None:
    found = settings(loss="reinforce_pp").credit(rollout_of([1.0, 0.0, 3.0], [0, 1, 2], lengths=[2, 5, 3]))
    every = np.concatenate(found)
    assert every.mean() == pytest.approx(0.0, abs=1e-12) and every.std(ddof=1) == pytest.approx(1.0, abs=1e-7)
    # Two tokens of 1, five of 0, three of 3.
    raw = np.array([1.0] * 2 + [0.0] * 5 + [3.0] * 3)
    np.testing.assert_allclose(every, (raw - raw.mean()) / np.sqrt(raw.var(ddof=1) + 1e-8), rtol=0, atol=1e-12)


def test_a_divergence_in_the_reward_is_paid_token_by_token_or_by_the_answer() -> None:
    reference = (np.array([-1.5, -1.0]), np.array([-1.0, -1.2]))
    more = {"reference_logp": reference}
    # k1: -1 - -1.5 = 0.5 and 0; 0 and 0.2. The answers earn 1 - 0.1 * 0.5 and 0 - 0.1 * 0.2.
    objective = settings(loss="dr_grpo", max_new_tokens=2, kl=0.1, kl_estimator="k1", kl_in="reward")
    found = credits(objective, [1.0, 0.0], [0, 0], **more)
    assert found == pytest.approx([(0.95 + 0.02) / 2, -(0.95 + 0.02) / 2])
    plus = settings(loss="reinforce_pp", kl=0.1, kl_estimator="k1", kl_in="reward")
    every = np.concatenate(plus.credit(rollout_of([1.0, 0.0], [0, 1], **more)))
    raw = np.array([0.95, 1.0, -0.02, -0.02])
    np.testing.assert_allclose(every, (raw - raw.mean()) / np.sqrt(raw.var(ddof=1) + 1e-8), rtol=0, atol=1e-12)
    out, batch = step(LOGP, OLDS, [1.0, -1.0], **{REFERENCE: OLDS})
    assert {term.name: term.coef for term in objective.terms(out, batch)}["policy/kl"] == 0.0


def test_overlong_answers_lose_reward_in_a_line_and_unfinished_ones_can_be_left_out() -> None:
    objective = settings(loss="dr_grpo", max_new_tokens=8, overlong=4)
    found = np.array(credits(objective, [1.0] * 5, [0] * 5, lengths=[2, 4, 5, 8, 9]))
    assert found - found[0] == pytest.approx([0.0, 0.0, -0.25, -1.0, -1.0])
    ended = np.array([True, False, True])
    left = settings(loss="dr_grpo", max_new_tokens=8, skip_unfinished=True)
    assert credits(left, [1.0, 9.0, 0.0], [0, 0, 0], ended_R=ended) == [0.5, 0.0, -0.5]
    assert left.trains(rollout_of([1.0, 9.0, 0.0], [0, 0, 0], ended_R=ended)).tolist() == [True, False, True]


def test_groups_that_teach_nothing_are_left_out_where_that_is_asked() -> None:
    rewards, groups = [1.0, 1.0, math.nan, 1.0, 0.0, 2.0], [0, 0, 0, 1, 1, 2]
    assert settings().trains(rollout_of(rewards, groups)).tolist() == [True, True, False, True, True, True]
    dynamic = settings(skip_even_groups=True)
    assert dynamic.trains(rollout_of(rewards, groups)).tolist() == [False, False, False, True, True, False]


def test_where_sampler_and_trainer_agree_correction_changes_no_bit() -> None:
    sides = step(LOGP, OLDS, [1.0, -1.0], **{ROLLOUT: OLDS})
    plain = slope(sides, settings())
    for correction in ({"weights": "token"}, {"weights": "sequence", "reject": "k3"}, {"bypass": True}):
        assert torch.equal(slope(sides, settings(correction=correction)), plain)
