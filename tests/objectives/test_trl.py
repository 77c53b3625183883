"""Losses and gradients against TRL 1.16 in float64, on numbers that trl_numbers.py made where TRL is installed.

Where the two differ on purpose, the case says by what; docs/adjudication.md says why.
"""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from llmtrainer.core import vocab_head
from llmtrainer.core.batch import ADVANTAGE, KL, LIKED, OLD, REFERENCE, ROLLOUT, TEACHER_IDS, TEACHER_LOGP
from llmtrainer.core.batch import TEACHER_TEMPERATURE as TEMPERATURE
from llmtrainer.core.objective import Objective, count, loss_of
from tests.objectives import trl_numbers as given
from tests.objectives.comparisons import answers, placed
from tests.tolerances import FLOAT64_LOGITS, TRL_FLOAT32_LOSS
from tests.worlds import row_batch

NUMBERS = json.loads((Path(__file__).parent / "trl_1_16.json").read_text())

CASES: dict[str, dict[str, object]] = {
    "dpo/sigmoid": {}, "dpo/hinge": {"loss": "hinge"}, "dpo/ipo": {"loss": "ipo", "average": "mean"},
    "dpo/exo_pair": {"loss": "exo_pair", "label_smoothing": 0.1}, "dpo/nca_pair": {"loss": "nca_pair"},
    "dpo/robust": {"loss": "robust", "label_smoothing": 0.1}, "dpo/sppo_hard": {"loss": "sppo_hard"},
    "dpo/apo_zero": {"loss": "apo_zero"}, "dpo/apo_down": {"loss": "apo_down"},
    "dpo/sigmoid_norm": {"average": "mean"}, "dpo/forward_kl": {"divergence": "forward_kl"},
    "dpo/js_divergence": {"divergence": "jensen_shannon"},
    "cpo/sigmoid": {"kind": "cpo", "nll_weight": 0.0}, "cpo/hinge": {"kind": "cpo", "loss": "hinge", "nll_weight": 0.0},
    "cpo/ipo": {"kind": "cpo", "loss": "ipo", "nll_weight": 0.0},
    "cpo/simpo": {"kind": "simpo", "beta": 2.0, "gamma": 0.5},
    "kto/kto": {"kind": "kto", "liked_weight": 1.5, "disliked_weight": 0.5},
    "kto/apo_zero_unpaired": {"kind": "kto", "loss": "apo_zero", "liked_weight": 1.5, "disliked_weight": 0.5},
    "grpo/grpo": {}, "grpo/bnpo": {"loss": "bnpo"}, "grpo/dapo": {"loss": "dapo"},
    "grpo/dr_grpo": {"loss": "dr_grpo", "max_new_tokens": 8}, "grpo/sapo": {"loss": "sapo"},
    "grpo/vespo": {"loss": "vespo"},
    # TRL's bound is of the weight itself, ours of how far it is above 1.
    "grpo/cispo": {"loss": "cispo", "clip_high": 0.5}, "grpo/gspo": {"loss": "gspo"}, "grpo/luspo": {"loss": "luspo"},
    "grpo/delta": {"delta": 1.3}, "grpo/kl": {"loss": "bnpo", "kl": 0.1},
    "grpo/truncated": {"loss": "bnpo", "correction": {"weights": "token", "cap": 1.2}},
    "grpo/masked": {"loss": "bnpo", "correction": {"weights": "sequence", "cap": 99.0, "reject": "sequence"}},
    "rloo": {"loss": "rloo"},
}  # fmt: skip
DEFAULTS = {"dpo": {"kind": "dpo", "beta": 0.3}, "cpo": {"beta": 0.3}, "kto": {"beta": 0.3}}
CLIP = {"kind": "grpo", "clip_low": 0.2, "clip_high": 0.28}


