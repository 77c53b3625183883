"""A weighted sum of several rewards."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal, Self

from pydantic import model_validator

from llmtrainer.base.errors import UserError
from llmtrainer.core.protocols import Reward
from llmtrainer.core.rollout import Answer, Verdict


class Mix(Reward):
    """The sum of what several rewards give, each times its weight. Each one's mean is reported under its own name."""

    of: tuple[Reward, ...]
    """The rewards: `[{kind: numeric}, {kind: format, weight: 0.2}]`."""

    failed: Literal["answer", "part"] = "answer"
    """What it costs that one of them could not judge an answer: the answer has no reward, or that part counts 0."""

    @model_validator(mode="after")
    def _named(self) -> Self:
        if not self.of:
            raise UserError("a mix of no rewards", fix="of=[{kind: numeric}]")
        titles = [reward.title for reward in self.of]
        if double := next((title for title in titles if titles.count(title) > 1), None):
            raise UserError(
                f"two rewards of a mix are called `{double}`", why="each one's mean is reported under its name",
                fix=f"{{kind: {double}, name: {double}_2}}",
            )
        return self

    @property
    def parts(self) -> tuple[Reward, ...]:
        return self.of

    def require(self) -> None:
        for reward in self.of:
            reward.require()

    def verdicts(self, answers: Sequence[Answer]) -> list[Verdict]:
        each = [reward.verdicts(answers) for reward in self.of]
        for reward, found in zip(self.of, each, strict=True):
            assert len(found) == len(answers), f"{reward.title} judged {len(found)} of {len(answers)} answers"
        return [self._sum(row) for row in zip(*each, strict=True)]

    def score(self, answers: Sequence[Answer]) -> list[float | None]:
        return [verdict.value for verdict in self.verdicts(answers)]

    def _sum(self, row: Sequence[Verdict]) -> Verdict:
        parts: dict[str, float | None] = {}
        reasons = []
        for reward, verdict in zip(self.of, row, strict=True):
            parts[reward.title] = verdict.value
            parts |= {f"{reward.title}/{name}": value for name, value in verdict.parts.items()}
            if verdict.reason is not None:
                reasons.append((verdict.value is None, f"{reward.title}: {verdict.reason}"))
        # What made a part fail is told before what made one earn nothing.
        reason = max(reasons, key=lambda told: told[0])[1] if reasons else None
        if self.failed == "answer" and any(verdict.value is None for verdict in row):
            return Verdict(None, reason, parts)
        total = sum(
            reward.weight * verdict.value
            for reward, verdict in zip(self.of, row, strict=True) if verdict.value is not None
        )  # fmt: skip
        return Verdict(float(total), reason, parts)
