"""PPO by hand and against its formulas in numpy: both clips, credit with a critic, and what rewards become before."""

from __future__ import annotations

import math
from dataclasses import replace

import numpy as np
import pytest
import torch
from torch import Tensor

from llmtrainer.core.batch import ADVANTAGE, OLD, OLD_VALUE, REFERENCE, RETURN
from llmtrainer.core.credit import FRESH, Moments, State
from llmtrainer.core.objective import count, loss_of
from llmtrainer.core.rollout import Rollout
from llmtrainer.objectives.ppo import PPO
from tests.objectives.comparisons import Sides, answers, per_unit, placed
from tests.objectives.rollouts import rollout_of
from tests.tolerances import FLOAT64_LOGITS


def settings(**fields: object) -> PPO:
    return PPO.model_validate({"kl": 0.0, **fields})


def step(seed: int = 1) -> tuple[Sides, dict[str, np.ndarray]]:
    """Two answers of 3 and 5 tokens with random everything, and the same numbers as flat arrays."""
    draw = np.random.default_rng(seed)
    lengths = [3, 5]
    names = ("logp", OLD, ADVANTAGE, "value", OLD_VALUE, RETURN, REFERENCE)
    flat = {name: draw.normal(-1.0 if "logp" in name else 0.0, 0.4, 8) for name in names}
    rows = {name: [values[:3].tolist(), values[3:].tolist()] for name, values in flat.items()}
    out, batch = answers([[-1.0] * n for n in lengths])
    signals = {name: placed(rows[name], batch) for name in names if name not in ("logp", "value")}
    logp_BT, value_BT = placed(rows["logp"], batch), placed(rows["value"], batch)
    out = replace(out, logp_BT=logp_BT.requires_grad_(), value_BT=value_BT.requires_grad_())
    return (out, replace(batch, signals=signals)), flat


def test_policy_and_value_losses_are_their_formulas() -> None:
    sides, n = step()
    found = per_unit(settings(value_clip=0.3), sides)
    r = np.exp(n["logp"] - n[OLD])
    assert found["loss/policy"] == pytest.approx(
        -np.minimum(r * n[ADVANTAGE], np.clip(r, 0.8, 1.2) * n[ADVANTAGE]).mean(), abs=FLOAT64_LOGITS
    )
    near = n[OLD_VALUE] + np.clip(n["value"] - n[OLD_VALUE], -0.3, 0.3)
    errors = np.maximum((n["value"] - n[RETURN]) ** 2, (near - n[RETURN]) ** 2)
    assert found["loss/value"] == pytest.approx(0.5 * errors.mean(), abs=FLOAT64_LOGITS)
    plain = per_unit(settings(value_clip=None), sides)["loss/value"]
    assert plain == pytest.approx(0.5 * ((n["value"] - n[RETURN]) ** 2).mean(), abs=FLOAT64_LOGITS)
    assert found["policy/moved"] == pytest.approx((r - 1 - np.log(r)).mean(), abs=FLOAT64_LOGITS)
    assert found["value/return"] == pytest.approx(n[RETURN].mean(), abs=FLOAT64_LOGITS)
    out, batch = sides
    whole = float(loss_of(settings(value_clip=0.3).terms(out, batch), count([batch])).detach())
    assert whole == pytest.approx(found["loss/policy"] + 0.1 * found["loss/value"])


def test_large_errors_of_the_critic_count_in_a_line_where_that_is_asked() -> None:
    sides, n = step()
    away = np.abs(n["value"] - n[RETURN])
    expected = np.where(away < 0.2, 0.5 * away**2, 0.2 * (away - 0.1)).mean()
    found = per_unit(settings(value_clip=None, huber=0.2), sides)["loss/value"]
    assert found == pytest.approx(expected, abs=FLOAT64_LOGITS)


@pytest.mark.parametrize("fields", [{}, {"delta": 1.1}, {"value_clip": None, "huber": 0.2}])
def test_gradients_are_finite_differences(fields: dict[str, object]) -> None:
    (out, batch), _ = step()
    counts = count([batch])

    def loss_at(logp_BT: Tensor, value_BT: Tensor) -> Tensor:
        terms = settings(value_weight=0.5, **fields).terms(replace(out, logp_BT=logp_BT, value_BT=value_BT), batch)
        return loss_of(terms, counts)

    assert torch.autograd.gradcheck(loss_at, (out.logp_BT, out.value_BT))


def test_at_the_first_inner_step_every_ratio_is_1_and_nothing_is_clipped() -> None:
    (out, batch), n = step()
    assert out.logp_BT is not None
    same = replace(batch, signals={**batch.signals, OLD: out.logp_BT.detach()})
    found = per_unit(settings(), (out, same))
    assert found["policy/ratio"] == 1.0 and found["policy/clipped"] == found["policy/moved"] == 0.0
    assert found["loss/policy"] == pytest.approx(-n[ADVANTAGE].mean())


def test_a_divergence_that_costs_nothing_builds_no_reference() -> None:
    assert REFERENCE not in settings().reads and REFERENCE in settings(kl=0.1).reads
    assert settings().wants == ("logp", "value") and settings(entropy=0.1).wants == ("logp", "value", "entropy")
    with pytest.raises(ValueError, match="a weight of 0 stays 0"):
        settings(kl_target=6.0)


VALUES = (np.array([0.5, 0.6, 0.7]), np.array([0.2, 0.1]))


def rollout(**more: object) -> Rollout:
    return rollout_of([1.0, 0.0], [0, 1], lengths=[3, 2], **{"values": VALUES, **more})  # type: ignore[arg-type]


