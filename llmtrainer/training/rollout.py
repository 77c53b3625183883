"""The source of rows that the policy writes itself: prompts -> answers -> rewards -> credit -> micro-batches."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any, Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from llmtrainer.base.errors import UserError
from llmtrainer.core.batch import ADVANTAGE, OLD, ROLLOUT, Batch
from llmtrainer.core.objective import Objective
from llmtrainer.core.randomness import derive
from llmtrainer.core.rollout import Answer, Prompt
from llmtrainer.data.budget import cut_step
from llmtrainer.data.collate import Row, end_to_end
from llmtrainer.data.prompts import Prompts
from llmtrainer.generation.loop import Completion
from llmtrainer.training.answers import Group, figures_of, joined, samples_of, scored
from llmtrainer.training.held import Held, packed, unpacked
from llmtrainer.training.recipe import Rollouts


class Writer(Protocol):
    """Who writes answers: the policy as it is when asked."""

    def write(self, prompts: Sequence[Sequence[int]], seed: int) -> list[Completion]:
        """One answer to each prompt, with log-probabilities. Equal prompts are read once."""
        ...

    def version(self) -> str:
        """Hash of the weights that write."""
        ...

    def text(self, prompt: Sequence[int], answer: Completion) -> str:
        """What was written, as a reward reads it."""
        ...


class RolloutSource:
    """Step -> micro-batches of answers that the policy wrote, learned for some steps and then replaced.

    Step n belongs to rollout n div k, k the steps of a rollout. Which prompts that is, and every draw of sampling, is
    a function of (seed, rollout); the answers follow from the weights as they are when it begins. So what a checkpoint
    inside of a rollout needs besides the weights is the rollout itself: `state`.
    """

    def __init__(
        self, prompts: Prompts, writer: Writer, objective: Objective, settings: Rollouts, *,
        tokens_per_batch: int, seed: int,
        look: Callable[[Batch], Tensor], tell: Callable[[Mapping[str, Any]], None],
    ) -> None:  # fmt: skip
        """look: what the policy gives each target now, [B, T]. tell: shows what a rollout came to."""
        require_rewards(settings)
        self._prompts, self._writer, self._objective, self._settings = prompts, writer, objective, settings
        self._seed, self._look, self._tell, self._tokens_per_batch = seed, look, tell, tokens_per_batch
        self._answers = prompts.prompts_per_step * settings.group_size
        self.rows_per_step = settings.answers_per_step or self._answers
        """Answers of one step over all ranks."""
        if self._answers % self.rows_per_step:
            raise UserError(
                f"{self._answers:,} answers of a rollout are no whole number of steps of {self.rows_per_step:,}",
                where="data.prompts_per_step x rollout.group_size, rollout.answers_per_step",
                why="an answer would be learned by a policy that did not write it, or by none",
                fix=f"rollout.answers_per_step={self._answers}, or a divisor of it",
            )
        self.steps_per_rollout = settings.epochs * self._answers // self.rows_per_step
        self.fingerprint = prompts.fingerprint
        self._held: Held | None = None
        self._cursor = 0

    def epochs(self, step: int) -> float:
        """Passes over the prompts after so many steps."""
        rollouts = -(-step // self.steps_per_rollout)
        return max(rollouts, self._cursor / self._prompts.prompts_per_step) * self._prompts.epochs(1)

    def batches(self, step: int) -> list[Batch]:
        """The micro-batches of a step; a rollout is gathered when its first step is asked for."""
        number, part = divmod(step, self.steps_per_rollout)
        if self._held is None or self._held.number != number:
            assert part == 0, "a rollout is gathered at its first step, and kept in every checkpoint after it"
            self._held = self._gathered(number)
        if part == 0:
            require_version(self._held.rollout.version, self._writer.version())
        return self._cut(self._held, part)

    def told(self) -> Mapping[str, float]:
        """What the rollout came to that the last step belongs to."""
        return {} if self._held is None else self._held.figures

    def state(self) -> dict[str, Tensor]:
        """What a checkpoint keeps: the prompts drawn so far, and the rollout that is being learned."""
        state = {"cursor": torch.tensor(self._cursor)}
        return state if self._held is None else state | packed(self._held)

    def load_state(self, state: Mapping[str, Tensor]) -> None:
        """Go on where `state` was taken, in the middle of a rollout too."""
        self._cursor = int(state["cursor"])
        self._held = unpacked(state) if "number" in state else None

    def close(self) -> None:
        """Nothing runs beside the trainer."""

    def _gathered(self, number: int) -> Held:
        started = time.perf_counter()
        groups = list(self._groups())
        rollout = joined(groups, self._writer.version())
        advantages = tuple(self._objective.credit(rollout))
        held = Held(number, rollout, advantages, (), {})
        if self.steps_per_rollout > 1:
            looked = tuple(self._looked(held, part) for part in range(self.steps_per_rollout))
            held = replace(held, old_logp=looked)
        figures = {**figures_of(groups), "rollout/seconds": time.perf_counter() - started}
        self._tell({"rollout": number, **figures, "samples": samples_of(groups)})
        return replace(held, figures=figures)

    def _groups(self) -> Iterator[Group]:
        """As many groups as a rollout has, of the next prompts."""
        wanted = self._prompts.prompts_per_step
        for attempt in range(1 + self._settings.redraw):
            last = attempt == self._settings.redraw
            for group in self._written([self._prompts.prompt(self._cursor + n) for n in range(wanted)]):
                if last or group.teaches:
                    wanted -= 1
                    yield group
            if not wanted:
                return

    def _written(self, prompts: Sequence[Prompt]) -> list[Group]:
        G, seed = self._settings.group_size, derive(self._seed, "rollout", self._cursor)
        self._cursor += len(prompts)
        asked = [prompt for prompt in prompts for _ in range(G)]
        written = self._writer.write([prompt.tokens for prompt in asked], seed)
        answers = [
            Answer(
                prompt.messages, self._writer.text(prompt.tokens, one), one.tokens, one.finish, prompt.facts
            )
            for prompt, one in zip(asked, written, strict=True)
        ]
        parts = {reward.title: scored(reward, answers) for reward in self._settings.rewards}
        total_R = np.sum([reward.weight * parts[reward.title] for reward in self._settings.rewards], axis=0)
        slices = [slice(at, at + G) for at in range(0, len(asked), G)]
        return [
            Group(
                prompt, tuple(written[part]), tuple(answers[part]), total_R[part],
                {name: scores[part] for name, scores in parts.items()},
            )
            for prompt, part in zip(prompts, slices, strict=True)
        ]

    def _looked(self, held: Held, part: int) -> tuple[NDArray[Any], ...]:
        """What the policy gives the learned tokens of each answer of a step, where they stand in it."""
        chosen = self._chosen(held, part)
        found: dict[int, NDArray[Any]] = {}
        for batch, places in self._packed([self._row(held, answer, None) for answer in chosen]):
            logp_BT = self._look(batch).cpu()
            counted_BT = batch.weights_BT > 0
            for sequence, place in enumerate(places):
                found[place] = logp_BT[counted_BT & (batch.sequence_BT == sequence)].numpy()
        return tuple(found[place] for place in range(len(chosen)))

    def _cut(self, held: Held, part: int) -> list[Batch]:
        chosen = self._chosen(held, part)
        old = held.old_logp[part] if held.old_logp else [None] * len(chosen)
        rows = [self._row(held, answer, logp) for answer, logp in zip(chosen, old, strict=True)]
        return [batch for batch, _ in self._packed(rows)]

    def _chosen(self, held: Held, part: int) -> list[int]:
        """The answers of one step that are trained. Every pass has an order of its own."""
        steps = self._answers // self.rows_per_step
        epoch, place = divmod(part, steps)
        random = np.random.default_rng(derive(self._seed, "answers", held.number, epoch))
        order = random.permutation(self._answers) if steps > 1 else np.arange(self._answers)
        numbers = order[place * self.rows_per_step : (place + 1) * self.rows_per_step]
        trained_R = self._objective.trains(held.rollout)
        return [int(number) for number in numbers if trained_R[number]]

    def _row(self, held: Held, answer: int, old_logp: NDArray[Any] | None) -> Row:
        rollout = held.rollout
        prompt, tokens, weights = rollout.prompts[answer], rollout.answers[answer], rollout.weights[answer]
        read = len(prompt) - 1
        told: dict[str, NDArray[Any]] = {
            _plain(ADVANTAGE): np.concatenate([np.zeros(read), held.advantages[answer]]).astype(np.float32)
        }
        if old_logp is not None:
            told[_plain(OLD)] = np.zeros(read + len(tokens), dtype=old_logp.dtype)
            told[_plain(OLD)][read:][weights > 0] = old_logp
        if ROLLOUT in self._objective.reads:
            told[_plain(ROLLOUT)] = np.concatenate([np.zeros(read), rollout.old_logp[answer]])
        counts = np.concatenate([np.zeros(len(prompt), dtype=np.float32), weights])
        whole = np.concatenate([prompt, tokens])
        return Row(whole, np.zeros(len(whole), dtype=np.int32), answer, counts, told=told)

    def _packed(self, rows: Sequence[Row]) -> Iterator[tuple[Batch, list[int]]]:
        """Micro-batches, each with the places of its rows among these."""
        if not rows:
            return
        read = np.array([row.inputs for row in rows], dtype=np.int64)
        (mine,) = cut_step(read, max(self._tokens_per_batch, int(read.max())))
        for places in mine:
            yield end_to_end([rows[place] for place in places.tolist()]), places.tolist()


def require_rewards(settings: Rollouts) -> None:
    """UserError where nothing says what an answer is worth, or two rewards have one name."""
    if not settings.rewards:
        raise UserError(
            "nothing says what an answer is worth", where="rollout.rewards",
            why="the policy learns to earn a reward",
            fix="rollout.rewards='[{kind: numeric}]' compares the number at the end with the record's `answer`",
        )
    names = [reward.title for reward in settings.rewards]
    if twice := sorted({name for name in names if names.count(name) > 1}):
        raise UserError(
            f"two rewards are called `{twice[0]}`", where="rollout.rewards", why="their figures would have one name",
            fix="give one of them another name: {kind: regex, name: form, ...}",
        )


def require_version(wrote: str, trains: str) -> None:
    """Refuse to learn the first step of a rollout with other weights than wrote it."""
    if wrote != trains:
        raise UserError(
            "the answers were written by other weights than those that are trained",
            why=f"their hash is {wrote[:16]}, the policy's {trains[:16]}: the ratio of a first step would not be 1",
            fix="have the sampler take the weights after every step: rollout.weights=shared",
        )


def _plain(signal: str) -> str:
    """A signal of each target, without its letters."""
    return signal.removesuffix("_BT")
