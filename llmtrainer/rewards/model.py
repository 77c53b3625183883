"""A trained reward model: what it thinks of an answer."""

from __future__ import annotations

from collections.abc import Sequence

from pydantic import Field, PrivateAttr

from llmtrainer.core.protocols import Reward
from llmtrainer.core.reward import Scorer, checked
from llmtrainer.core.rollout import Answer, Verdict


class Model(Reward):
    """The score that a reward model gives an answer, read at its last token."""

    path: str = Field(min_length=1)
    """The model: a run directory, a checkpoint, a Hugging Face folder or a hub id."""

    template: str | None = "auto"
    """What prompt and answer become for it: auto is its own chat template; or a built-in one, such as chatml, or a
    path to a .jinja file. null: the texts as they stand."""

    scale: float = 1.0
    """What scores are multiplied by."""

    shift: float = 0.0
    """What is added to scores after that; the negative mean of the model's scores centres them."""

    least: float | None = None
    """Smaller rewards become this one."""

    most: float | None = None
    """Larger rewards become this one."""

    _scorer: Scorer | None = PrivateAttr(default=None)

    def attach(self, scorer: Scorer) -> None:
        """Give it the function that scores: who puts a run together has loaded the model of `path`."""
        self._scorer = scorer

    def score(self, answers: Sequence[Answer]) -> list[float | None]:
        return [verdict.value for verdict in self.verdicts(answers)]

    def verdicts(self, answers: Sequence[Answer]) -> list[Verdict]:
        """What the model says. Its own exceptions are a defect and not caught; a score that is no finite number costs
        the one answer."""
        assert self._scorer is not None, f"no model was attached for {self.path}"
        path, scores = self.path, list(self._scorer(answers)) if answers else []
        assert len(scores) == len(answers), f"{path} scored {len(scores)} of {len(answers)} answers"
        return [self._bounded(checked(score)) for score in scores]

    def _bounded(self, verdict: Verdict) -> Verdict:
        if verdict.value is None:
            return verdict
        value = verdict.value * self.scale + self.shift
        value = value if self.least is None else max(value, self.least)
        return Verdict(value if self.most is None else min(value, self.most))
