"""The source of rows that the policy writes itself: prompts -> answers -> rewards -> credit -> micro-batches."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from llmtrainer.base.errors import UserError
from llmtrainer.core.batch import ADVANTAGE, REFERENCE, ROLLOUT, Batch, Outputs
from llmtrainer.core.credit import FRESH
from llmtrainer.core.objective import Objective
from llmtrainer.core.randomness import derive
from llmtrainer.core.rollout import Answer, Prompt, Rollout
from llmtrainer.data.branches import AnswerRows, collate_comparisons, read_tokens
from llmtrainer.data.budget import cut_step
from llmtrainer.data.prompts import Prompts
from llmtrainer.generation.sampler import Sampled, Sampler, drawn_signals, require_version
from llmtrainer.generation.sampling import Sampling
from llmtrainer.training.answers import Group, examined_figures, figures_of, joined, samples_of, scored
from llmtrainer.training.conversations import REWARD, Talking, answer_of, sampled_of, with_own_reward
from llmtrainer.training.following import Following
from llmtrainer.training.held import SECONDS, Held, packed, unpacked
from llmtrainer.training.recipe import Rollouts
from llmtrainer.training.row_signals import places_of, read_back, with_row_signals
from llmtrainer.training.turns import Conversation, Turn

Look = Callable[[Batch, tuple[str, ...]], Outputs]
"""What a model says of a batch, without dropout and without a gradient."""


class RolloutSource:
    """Step -> micro-batches of answers that the policy wrote, learned for some steps and then replaced.

    Step n belongs to rollout n div k, k the steps of a rollout. Which prompts that is, and every draw of sampling, is
    a function of (seed, rollout); the answers follow from the weights as they are when it begins. So what a checkpoint
    inside of a rollout needs besides the weights is the rollout itself: `state`. Each pass cuts the answers into the
    same micro-batches, so that what the policy said of them when they were written is known to the last bit.
    """

    def __init__(
        self, prompts: Prompts, sampler: Sampler, objective: Objective, settings: Rollouts, *,
        text: Callable[[Sequence[int], Turn], str], tokens_per_batch: int, seed: int, vocabulary: int,
        look: Look, reference: Look | None, version: Callable[[], str], tell: Callable[[Mapping[str, Any]], None],
        following: Following | None = None, talking: Talking | None = None,
    ) -> None:  # fmt: skip
        """text: an answer as rewards read it, from the ids of its prompt. look, reference: what the policy and the
        reference say now. version: hash of the policy's weights. tell: shows what a rollout came to. talking: with
        whom the policy talks for several turns; None: it answers once."""
        self._earns = ADVANTAGE in objective.reads
        (require_rewards if self._earns else require_no_rewards)(settings)
        self._prompts, self._sampler, self._objective, self._settings = prompts, sampler, objective, settings
        self._text, self._seed, self._vocabulary = text, seed, vocabulary
        self._look, self._reference, self._version, self._tell = look, reference, version, tell
        self._tokens_per_batch, self._following, self._talking = tokens_per_batch, following, talking
        self._answers = prompts.prompts_per_step * settings.group_size
        self.rows_per_step = settings.answers_per_step or self._answers
        """Answers of one step over all ranks."""
        if self._answers % self.rows_per_step or self.rows_per_step % settings.group_size:
            raise UserError(
                f"a step of {self.rows_per_step:,} answers does not divide a rollout of {prompts.prompts_per_step:,} "
                f"groups of {settings.group_size:,}",
                where="rollout.answers_per_step",
                why="a step learns from whole groups, and every group is learned once in each pass",
                fix=f"rollout.answers_per_step={settings.group_size}, or a multiple of it that divides {self._answers}",
            )
        self._parts = self._answers // self.rows_per_step
        self.steps_per_rollout = settings.epochs * self._parts
        self.fingerprint = prompts.fingerprint
        self._held: Held | None = None
        self._cursor, self._state = 0, FRESH

    def epochs(self, step: int) -> float:
        """Passes over the prompts after so many steps."""
        rollouts = -(-step // self.steps_per_rollout)
        return max(rollouts, self._cursor / self._prompts.prompts_per_step) * self._prompts.epochs(1)

    def batches(self, step: int) -> list[Batch]:
        """The micro-batches of a step; a rollout is gathered when its first step is asked for."""
        number, place = divmod(step, self.steps_per_rollout)
        if self._held is None or self._held.number != number:
            assert place == 0, "a rollout is gathered at its first step, and kept in every checkpoint after it"
            self._held = self._gathered(number)
        return self._cut(self._held, place % self._parts)

    def told(self) -> Mapping[str, float]:
        """What the rollout came to that the last step belongs to."""
        return {} if self._held is None else self._held.figures

    def state(self) -> dict[str, Tensor]:
        """What a checkpoint keeps: the prompts drawn so far, running statistics, and the rollout that is learned."""
        more = {} if self._following is None else self._following.state()
        return {**packed(self._held, self._cursor, self._state), **more}

    def load_state(self, state: Mapping[str, Tensor]) -> None:
        """Go on where `state` was taken, in the middle of a rollout too."""
        self._held, self._cursor, self._state = unpacked(state)
        if self._following is not None:
            self._following.load_state(state)

    def examined(self, prompts: Prompts) -> dict[str, float]:
        """What greedy answers to some prompts earn now, one to each. Nothing of it is learned or remembered."""
        greedy = self._settings.sampling.model_copy(update={"temperature": 0.0})
        self._sampler.sync()
        asked = [prompts.prompt(draw) for draw in prompts.draws(0)]
        groups = self._written(asked, 1, greedy, derive(self._seed, "examined"))
        return examined_figures(figures_of(groups))

    def close(self) -> None:
        self._sampler.close()

    def _gathered(self, number: int) -> Held:
        started = time.perf_counter()
        if number and self._following is not None:
            self._following.step()
        self._sampler.sync()
        groups = list(self._groups())
        written = tuple(one for group in groups for one in group.written)
        # Before anything is learned from them: other weights than the trained ones must not have written answers.
        require_version(written, self._version())
        seconds = time.perf_counter() - started
        held = Held(number, joined(groups), written)
        if self._asks:
            held = self._looked(held)
        rollout, objective = held.rollout, self._objective
        self._state = objective.advance(self._state, rollout)
        returns = objective.returns(rollout, self._state)
        figures = {
            **figures_of(groups), SECONDS: seconds,
            "rollout/trained": float(objective.trains(rollout).mean()),
        }
        self._tell({"rollout": number, **figures, "samples": samples_of(groups)})
        return replace(
            held, figures=figures, advantages=tuple(objective.credit(rollout, self._state)) if self._earns else None,
            returns=None if returns is None else tuple(returns),
        )

    def _groups(self) -> Iterator[Group]:
        """As many groups as a rollout has, of the next prompts."""
        wanted = self._prompts.prompts_per_step
        for attempt in range(1 + self._settings.redraw):
            last = attempt == self._settings.redraw
            first = self._cursor
            self._cursor += wanted
            asked = [self._prompts.prompt(draw) for draw in range(first, self._cursor)]
            seed = derive(self._seed, "rollout", first)
            for group in self._written(asked, self._settings.group_size, self._settings.sampling, seed):
                if last or group.teaches:
                    wanted -= 1
                    yield group
            if not wanted:
                return

    def _written(self, prompts: Sequence[Prompt], G: int, sampling: Sampling, seed: int) -> list[Group]:
        """G answers to each prompt, and what they earn."""
        if self._talking is not None:
            talks = self._talking.talks(self._sampler, prompts, G, sampling, seed, self._text)
            return self._grouped(prompts, [sampled_of(talk) for talk in talks], list(map(answer_of, talks)), talks)
        written = self._sampler.sample([prompt.tokens for prompt in prompts], G, sampling, seed)
        asked = [prompt for prompt in prompts for _ in range(G)]
        answers = [
            Answer(prompt.messages, self._text(prompt.tokens, one), one.tokens, one.finish, prompt.facts)
            for prompt, one in zip(asked, written, strict=True)
        ]
        return self._grouped(prompts, written, answers)

    def _grouped(
        self, prompts: Sequence[Prompt], written: Sequence[Sampled], answers: Sequence[Answer],
        talks: Sequence[Conversation] = (),
    ) -> list[Group]:  # fmt: skip
        G, rewards = len(answers) // len(prompts), self._settings.rewards
        scores = scored(rewards, answers)
        if talks:
            scores = with_own_reward(scores, talks, needed=self._earns and not rewards)
        slices = [slice(at, at + G) for at in range(0, len(answers), G)]
        return [
            Group(
                prompt, tuple(written[part]), tuple(answers[part]), scores.total_R[part], scores.of(part),
                tuple(talks[part]),
            )
            for prompt, part in zip(prompts, slices, strict=True)
        ]

    @property
    def _asks(self) -> tuple[str, ...]:
        """What the policy must say of its answers before they are learned. Answers that are learned in one single step
        need not be asked about: there the policy that writes is the one that is trained."""
        objective = self._objective
        changes = self._earns and self.steps_per_rollout > 1
        compares = changes or ROLLOUT in objective.reads or REFERENCE in objective.reads
        return (("logp",) if compares else ()) + (("value",) if "value" in objective.wants else ())

    def _looked(self, held: Held) -> Held:
        """The rollout with what policy, critic and reference say of every token that was written."""
        rollout = held.rollout
        found: dict[str, list[NDArray[Any]]] = {}
        for part in range(self._parts):
            for batch, rows in self._packed(held, self._chosen(held, part, rollout.valid_R)):
                out = self._look(batch, self._asks)
                said = {"trainer_logp": out.logp_BT, "values": out.value_BT}
                if self._reference is not None:
                    said["reference_logp"] = self._reference(batch, ("logp",)).logp_BT
                for name, value_BT in said.items():
                    if value_BT is not None:
                        into = found.setdefault(name, [np.zeros(len(tokens)) for tokens in rollout.answers])
                        for row, value in zip(rows, read_back(batch, value_BT), strict=True):
                            into[row][rollout.weights[row] > 0] = value
        said_of = {name: tuple(arrays) for name, arrays in found.items()}
        return replace(held, rollout=replace(
            rollout, trainer_logp=said_of.get("trainer_logp"), values=said_of.get("values"),
            reference_logp=said_of.get("reference_logp"),
        ))  # fmt: skip

    def _cut(self, held: Held, part: int) -> list[Batch]:
        trained_R = self._objective.trains(held.rollout)
        several = self.steps_per_rollout > 1
        return [
            with_row_signals(batch, [held.signals(row, several) for row in rows])
            for batch, rows in self._packed(held, self._chosen(held, part, trained_R))
        ]

    def _chosen(self, held: Held, part: int, wanted_R: NDArray[np.bool_]) -> list[list[int]]:
        """The answers of one step, group by group, of those that are wanted."""
        groups = self._answers // self._settings.group_size
        order = np.arange(groups)
        if self._parts > 1:
            order = np.random.default_rng(derive(self._seed, "answers", held.number)).permutation(groups)
        each = groups // self._parts
        members = [np.flatnonzero((held.rollout.group_R == group) & wanted_R) for group in order]
        return [rows.tolist() for rows in members[part * each : (part + 1) * each] if len(rows)]

    def _packed(self, held: Held, groups: Sequence[Sequence[int]]) -> Iterator[tuple[Batch, list[int]]]:
        """Micro-batches of whole groups, each with the numbers of its answers in the order of its sequences."""
        if not groups:
            return
        items = [_rows_of(held.rollout, rows) for rows in groups]
        read = read_tokens(
            np.array([sum(map(len, item.rows)) for item in items]), np.array([len(item.rows) for item in items]),
            np.array([item.shared for item in items]), self._settings.share_prompt,
        )  # fmt: skip
        (mine,) = cut_step(read, max(self._tokens_per_batch, int(read.max())))
        for places in mine:
            chosen = [items[place] for place in places.tolist()]
            batch = collate_comparisons(chosen, share=self._settings.share_prompt, liked=False, margin=False)
            rows = [row for place in places.tolist() for row in groups[place]]
            placed = [(targets, held.written[row]) for targets, row in zip(places_of(batch), rows, strict=True)]
            drawn = drawn_signals(placed, (1, batch.tokens_BT.shape[1]), self._vocabulary)
            yield replace(batch, signals=drawn), rows


def _rows_of(rollout: Rollout, rows: Sequence[int]) -> AnswerRows:
    prompt = rollout.prompts[rows[0]]
    nothing = np.zeros(len(prompt), dtype=np.float32)
    return AnswerRows(
        rows=tuple(np.concatenate([prompt, rollout.answers[row]]) for row in rows),
        weights=tuple(np.concatenate([nothing, rollout.weights[row]]) for row in rows),
        shared=len(prompt), first=rows[0], place=rows[0],
    )  # fmt: skip


def require_no_rewards(settings: Rollouts) -> None:
    """UserError where rewards, or what depends on them, are asked for and nobody would learn from them."""
    for name, given in (("rewards", settings.rewards), ("redraw", settings.redraw)):
        if given:
            raise UserError(
                f"rollout.{name} is set, and the objective asks for no reward", where=f"rollout.{name}",
                why="it learns what a teacher says of each answer, whatever the answer is worth",
                fix=f"remove rollout.{name}, or objective.kind=grpo",
            )


def require_rewards(settings: Rollouts) -> None:
    """UserError where nothing says what an answer is worth, or two rewards have one name."""
    if not settings.rewards and settings.environment is None:
        raise UserError(
            "nothing says what an answer is worth", where="rollout.rewards",
            why="the policy learns to earn a reward",
            fix="rollout.rewards='[{kind: numeric}]' compares the number at the end with the record's `answer`",
        )
    names = [reward.title for reward in settings.rewards] + ([REWARD] if settings.environment else [])
    if twice := sorted({name for name in names if names.count(name) > 1}):
        raise UserError(
            f"two rewards are called `{twice[0]}`", where="rollout.rewards", why="their figures would have one name",
            fix="give one of them another name: {kind: regex, name: form, ...}",
        )
