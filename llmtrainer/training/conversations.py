"""Conversations as the answers of a rollout: what was sampled, what rewards read of it, and what was earned."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np

from llmtrainer.base.errors import UserError
from llmtrainer.core.environment import Environment, Feedback
from llmtrainer.core.example import Message
from llmtrainer.core.ranks import Ranks
from llmtrainer.core.rollout import Answer, Prompt, Verdict
from llmtrainer.generation.sampler import Sampled, Sampler, require_version
from llmtrainer.generation.sampling import Sampling
from llmtrainer.tokenizer.chat import Chat
from llmtrainer.training.answers import Scores
from llmtrainer.training.turns import Conversation, Encoded, Spoken, converse

REWARD = "environment"
"""The name of what an environment gives, beside the rewards of a recipe."""


@dataclass(frozen=True)
class Talking:
    """With whom a policy talks, and how it reads what is said."""

    environment: Environment
    encoded: Encoded
    context: int
    """Tokens that the policy reads at most."""

    def talks(
        self, sampler: Sampler, prompts: Sequence[Prompt], each: int, sampling: Sampling, seed: int, spoken: Spoken,
        first_row: int = 0,
    ) -> list[Conversation]:
        """`each` conversations about every prompt, those of the first prompt first; their numbers begin at
        `first_row`."""
        return converse(
            sampler, prompts, each, sampling, seed, self.environment, spoken, self.encoded, self.context, first_row
        )  # fmt: skip


def encoder(chat: Chat) -> Encoded:
    """How a policy reads feedback: in its role and by the template where the prompt is in one; else as lines of their
    own, as a base model goes on with them."""

    def encoded(talk: Conversation, feedback: Feedback) -> Sequence[int]:
        prompt = talk.prompt
        if prompt.plain or not prompt.messages:
            return chat.tokenizer.encode_continuation(f"\n{feedback.text}\n")
        ended = talk.tokens[-1] in chat.end_ids
        return chat.behind_answer(prompt.messages, Message(feedback.role, feedback.text), ended=ended)

    return encoded


def sampled_of(talk: Conversation) -> Sampled:
    """All turns of the policy as one answer. UserError where different weights wrote them."""
    turns = [turn for _, turn in talk.written if isinstance(turn, Sampled)]
    assert turns and len(turns) == len(talk.written), "a sampler of rollouts writes a conversation"
    require_version(turns, turns[0].version)
    kept = None
    if any(turn.kept is not None for turn in turns):
        kept = tuple(one for turn in turns for one in turn.kept or (None,) * len(turn.tokens))
    return replace(
        turns[0], tokens=tuple(token for turn in turns for token in turn.tokens), finish=turns[-1].finish, kept=kept,
        logp=np.concatenate([turn.logp for turn in turns]),
        sampled_logp=np.concatenate([turn.sampled_logp for turn in turns]),
    )  # fmt: skip


def answer_of(talk: Conversation) -> Answer:
    """What a reward reads of a conversation: the policy's last turn as an answer to all that was said before it, and
    the ids of all its turns."""
    prompt, said = talk.prompt.messages, talk.said
    if prompt:
        for text, heard in zip(said[:-1], talk.heard, strict=False):    # the last turn may have been heard too
            prompt = (*prompt, Message("assistant", text), Message(heard.role, heard.text))
    tokens = tuple(token for _, turn in talk.written for token in turn.tokens)
    return Answer(prompt, said[-1], tokens, talk.finish, talk.prompt.facts)


def require_rewarded(talks: Sequence[Conversation], ranks: Ranks) -> None:
    """UserError where the environment says of no conversation of any rank what it is worth."""
    known = sum(talk.reward is not None or talk.end == "failed" for talk in talks)
    if not ranks.sum({"known": float(known)})["known"]:
        raise UserError(
            "nothing says what a conversation is worth", where="rollout.environment, rollout.rewards",
            why="the environment gave no reward for any turn, and there are no other rewards",
            fix='return True, "", 1.0 from the environment, or rollout.rewards=\'[{kind: numeric}]\'',
        )


def with_own_reward(scores: Scores, talks: Sequence[Conversation], needed: bool) -> Scores:
    """What rewards say of conversations, and what the environment gave added to it. One that an exception ended has no
    reward at all. needed: whether nothing else says what a conversation is worth."""
    nothing = np.nan if needed else 0.0
    own_R = np.array([
        np.nan if talk.end == "failed" else nothing if talk.reward is None else talk.reward for talk in talks
    ])  # fmt: skip
    verdicts = [Verdict(talk.reward, talk.error) for talk in talks]
    return Scores(scores.total_R + own_R, {**scores.verdicts, REWARD: verdicts})