def test_credit_is_gae_with_the_reward_at_the_last_token() -> None:
    objective = settings(whiten_advantages=False)
    first, second = objective.credit(rollout())
    assert first.tolist() == pytest.approx([0.46575, 0.385, 0.3]) and second.tolist() == pytest.approx([-0.195, -0.1])
    returns = objective.returns(rollout())
    assert returns[0].tolist() == pytest.approx([0.96575, 0.985, 1.0])
    whitened = np.concatenate(settings().credit(rollout()))
    raw = np.concatenate([first, second])
    np.testing.assert_allclose(whitened, (raw - raw.mean()) / np.sqrt(raw.var(ddof=1) + 1e-8), rtol=0, atol=1e-12)
    assert settings().returns(rollout())[0].tolist() == returns[0].tolist()


def test_leaving_the_reference_costs_reward_at_every_token() -> None:
    reference = (np.array([-1.5, -1.0, -1.0]), np.array([-1.0, -1.2]))
    objective = settings(kl=0.1, lam=1.0, whiten_advantages=False)
    returns = objective.returns(rollout(reference_logp=reference))
    # 0.1 * (-1 - -1.5) = 0.05 at the first token, 0.1 * 0.2 at the last of the second answer.
    assert returns[0].tolist() == pytest.approx([0.95, 1.0, 1.0]) and returns[1].tolist() == pytest.approx([-0.02] * 2)
    stronger = objective.returns(rollout(reference_logp=reference), State(kl=0.2))
    assert stronger[0][0] == pytest.approx(0.9)


def test_an_answer_without_an_end_loses_reward_and_may_be_continued_by_the_critic() -> None:
    ended = np.array([True, False])
    objective = settings(lam=1.0, missing_end_penalty=0.5, whiten_advantages=False)
    assert objective.returns(rollout(ended_R=ended))[1].tolist() == pytest.approx([-0.5, -0.5])
    further = settings(lam=1.0, bootstrap=True, whiten_advantages=False)
    assert further.returns(rollout(ended_R=ended))[1].tolist() == pytest.approx([0.1, 0.1])
    longer = (VALUES[0], np.array([0.2, 0.1, 0.7]))
    assert further.returns(rollout(ended_R=ended, values=longer))[1].tolist() == pytest.approx([0.7, 0.7])


def test_what_an_environment_said_is_passed_over_as_if_it_were_not_there() -> None:
    weights = (np.array([1, 0, 0, 1, 1], dtype=np.float32),)
    values = (np.array([0.5, 9.0, 9.0, 0.6, 0.7]),)
    between = rollout_of([1.0], [0], lengths=[5], weights=weights, values=values)
    found = settings(whiten_advantages=False).credit(between)[0]
    assert found.tolist() == pytest.approx([0.46575, 0.0, 0.0, 0.385, 0.3])


def test_running_rewards_are_divided_by_the_deviation_of_all_so_far() -> None:
    objective = settings(rewards="running", lam=1.0, whiten_advantages=False)
    first, second = rollout(), rollout_of([3.0, 5.0], [0, 1], lengths=[3, 2], values=VALUES)
    state = objective.advance(objective.advance(FRESH, first), second)
    every = np.array([1.0, 0.0, 3.0, 5.0])
    assert state.rewards.count == 4 and state.rewards.deviation == pytest.approx(every.std(ddof=1))
    assert objective.returns(second, state)[0][0] == pytest.approx(3.0 / every.std(ddof=1))
    assert settings().advance(FRESH, first) == FRESH


def test_the_rollouts_own_moments_or_those_of_all_its_tokens_can_scale_rewards() -> None:
    batch = settings(rewards="batch", lam=1.0).returns(rollout())
    assert [row[0] for row in batch] == pytest.approx([math.sqrt(0.5), -math.sqrt(0.5)])
    tokens = settings(whiten_rewards=True, lam=1.0).returns(rollout())
    raw = np.array([0.0, 0.0, 1.0, 0.0, 0.0])
    scaled = (raw - raw.mean()) / np.sqrt(raw.var(ddof=1) + 1e-8) + raw.mean()
    assert tokens[0][0] == pytest.approx(scaled[:3].sum()) and tokens[1][0] == pytest.approx(scaled[3:].sum())


def test_the_cost_of_divergence_follows_its_target() -> None:
    reference = (np.array([-3.0, -3.0, -3.0]), np.array([-1.0, -1.0]))
    objective = settings(kl=0.1, kl_target=1.0, kl_horizon=100)
    # 6 and 0 nats an answer, 3 on average: far above, so the error is clipped to 0.2; two answers of a hundred.
    state = objective.advance(FRESH, rollout(reference_logp=reference))
    assert state.kl == pytest.approx(0.1 * (1 + 0.2 * 2 / 100))
    assert objective.advance(state, rollout(reference_logp=reference)).kl == pytest.approx(0.1 * 1.004**2)
    # A rollout larger than the horizon moves it by a fifth, and never below 0.
    short = settings(kl=0.1, kl_target=1000.0, kl_horizon=1)
    assert short.advance(FRESH, rollout(reference_logp=reference)).kl == pytest.approx(0.1 * 0.8)


def test_an_answer_without_a_reward_leaves_all_statistics() -> None:
    objective = settings(rewards="batch")
    lost = rollout_of([1.0, math.nan, 0.0], [0, 1, 2], lengths=[3, 4, 2], values=(VALUES[0], np.ones(4), VALUES[1]))
    with_it, without = objective.credit(lost), objective.credit(rollout())
    assert with_it[1].tolist() == [0.0] * 4
    assert with_it[0].tolist() == without[0].tolist() and with_it[2].tolist() == without[1].tolist()
    assert settings(rewards="running").advance(FRESH, lost).rewards == Moments().with_more(np.array([1.0, 0.0]))
