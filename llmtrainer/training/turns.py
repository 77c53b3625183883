"""Conversations of several turns: a sampler writes the policy's turns, an environment answers each of them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import dataclass, field
from typing import Any, Literal, NamedTuple, Protocol

import numpy as np
from numpy.typing import NDArray

from llmtrainer.base.errors import UserError
from llmtrainer.core.environment import Environment, Episode, Feedback
from llmtrainer.core.randomness import derive
from llmtrainer.core.rollout import Prompt
from llmtrainer.generation.sampling import Sampling

End = Literal["done", "turns", "errors", "length", "failed"]
"""The environment said so; the limits of turns or of errors; too long; or the environment raised."""


class Turn(Protocol):
    """What is needed of a completion."""

    @property
    def tokens(self) -> tuple[int, ...]: ...

    @property
    def finish(self) -> str: ...

    @property
    def logp(self) -> NDArray[np.float64]: ...


class Sampler(Protocol):
    """Whoever writes turns: the answers to `prompts`, `each` to a prompt, in order; draws depend on the numbers of the
    rows."""

    def sample(
        self, prompts: Sequence[Sequence[int]], each: int, sampling: Sampling, seed: int, *, rows: Sequence[int]
    ) -> Sequence[Turn]: ...


class Limits(NamedTuple):
    """When a conversation ends that its environment would go on with."""

    turns: int
    errors: int
    tokens: int
    """Behind the prompt."""
    context: int | None
    """Tokens that the policy reads at most, the prompt among them; None: any number."""
    next_turn: int
    """Tokens that a turn may have."""

    def room(self, talk: Conversation) -> int:
        """Tokens that may follow the prompt."""
        return self.tokens if self.context is None else min(self.tokens, self.context - len(talk.prompt.tokens))


@dataclass
class Conversation:
    """What came of one prompt: what is trained, and what people read."""

    prompt: Prompt
    tokens: list[int] = field(default_factory=list)
    """What follows the prompt: sampled ids, and between turns what the environment said."""
    weights: list[float] = field(default_factory=list)
    """1 for each sampled token, 0 for each that the environment said."""
    logp: list[float] = field(default_factory=list)
    """Log-probability of each sampled token when it was drawn; 0 where the weight is 0."""
    written: list[tuple[int, Turn]] = field(default_factory=list)
    """The policy's turns as the sampler gave them, each with its place in `tokens`: from what each token was drawn."""
    said: list[str] = field(default_factory=list)
    """Texts of the policy's turns."""
    heard: list[Feedback] = field(default_factory=list)
    """What the environment said to each of them."""
    end: End | None = None
    """Why it ended; None while it goes on."""
    finish: str = ""
    """`finish` of the last turn."""
    error: str | None = None
    """The name of the environment's exception, where one ended it."""

    @property
    def reward(self) -> float | None:
        """The sum of what the environment gave for turns; None where it gave nothing or failed."""
        given = [feedback.reward for feedback in self.heard if feedback.reward is not None]
        return sum(given) if given and self.end != "failed" else None

    @property
    def errors(self) -> int:
        """Turns at the end that the environment could not use."""
        used = [place for place, feedback in enumerate(self.heard) if not feedback.error]
        return len(self.heard) - (used[-1] + 1 if used else 0)

    def write(self, turn: Turn, text: str) -> None:
        """Add a turn of the policy."""
        assert len(turn.tokens) == len(turn.logp), "a completion has one log-probability for each of its tokens"
        self.written.append((len(self.tokens), turn))
        self.tokens += turn.tokens
        self.weights += [1.0] * len(turn.tokens)
        self.logp += map(float, turn.logp)
        self.said.append(text)
        self.finish = turn.finish

    def read(self, tokens: Sequence[int]) -> None:
        """Add what the environment said."""
        self.tokens += tokens
        self.weights += [0.0] * len(tokens)
        self.logp += [0.0] * len(tokens)


Spoken = Callable[[Sequence[int], Turn], str]
"""The text of a turn, without control tokens, and the ids before it."""
Encoded = Callable[[Conversation, Feedback], Sequence[int]]
"""The ids that show a feedback to the policy, up to where its next turn begins: the end of its own turn where a
template has one that was not sampled, the feedback in its role, and what opens an assistant's turn."""


def converse(
    sampler: Sampler, prompts: Sequence[Prompt], each: int, sampling: Sampling, seed: int, environment: Environment,
    spoken: Spoken, encoded: Encoded, context: int | None = None, first_row: int = 0,
) -> list[Conversation]:
    """`each` conversations about every prompt, those of the first prompt first.

    All that are still open are sampled together, turn by turn: each is a function of (weights, its prompt, sampling,
    seed, its number) where the environment is one of what it was told, however many threads it has. Numbers begin at
    `first_row`. context: tokens that the policy reads at most. Raises what the environment raised, with its own
    traceback, of the first conversation in order where several did; UserError always.
    """
    talks = [Conversation(prompt) for prompt in prompts for _ in range(each)]
    limits = Limits(
        environment.max_turns, environment.max_errors, environment.max_tokens, context, sampling.max_new_tokens
    )
    forgiving = environment.exceptions == "fail"
    with ExitStack() as stack:
        pool = stack.enter_context(ThreadPoolExecutor(environment.workers, thread_name_prefix="environment"))
        episodes: list[Episode] = []
        for talk in talks:
            episodes.append(environment.begin(talk.prompt))
            stack.callback(episodes[-1].close)
        for number in range(limits.turns):
            active = [place for place, talk in enumerate(talks) if talk.end is None]
            if not active:
                break
            asked = [[*talks[place].prompt.tokens, *talks[place].tokens] for place in active]
            written = sampler.sample(
                asked, 1, sampling, derive(seed, "turn", number), rows=[first_row + place for place in active]
            )  # fmt: skip
            assert len(written) == len(active), f"{len(written)} completions of {len(active)} prompts"
            for place, turn in zip(active, written, strict=True):
                talks[place].write(turn, spoken([*talks[place].prompt.tokens, *talks[place].tokens], turn))
            waiting = [pool.submit(_answer, episodes[place], talks[place], forgiving) for place in active]
            answers = _all(waiting)
            for place, feedback in zip(active, answers, strict=True):
                _go_on(talks[place], feedback, limits, encoded)
    return talks


def _answer(episode: Episode, talk: Conversation, forgiving: bool) -> Feedback | str:
    """What the environment says; the name of its exception where that costs only the conversation."""
    try:
        return episode.step(talk.said[-1])
    except UserError:
        raise
    except Exception as error:
        if not forgiving:
            raise
        return type(error).__name__


def _all(waiting: Sequence[Any]) -> list[Feedback | str]:
    """The results in order, once all have ended: no thread goes on behind an exception."""
    for future in waiting:
        future.exception()
    return [future.result() for future in waiting]


def _go_on(talk: Conversation, feedback: Feedback | str, limits: Limits, encoded: Encoded) -> None:
    """Note what the environment said, and end the conversation or prepare its next turn."""
    if isinstance(feedback, str):
        talk.end, talk.error = "failed", feedback
        return
    talk.heard.append(feedback)
    if feedback.done:
        talk.end = "done"
    elif talk.errors >= limits.errors:
        talk.end = "errors"
    elif talk.finish == "length":
        talk.end = "length"     # its turn has no end to which anything could be said
    elif len(talk.said) == limits.turns:
        talk.end = "turns"
    else:
        heard = encoded(talk, feedback)
        if len(talk.tokens) + len(heard) + limits.next_turn > limits.room(talk):
            talk.end = "length"
        else:
            talk.read(heard)
