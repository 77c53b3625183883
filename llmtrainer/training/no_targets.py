"""A step in which nothing is to be learned: an error of the data, or a rollout of which no answer stands out."""

from __future__ import annotations

from llmtrainer.base.errors import UserError

MOST_IN_A_ROW = 10
"""Steps of rollouts that taught nothing, before the run ends: a judge that is down does not come back unnoticed."""
TOLD = "no answer of this step can be learned from: the weights stay"


def require_answers(step: int, in_a_row: int, writes_answers: bool) -> None:
    """UserError unless the rows are answers of the policy's own (`writes_answers`), of which a step may have none to
    learn from, and this is not the eleventh such step in a row. step: its number, from 1."""
    if not writes_answers:
        raise UserError(
            f"step {step:,} has no target: every weight in it is 0",
            why="its loss would be 0.0 and the weights would only decay",
            fix="llmtrainer inspect RECIPE.yaml shows the rows and their weights",
        )
    if in_a_row > MOST_IN_A_ROW:
        raise UserError(
            f"{in_a_row} steps in a row, up to step {step:,}, had no answer to learn from",
            why="all answers of each prompt earned the same, or none has a reward: `left_out` and the figures of "
            "`rollout` in events.jsonl say which",
            fix="rewards that set answers apart, prompts that are neither too hard nor too easy, or a larger "
            "rollout.redraw, which draws other prompts in place of those that teach nothing",
        )
