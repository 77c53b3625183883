"""Two objectives in one step: the main one, and another beside it on rows of its own."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any, cast

import numpy as np
import torch
from numpy.typing import NDArray
from pydantic import Field
from torch import Tensor

from llmtrainer.base.config import count_as_read
from llmtrainer.core.batch import BESIDE, Batch, Outputs
from llmtrainer.core.credit import FRESH, State
from llmtrainer.core.objective import Objective, Term, Unit
from llmtrainer.core.rollout import Rollout
from llmtrainer.objectives.causal_lm import CausalLM


class Mix(Objective):
    """The main objective, plus `weight` times another one, each averaged over its own sequences: reinforcement with
    pretraining beside it, so that a model does not forget (PPO-ptx, arXiv:2203.02155, eq. 2). The signal `beside_S`
    says which sequence is whose."""

    main: Objective = CausalLM()
    """What the run is about: `{kind: grpo}`, `{kind: ppo}`, `{kind: dpo}`."""

    beside: Objective = CausalLM()
    """What is learned beside it, on sequences of its own."""

    weight: float = Field(default=1.0, ge=0.0)
    """How much the other counts. 0: the run is that of the main objective, bit for bit."""

    @property
    def reads(self) -> tuple[str, ...]:
        mine = (BESIDE, *self.beside.reads) if self.weight else (BESIDE,)
        return tuple(dict.fromkeys((*self.main.reads, *mine)))

    @property
    def wants(self) -> tuple[str, ...]:
        return tuple(dict.fromkeys((*self.main.wants, *(self.beside.wants if self.weight else ()))))

    @property
    def starts_at(self) -> Mapping[str, float]:
        return self.main.starts_at

    @property
    def whole_steps(self) -> bool:
        return self.main.whole_steps or self.beside.whole_steps

    def terms(self, out: Outputs, batch: Batch) -> list[Term]:
        if BESIDE not in batch.signals:
            return self.main.terms(out, batch)      # rows that are measured, and stand beside nothing
        beside_S = batch.signals[BESIDE][: batch.sequences] > 0
        terms = self.main.terms(_of(out, ~beside_S), batch.part(~beside_S))
        if not self.weight:
            count_as_read(self.beside)      # said to be off: no setting of it was forgotten
        else:
            other = self.beside.terms(_of(out, beside_S), batch.part(beside_S))
            terms += [
                Term(f"beside/{term.name}", term.total, cast(Unit, f"beside/{term.unit}"), self.weight * term.coef)
                for term in other
            ]
        return terms

    def totals(self, out: Outputs, batch: Batch) -> Mapping[str, Tensor | float]:
        return {
            f"{number}/{name}": value for number, (part, chosen_S) in enumerate(self._of_whole_steps(batch))
            for name, value in part.totals(_of(out, chosen_S), batch.part(chosen_S)).items()
        }  # fmt: skip

    def with_totals(self, batch: Batch, totals: Mapping[str, float]) -> Batch:
        found: dict[str, Tensor] = {}
        for number, (part, chosen_S) in enumerate(self._of_whole_steps(batch)):
            mine = {name.removeprefix(f"{number}/"): value for name, value in totals.items() if
                    name.startswith(f"{number}/")}
            asked = batch.part(chosen_S)
            for name, value_S in part.with_totals(asked, mine).signals.items():
                if name not in asked.signals:
                    assert name.endswith("_S"), f"{name} is said of sequences"
                    into_S = found.setdefault(name, value_S.new_zeros(batch.sequences))
                    into_S[chosen_S] = value_S
        return batch.with_signals(found)

    def _of_whole_steps(self, batch: Batch) -> list[tuple[Objective, Tensor]]:
        """Those of the two whose sequences depend on each other, with the sequences."""
        beside_S = torch.zeros(batch.sequences, dtype=torch.bool, device=batch.tokens_BT.device)
        if BESIDE in batch.signals:
            beside_S = batch.signals[BESIDE][: batch.sequences] > 0
        both = ((self.main, ~beside_S), (self.beside, beside_S))
        return [(part, chosen_S) for part, chosen_S in both if part.whole_steps]

    def trains(self, rollout: Rollout) -> NDArray[np.bool_]:
        return self.main.trains(rollout)

    def advance(self, state: State, rollout: Rollout) -> State:
        return self.main.advance(state, rollout)

    def credit(self, rollout: Rollout, state: State = FRESH) -> list[NDArray[np.float64]]:
        return self.main.credit(rollout, state)

    def returns(self, rollout: Rollout, state: State = FRESH) -> list[NDArray[np.float64]] | None:
        return self.main.returns(rollout, state)


def _of(out: Outputs, chosen_S: Tensor) -> Outputs:
    """The outputs with these sequences' scores alone; what is said of tokens is weighed by the batch anyway."""
    more: dict[str, Any] = {} if out.score_S is None else {"score_S": out.score_S[chosen_S]}
    return replace(out, **more)
