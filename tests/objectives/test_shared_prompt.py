"""Two answers behind one prompt in a row say the same to an objective as two rows of their own."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from llmtrainer.core.batch import ADVANTAGE, LIKED, OLD, REFERENCE, Batch, Outputs
from llmtrainer.core.objective import Objective
from tests.objectives.comparisons import answers, per_unit, placed
from tests.objectives.trl_numbers import ADVANTAGE as EARNED
from tests.objectives.trl_numbers import OLD as OLDS
from tests.objectives.trl_numbers import POLICY
from tests.objectives.trl_numbers import REFERENCE as REFERENCES


def in_one_row(rows: list[list[float]]) -> torch.Tensor:
    """Numbers of the answers behind each other, after two places of a prompt; two answers a row."""
    lines = [[0.0, 0.0, *rows[at], *rows[at + 1]] for at in range(0, len(rows), 2)]
    width = max(map(len, lines))
    return torch.tensor([line + [0.0] * (width - len(line)) for line in lines], dtype=torch.float64)


def shared() -> tuple[Outputs, Batch]:
    # The first place of an answer stands for its first target, which the prompt's last token predicts.
    owners = in_one_row([[float(row + 1)] * len(POLICY[row]) for row in range(4)]).to(torch.int32) - 1
    zero, like = torch.zeros(owners.shape, dtype=torch.int64), torch.zeros(owners.shape, dtype=torch.int32)
    each = [[value] * len(row) for value, row in zip(EARNED, POLICY, strict=True)]
    signals = {
        REFERENCE: in_one_row(REFERENCES), OLD: in_one_row(OLDS), ADVANTAGE: in_one_row(each),
        LIKED: torch.tensor([1.0, 0.0, 1.0, 0.0]),
    }  # fmt: skip
    batch = Batch(zero, zero, (owners >= 0).float(), like, like, owners, torch.arange(2), 7, signals)
    return Outputs(logp_BT=in_one_row(POLICY).requires_grad_()), batch


@pytest.mark.parametrize("settings", [
    {"kind": "dpo"}, {"kind": "dpo", "average": "mean", "nll_weight": 0.5}, {"kind": "simpo"}, {"kind": "orpo"},
    {"kind": "kto", "loss": "apo_zero"}, {"kind": "grpo"}, {"kind": "grpo", "loss": "gspo"},
    {"kind": "grpo", "loss": "vespo"}, {"kind": "grpo", "loss": "rloo"}, {"kind": "grpo", "loss": "luspo"},
])  # fmt: skip
def test_every_figure_is_that_of_rows_of_their_own(settings: dict[str, object]) -> None:
    objective = Objective.model_validate(settings)
    out, batch = answers(POLICY, REFERENCES)
    each = [[value] * len(row) for value, row in zip(EARNED, POLICY, strict=True)]
    signals = {OLD: placed(OLDS, batch), ADVANTAGE: placed(each, batch), LIKED: torch.tensor([1.0, 0.0, 1.0, 0.0])}
    apart = out, replace(batch, signals={**batch.signals, **signals})
    assert per_unit(objective, shared()) == pytest.approx(per_unit(objective, apart), abs=1e-12)
