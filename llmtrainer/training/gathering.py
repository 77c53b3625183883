"""Prompts to answers to rewards: the part of a rollout that needs no trainer, so that another process can do it."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass

from llmtrainer.core.randomness import derive
from llmtrainer.core.ranks import ALONE, Ranks, share_of
from llmtrainer.core.rollout import Answer, Prompt
from llmtrainer.data.prompts import Prompts
from llmtrainer.generation.sampler import Sampled, Sampler
from llmtrainer.generation.sampling import Sampling
from llmtrainer.training.answers import Group, examined_figures, figures_of, joined, samples_of, scored
from llmtrainer.training.conversations import Talking, answer_of, require_rewarded, sampled_of, with_own_reward
from llmtrainer.training.groups_of_ranks import of_all_ranks
from llmtrainer.training.held import SECONDS, Gathered, Held
from llmtrainer.training.recipe import Rollouts
from llmtrainer.training.turns import Conversation, Turn

EVEN = "even"
"""Why a prompt that was drawn is not learned: its answers all earned the same, and others took its place."""


@dataclass(frozen=True)
class Unscored:
    """Answers that no reward has seen yet."""

    draws: range
    """Of all ranks."""
    prompts: Sequence[Prompt]
    """This rank's share of them, as all that follows."""
    written: Sequence[Sampled]
    answers: Sequence[Answer]
    talks: Sequence[Conversation]
    """The conversations that the answers are, where an environment takes part."""
    started: float
    """When the first of them was begun, on this machine's clock."""


class Gathering:
    """Writes and scores the answers of rollouts: a function of (seed, first draw) and of the sampler's weights. Each
    rank does so for its share of the prompts; then all know all answers."""

    def __init__(
        self, prompts: Prompts, sampler: Sampler, settings: Rollouts, *, text: Callable[[Sequence[int], Turn], str],
        seed: int, earns: bool, talking: Talking | None = None, ranks: Ranks = ALONE,
    ) -> None:  # fmt: skip
        """text: an answer as rewards read it, from the ids of its prompt. earns: whether somebody learns from what an
        answer is worth. talking: with whom the policy talks for several turns; None: it answers once."""
        self.prompts, self.sampler, self._settings = prompts, sampler, settings
        self._text, self._seed, self._earns, self._talking, self._ranks = text, seed, earns, talking, ranks

    @property
    def _needs_environment(self) -> bool:
        """Whether nothing but the environment says what a conversation is worth."""
        return self._talking is not None and self._earns and not self._settings.rewards

    @property
    def redraws(self) -> bool:
        """Whether what answers earned decides which prompts come next."""
        return self._settings.redraw > 0

    def gathered(self, number: int, first: int) -> Gathered:
        """Rollout `number`, of the prompts from draw `first` on."""
        started, cursor = time.perf_counter(), first
        kept: list[tuple[int, Group]] = []
        even: list[int] = []
        wanted = self.prompts.prompts_per_step
        for attempt in range(1 + self._settings.redraw):
            last = attempt == self._settings.redraw
            unscored = self.unscored(cursor, wanted)
            cursor = unscored.draws.stop
            for draw, group in self._groups(unscored):
                if last or group.teaches:
                    wanted -= 1
                    kept.append((draw, group))
                else:
                    even.append(draw)
            if not wanted:
                break
        return _gathered(number, range(first, cursor), kept, {EVEN: even} if even else {}, started)

    def unscored(self, first: int, wanted: int) -> Unscored:
        """Answers to so many prompts from draw `first` on."""
        started, draws = time.perf_counter(), range(first, first + wanted)
        seed = derive(self._seed, "rollout", first)
        return self._unscored(self.prompts, draws, self._settings.group_size, self._settings.sampling, seed, started)

    def scored(self, number: int, unscored: Unscored) -> Gathered:
        """The whole of rollout `number`, where no prompt is replaced by another."""
        assert not self.redraws
        return _gathered(number, unscored.draws, list(self._groups(unscored)), {}, unscored.started)

    def examined(self, prompts: Prompts) -> dict[str, float]:
        """What greedy answers to some prompts earn now, one to each. Nothing of it is learned or remembered."""
        greedy = self._settings.sampling.model_copy(update={"temperature": 0.0})
        self.sampler.sync()
        unscored = self._unscored(prompts, prompts.draws(0), 1, greedy, derive(self._seed, "examined"), 0.0)
        return examined_figures(figures_of([group for _, group in self._groups(unscored)]))

    def close(self) -> None:
        self.sampler.close()

    def _unscored(
        self, prompts: Prompts, draws: range, G: int, sampling: Sampling, seed: int, started: float
    ) -> Unscored:
        """G answers to each prompt of this rank's share: what one process would write to them among all."""
        mine = share_of(draws, self._ranks)
        asked = [prompts.prompt(draw) for draw in mine]
        first_row = draws.index(mine[0]) * G if mine else 0
        return Unscored(draws, asked, *self._written(asked, G, sampling, seed, first_row), started)

    def _written(
        self, prompts: Sequence[Prompt], G: int, sampling: Sampling, seed: int, first_row: int
    ) -> tuple[Sequence[Sampled], Sequence[Answer], Sequence[Conversation]]:
        """G answers to each prompt."""
        if self._talking is not None:
            talks = self._talking.talks(self.sampler, prompts, G, sampling, seed, self._text, first_row)
            return [sampled_of(talk) for talk in talks], list(map(answer_of, talks)), talks
        rows = [first_row + number * G for number in range(len(prompts))]
        written = self.sampler.sample([prompt.tokens for prompt in prompts], G, sampling, seed, rows=rows)
        asked = [prompt for prompt in prompts for _ in range(G)]
        answers = [
            Answer(prompt.messages, self._text(prompt.tokens, one), one.tokens, one.finish, prompt.facts)
            for prompt, one in zip(asked, written, strict=True)
        ]
        return written, answers, ()

    def _groups(self, unscored: Unscored) -> Iterator[tuple[int, Group]]:
        """Every group with what it earned, by its draw."""
        if self._needs_environment:
            require_rewarded(unscored.talks, self._ranks)
        own = self._own_groups(unscored) if unscored.prompts else []
        yield from zip(unscored.draws, of_all_ranks(own, self._ranks), strict=True)

    def _own_groups(self, unscored: Unscored) -> list[Group]:
        answers, talks, rewards = unscored.answers, unscored.talks, self._settings.rewards
        G = len(answers) // len(unscored.prompts)
        scores = scored(rewards, answers)
        if talks:
            scores = with_own_reward(scores, talks, needed=self._needs_environment)
        slices = [slice(place * G, place * G + G) for place in range(len(unscored.prompts))]
        return [
            Group(
                prompt, tuple(unscored.written[part]), tuple(answers[part]), scores.total_R[part],
                scores.of(part), tuple(talks[part]),
            )
            for prompt, part in zip(unscored.prompts, slices, strict=True)
        ]  # fmt: skip


def _gathered(
    number: int, drawn: range, kept: Sequence[tuple[int, Group]], left_out: Mapping[str, Sequence[int]],
    started: float,
) -> Gathered:  # fmt: skip
    draws, groups = tuple(draw for draw, _ in kept), [group for _, group in kept]
    figures = {**figures_of(groups), SECONDS: time.perf_counter() - started}
    held = Held(number, joined(groups), tuple(one for group in groups for one in group.written), figures=figures)
    return Gathered(held, drawn, draws, left_out, samples_of(groups))
