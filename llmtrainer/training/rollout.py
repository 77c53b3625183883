"""The source of rows that the policy writes itself: prompts -> answers -> rewards -> credit -> micro-batches."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from llmtrainer.base.errors import UserError
from llmtrainer.core.batch import ADVANTAGE, REFERENCE, ROLLOUT, Batch, Outputs
from llmtrainer.core.credit import FRESH
from llmtrainer.core.objective import Objective
from llmtrainer.core.randomness import derive
from llmtrainer.core.ranks import ALONE, Ranks
from llmtrainer.core.rollout import Rollout
from llmtrainer.data.branches import AnswerRows, collate_comparisons, no_comparison, read_tokens
from llmtrainer.data.budget import cut_step
from llmtrainer.data.prompts import Prompts
from llmtrainer.generation.sampler import drawn_signals, require_version
from llmtrainer.training.asynchronous import Ahead
from llmtrainer.training.conversations import REWARD
from llmtrainer.training.following import Following
from llmtrainer.training.gathering import Gathering
from llmtrainer.training.held import Gathered, Held, packed, packed_ahead, unpacked, unpacked_ahead
from llmtrainer.training.recipe import Rollouts
from llmtrainer.training.row_signals import nothing_of, places_of, read_back, with_row_signals

UNREWARDED, REJECTED = "unrewarded", "rejected"
"""Why nothing of a prompt is learned: no answer has a reward, or the objective takes none of them."""
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
        self, prompts: Prompts, gathering: Gathering | None, objective: Objective, settings: Rollouts, *,
        tokens_per_batch: int, seed: int, vocabulary: int,
        look: Look, reference: Look | None, version: Callable[[], str], tell: Callable[[Mapping[str, Any]], None],
        following: Following | None = None, ahead: Callable[[int], Ahead] | None = None, ranks: Ranks = ALONE,
        whole: Callable[[], AbstractContextManager[None]] = nullcontext,
    ) -> None:  # fmt: skip
        """gathering: writes answers here; None: nobody does. look, reference: what the policy and the reference say
        now. version: hash of the policy's weights. tell: shows what a rollout came to. ahead: makes, of the
        number of steps of a rollout, the process that writes what is learned; None: it is written here. whole: until
        its block ends, this process has the whole policy and may read it alone."""
        assert gathering is not None or ahead is not None
        self._earns = ADVANTAGE in objective.reads
        (require_rewards if self._earns else require_no_rewards)(settings)
        self._prompts, self._gathering, self._objective, self._settings = prompts, gathering, objective, settings
        self._seed, self._vocabulary = seed, vocabulary
        self._look, self._reference, self._version, self._tell = look, reference, version, tell
        self._tokens_per_batch, self._following, self._ranks = tokens_per_batch, following, ranks
        self._whole = whole
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
        self._ahead = None if ahead is None else ahead(self.steps_per_rollout)
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
        if self._ahead is not None:
            begun = 0 if self._held is None else self._held.number + 1
            self._ahead.publish(step, begun, self._cursor)
        if self._held is None or self._held.number != number:
            assert place == 0, "a rollout is gathered at its first step, and kept in every checkpoint after it"
            self._held = self._credited(self._gathered(number))
        return self._cut(self._held, place % self._parts)

    def told(self) -> Mapping[str, float]:
        """What the rollout came to that the last step belongs to."""
        return {} if self._held is None else self._held.figures

    def state(self) -> dict[str, Tensor]:
        """What a checkpoint keeps: the prompts drawn so far, running statistics, the rollout that is learned, and those
        that are written ahead. Waits for what is being written: its weights are older than those of the checkpoint."""
        more = {} if self._following is None else self._following.state()
        waiting = () if self._ahead is None else self._ahead.settled()
        return {**packed(self._held, self._cursor, self._state), **packed_ahead(waiting), **more}

    def load_state(self, state: Mapping[str, Tensor]) -> None:
        """Go on where `state` was taken, in the middle of a rollout too."""
        self._held, self._cursor, self._state = unpacked(state)
        if self._ahead is not None:
            self._ahead.load(unpacked_ahead(state))
        if self._following is not None:
            self._following.load_state(state)

    def examined(self, prompts: Prompts) -> dict[str, float]:
        """What greedy answers to some prompts earn now, one to each. Nothing of it is learned or remembered."""
        assert self._gathering is not None
        return self._gathering.examined(prompts)

    def close(self) -> None:
        if self._ahead is not None:
            self._ahead.close()
        if self._gathering is not None:
            self._gathering.close()

    def _gathered(self, number: int) -> Gathered:
        if self._ahead is not None:
            found = self._ahead.take(number)
        else:
            assert self._gathering is not None
            with self._whole():
                self._gathering.sampler.sync()
                found = self._gathering.gathered(number, self._cursor)
                # Before anything is learned from them: other weights than the trained must not have written answers.
                require_version(found.held.written, self._version())
        self._cursor = found.drawn.stop
        return found

    def _credited(self, gathered: Gathered) -> Held:
        """The rollout with what its answers are worth to the policy as it is now."""
        held = gathered.held
        if held.number and self._following is not None:
            self._following.step()
        if self._asks:
            held = self._looked(held)
        rollout, objective = held.rollout, self._objective
        before, self._state = self._state, objective.advance(self._state, rollout)
        # What a rollout makes of the divergence's weight is the price of the next one (arXiv:1909.08593, section 2.2).
        state = replace(self._state, kl=before.kl)
        returns = objective.returns(rollout, state)
        trained_R = objective.trains(rollout)
        figures = {**held.figures, "rollout/trained": float(trained_R.mean())}
        self._tell({
            "rollout": held.number, **figures, "version": rollout.version,
            "drawn": [gathered.drawn.start, gathered.drawn.stop], "left_out": _left_out(gathered, trained_R),
            "samples": list(gathered.samples),
        })  # fmt: skip
        return replace(
            held, figures=figures, advantages=tuple(objective.credit(rollout, state)) if self._earns else None,
            returns=None if returns is None else tuple(returns),
        )

    @property
    def _asks(self) -> tuple[str, ...]:
        """What the policy must say of its answers before they are learned. Answers that are learned in one single step
        need not be asked about: there the policy that writes is the one that is trained."""
        objective = self._objective
        changes = self._earns and self.steps_per_rollout > 1
        compares = changes or ROLLOUT in objective.reads or REFERENCE in objective.reads
        return (("logp",) if compares else ()) + (("value",) if "value" in objective.wants else ())

    def _looked(self, held: Held) -> Held:
        """The rollout with what policy, critic and reference say of every token that was written. Each rank asks about
        the answers of its own micro-batches."""
        rollout = held.rollout
        names = ["trainer_logp"] * ("logp" in self._asks) + ["values"] * ("value" in self._asks)
        names += ["reference_logp"] * (self._reference is not None)
        found = {name: [np.zeros(len(tokens)) for tokens in rollout.answers] for name in names}
        for part in range(self._parts):
            for batch, rows in self._packed(held, self._chosen(held, part, rollout.valid_R)):
                out = self._look(batch, self._asks)
                said = {"trainer_logp": out.logp_BT, "values": out.value_BT}
                if self._reference is not None:
                    said["reference_logp"] = self._reference(batch, ("logp",)).logp_BT
                for name, into in found.items():
                    value_BT = said[name]
                    assert value_BT is not None
                    for row, value in zip(rows, read_back(batch, value_BT), strict=True):
                        into[row][rollout.weights[row] > 0] = value
        said_of = {name: self._of_all_ranks(arrays) for name, arrays in found.items()}
        return replace(held, rollout=replace(
            rollout, trainer_logp=said_of.get("trainer_logp"), values=said_of.get("values"),
            reference_logp=said_of.get("reference_logp"),
        ))  # fmt: skip

    def _of_all_ranks(self, arrays: Sequence[NDArray[Any]]) -> tuple[NDArray[Any], ...]:
        """Arrays of which each rank has filled its own places, whole: everywhere else it has 0."""
        if self._ranks.world_size == 1:
            return tuple(arrays)
        told = self._ranks.gather(torch.from_numpy(np.concatenate(arrays)))
        return tuple(np.split(torch.stack(told).sum(0).numpy(), np.cumsum([len(array) for array in arrays])[:-1]))

    def _cut(self, held: Held, part: int) -> list[Batch]:
        trained_R = self._objective.trains(held.rollout)
        several = self.steps_per_rollout > 1
        nothing = {name: value[:0] for name, value in held.signals(0, several).items()}
        return [
            with_row_signals(batch, [held.signals(row, several) for row in rows]) if rows
            else batch.with_signals(nothing_of(batch, nothing))
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
        """This rank's micro-batches of whole groups, as many on every rank, each with the numbers of its answers in the
        order of its sequences."""
        if not groups:
            return
        items = [_rows_of(held.rollout, rows) for rows in groups]
        read = read_tokens(
            np.array([sum(map(len, item.rows)) for item in items]), np.array([len(item.rows) for item in items]),
            np.array([item.shared for item in items]), self._settings.share_prompt,
        )  # fmt: skip
        cut = cut_step(read, max(self._tokens_per_batch, int(read.max())), self._ranks.world_size)
        for places in cut[self._ranks.rank]:
            if not len(places):
                yield no_comparison(self._answers + self._ranks.rank, liked=False, margin=False), []
                continue
            chosen = [items[place] for place in places.tolist()]
            batch = collate_comparisons(chosen, share=self._settings.share_prompt, liked=False, margin=False)
            rows = [row for place in places.tolist() for row in groups[place]]
            placed = [(targets, held.written[row]) for targets, row in zip(places_of(batch), rows, strict=True)]
            drawn = drawn_signals(placed, (1, batch.tokens_BT.shape[1]), self._vocabulary)
            yield replace(batch, signals=drawn), rows


def _left_out(gathered: Gathered, trained_R: NDArray[np.bool_]) -> dict[str, list[int]]:
    """The prompts that were drawn and of which no answer is learned, by the reason."""
    found = {reason: list(draws) for reason, draws in gathered.left_out.items()}
    rollout = gathered.held.rollout
    for group, draw in enumerate(gathered.draws):
        mine_R = rollout.group_R == group
        if not trained_R[mine_R].any():
            found.setdefault(REJECTED if rollout.valid_R[mine_R].any() else UNREWARDED, []).append(draw)
    return found


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
