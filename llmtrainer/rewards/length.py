"""How long an answer is, in the tokens that are trained."""

from __future__ import annotations

from typing import Literal, Self

from pydantic import Field, model_validator

from llmtrainer.base.errors import UserError
from llmtrainer.core.reward import Rule
from llmtrainer.core.rollout import Answer, Verdict


class Length(Rule):
    """What an answer earns for its number of sampled tokens, its end token included: those that are trained, not
    those of a text that is tokenised again, and no padding.

    overlong: 0 up to `most - slope` tokens, then straight down to -1 at `most` and beyond (DAPO, arXiv:2503.14476,
    eq. 13). target: 1 at `target` tokens, straight down to 0 at a distance of `slope`.
    """

    rule: Literal["overlong", "target"] = "overlong"
    """A penalty for what is too long, or a reward for a wanted length."""

    most: int | None = Field(default=None, ge=1)
    """overlong: tokens at which the penalty is full; the sampler's max_new_tokens, say."""

    target: int | None = Field(default=None, ge=1)
    """target: the wanted number of tokens."""

    slope: int = Field(default=64, ge=1)
    """Tokens over which it goes from all to nothing."""

    @model_validator(mode="after")
    def _said(self) -> Self:
        wanted, other = ("most", "target") if self.rule == "overlong" else ("target", "most")
        if getattr(self, wanted) is None or getattr(self, other) is not None:
            raise UserError(
                f"the length rule `{self.rule}` needs `{wanted}`, and no `{other}`",
                fix=f"{wanted}=512, without {other}",
            )
        if self.most is not None and self.slope > self.most:
            raise UserError(
                f"slope={self.slope} is more than most={self.most}", why="the empty answer would be too long",
                fix=f"slope={max(1, self.most // 4)}",
            )
        return self

    def judge(self, answer: Answer) -> Verdict:
        tokens = len(answer.tokens)
        if self.target is not None:
            return Verdict(max(0.0, 1.0 - abs(tokens - self.target) / self.slope))
        assert self.most is not None
        return Verdict(-min(1.0, max(0.0, (tokens - (self.most - self.slope)) / self.slope)))