@pytest.mark.parametrize("name", sorted(CASES))
def test_loss_and_gradient_are_those_of_trl(name: str) -> None:
    family = name.split("/")[0]
    objective = Objective.model_validate({**(CLIP if family in ("grpo", "rloo") else DEFAULTS[family]), **CASES[name]})
    out, batch = answers(given.POLICY, given.REFERENCE)
    each = [[value] * len(row) for value, row in zip(given.ADVANTAGE, given.POLICY, strict=True)]
    signals = {
        OLD: placed(given.OLD, batch), ROLLOUT: placed(given.ROLLOUT, batch), ADVANTAGE: placed(each, batch),
        REFERENCE: batch.signals[REFERENCE], KL: torch.full((4,), given.KL_POINT, dtype=torch.float64),
        LIKED: torch.tensor(given.LIKED, dtype=torch.float64),
    }  # fmt: skip
    batch = replace(batch, signals={key: signals[key] for key in (*objective.reads, KL)})
    loss = loss_of(objective.terms(out, batch), count([batch]))
    assert out.logp_BT is not None
    (slope,) = torch.autograd.grad(loss, out.logp_BT)
    assert float(loss.detach()) == pytest.approx(NUMBERS[name]["loss"], abs=FLOAT64_LOGITS)
    expected = placed(NUMBERS[name]["gradient"], batch)
    torch.testing.assert_close(slope, expected, rtol=0, atol=FLOAT64_LOGITS)


def test_the_odds_ratio_is_trls_to_the_digits_of_float32_that_it_keeps() -> None:
    out, batch = answers(given.POLICY)
    terms = {term.name: term for term in Objective.model_validate({"kind": "orpo"}).terms(out, batch)}
    loss = 0.1 * terms["loss/odds_ratio"].total / 2
    assert out.logp_BT is not None
    (slope,) = torch.autograd.grad(loss, out.logp_BT)
    assert float(loss.detach()) == pytest.approx(NUMBERS["orpo"]["loss"], abs=TRL_FLOAT32_LOSS)
    torch.testing.assert_close(slope, placed(NUMBERS["orpo"]["gradient"], batch), rtol=0, atol=TRL_FLOAT32_LOSS)


@pytest.mark.parametrize("temperature", [1.0, 2.0])
@pytest.mark.parametrize(("beta", "kind"), [(0.0, "forward_kl"), (0.3, "jensen_shannon"), (1.0, "reverse_kl")])
def test_distillation_is_trls_times_the_temperature_squared(beta: float, kind: str, temperature: float) -> None:
    batch = row_batch([[0, 1, 2]])
    teacher = (torch.tensor([given.TEACHER], dtype=torch.float64) / temperature).log_softmax(-1)
    ids = torch.arange(4).expand(1, 2, 4)
    told = {TEACHER_LOGP: teacher, TEACHER_IDS: ids, TEMPERATURE: torch.tensor(temperature)}
    batch = replace(batch, signals=told)
    share = {"mixture": beta} if kind == "jensen_shannon" else {}
    objective = Objective.model_validate(
        {"kind": "distill", "coefficient": 1.0, "divergence": kind, "temperature": temperature, **share}
    )
    student = torch.tensor([given.STUDENT], dtype=torch.float64, requires_grad=True)
    out = vocab_head.score(student, torch.eye(4, dtype=torch.float64), batch, objective.wants)
    loss = loss_of(objective.terms(out, batch), count([batch]))
    theirs = NUMBERS[f"gkd/{beta}/{temperature}"]
    assert float(loss.detach()) == pytest.approx(theirs["loss"] * temperature**2, abs=FLOAT64_LOGITS)
    (slope,) = torch.autograd.grad(loss, student)
    expected = torch.tensor(theirs["gradient"], dtype=torch.float64) * temperature**2
    torch.testing.assert_close(slope[0], expected, rtol=0, atol=FLOAT64_LOGITS)


def test_no_number_that_trl_gave_is_left_out() -> None:
    gkd = {f"gkd/{beta}/{temperature}" for beta in (0.0, 0.3, 1.0) for temperature in (1.0, 2.0)}
    assert set(NUMBERS) == {*CASES, "orpo", *gkd}
