"""The loop: every objective, every engine, one order: step, event, evaluate, save, stop."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import closing
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from llmtrainer.base.errors import UserError
from llmtrainer.base.units import Progress
from llmtrainer.core.batch import Batch
from llmtrainer.core.objective import Term, count, loss_of
from llmtrainer.core.protocols import Annotator, annotated
from llmtrainer.core.randomness import derive
from llmtrainer.core.ranks import of_first
from llmtrainer.training.checkpoint import unwritten_elsewhere
from llmtrainer.training.ledger import Ledger, require_start
from llmtrainer.training.no_targets import TOLD, require_answers
from llmtrainer.training.nonfinite import culprit, too_late
from llmtrainer.training.parts import Clock, Parts, StepInfo
from llmtrainer.training.spread import Spread
from llmtrainer.training.whole_steps import knowing_each_other

MOST_SKIPS_IN_A_ROW = 10


class Trainer:
    """Drives Parts. `steps()` is the whole extension interface: a loop in the user's own hands."""

    def __init__(self, parts: Parts, progress: Progress, figures: dict[str, float] | None = None) -> None:
        self.parts = parts
        self.progress = progress
        self.figures = figures or {}
        """The last evaluation."""
        self._evaluated_at = -1
        self.last: StepInfo | None = None
        self._saved_at = progress.step if progress.step else -1
        self._skips = self._empty = 0
        self._spread = Spread()

    @property
    def finished(self) -> bool:
        return self.parts.duration.reached(self.progress)

    def steps(self) -> Iterator[StepInfo]:
        """Steps until the duration is reached or a stop is requested; the last step is evaluated and saved."""
        while not self.finished and not self._stopping():
            before = self.progress
            self.last = info = self._first_step() if self.last is None else self.step()
            self._record(before, info)
            stopping = self._stopping()
            if self.finished or (not stopping and self.parts.evaluate_every.due(before, self.progress)):
                self.evaluate()
            if self.finished or stopping or self.parts.save_every.due(before, self.progress):
                self.save()
            yield info
        self.save()
        self.parts.saver.wait()
        at = {"step": self.progress.step, "tokens": self.progress.tokens}
        if self.finished:
            self.tell("end", **at)
        else:
            self.tell("stop", **at, reason=self.parts.stop.requested)

    def step(self) -> StepInfo:
        """One optimizer step over this rank's micro-batches."""
        parts, clock = self.parts, Clock(self.parts.beat, self.progress.step + 1)
        key = derive(parts.seed, "step", self.progress.step)
        torch.manual_seed(derive(key, "rank", parts.engine.rank))  # for foreign modules; ours are counter-based
        batches = parts.source.batches(self.progress.step)
        counts = parts.engine.sum({**count(batches), "input": sum(batch.input_tokens for batch in batches)})
        if counts["tokens"] == 0:   # of the whole step, before its first forward
            return self._without_targets(counts, clock)
        self._empty = 0
        if parts.before is not None:
            batches = parts.before(self.progress.step, batches)
        annotators = parts.annotators
        if parts.objective.whole_steps:
            batches = [replace(batch, dropout_key=key) for batch in batches]
            batches, annotators = knowing_each_other(parts.engine, parts.objective, batches, annotators), ()
        after = self._after(int(counts["input"]))
        rate = parts.schedule.rate_of_update(self.progress, after, parts.schedule_length)
        parts.engine.begin(rate)
        clock.lap("data", then="forward")
        wide = torch.float32 if parts.engine.device.type == "mps" else torch.float64    # MPS has no float64
        sums: dict[str, Tensor] = {}
        coefs: dict[str, float] = {}
        for index, batch in enumerate(batches):
            with parts.engine.micro(last=index == len(batches) - 1):
                terms = self._terms(replace(batch.to(parts.engine.device), dropout_key=key), annotators)
                clock.lap("forward", then="backward")
                parts.engine.backward(loss_of(terms, counts))
                clock.lap("backward", then="forward" if index < len(batches) - 1 else "optimizer")
            for term in terms:
                share = term.total.detach().to(wide) / (counts[term.unit] or 1.0)
                sums[term.name] = sums[term.name] + share if term.name in sums else share
                coefs[term.name] = term.coef
        own = {name: float(value) for name, value in sums.items()}
        metrics = parts.engine.sum(own) | dict(parts.told()) | dict(parts.engine.told())
        grad_norm = float(parts.engine.clip(parts.clip))  # the step's only wait for the device
        loss = sum(coefs[name] * value for name, value in metrics.items() if coefs.get(name))
        own_finite = all(math.isfinite(value) for name, value in own.items() if coefs[name])
        skipped = not self._update(
            loss, grad_norm, rate, own_finite, lambda: self._own_gradients(batches, key, counts, annotators)
        )  # fmt: skip
        if parts.average is not None:
            parts.average.update(after.step)
        clock.lap("optimizer")
        minutes = after.minutes + of_first(parts.engine, clock.total / 60)      # one clock for all ranks
        self.progress = replace(after, minutes=minutes)
        seconds = {**clock.laps, "total": clock.total}
        return StepInfo(self.progress, loss, metrics, rate, grad_norm, int(counts["input"]), seconds, skipped)

    def close(self) -> None:
        """Wait for the last checkpoint and let go of threads and devices."""
        with closing(self.parts.source):
            self.parts.saver.wait()
        self.parts.engine.close()

    def evaluate(self) -> dict[str, float]:
        """Every evaluation of the recipe, written as one event."""
        self.parts.beat("evaluate", self.progress.step)
        self.figures = self.parts.evaluate(self.progress)
        self._evaluated_at = self.progress.step
        if self.figures:
            self.tell("evaluate", step=self.progress.step, **self.figures)
        return self.figures

    def save(self) -> None:
        """A checkpoint of this very step, written in the background. Saving the same step again does nothing."""
        if self._saved_at != self.progress.step and self.progress.step:
            self.parts.beat("save", self.progress.step)
            fresh = self._evaluated_at == self.progress.step
            self.parts.saver.save(self.progress, self.figures if fresh else {})
            self._saved_at = self.progress.step
            self.tell("save", step=self.progress.step)

    def _stopping(self) -> bool:
        """Whether any rank was asked to stop: asked together, so that all ranks end behind the same step. Raises what
        went wrong with a checkpoint in the background."""
        stop, engine, saver = self.parts.stop, self.parts.engine, self.parts.saver
        told = engine.sum({"stop": float(stop.requested is not None), "unsaved": float(saver.failed)})
        if told["unsaved"]:      # a full disk ends the run now, not hours later, and on all ranks
            saver.wait()
            raise unwritten_elsewhere()
        asked = bool(told["stop"])
        if asked:
            stop.request("another process of this job was asked")
        return asked    # and not what a signal may have changed on this rank since

    def _first_step(self) -> StepInfo:
        ledger = Ledger(self.parts.policy)
        begins = self.progress.step == 0
        info = self.step()
        if begins and not info.skipped:
            require_start(info.metrics, self.parts.starts_at)
        if not info.skipped:
            ledger.settle(info.learning_rate, lambda text: self.tell("warning", text=text))
        self.parts.first_step()
        return info

    def _terms(self, batch: Batch, annotators: Sequence[Annotator]) -> list[Term]:
        batch = annotated(batch, annotators)
        out = self.parts.engine.forward(batch, self.parts.objective.wants)
        if self.parts.keep is not None:
            self._spread.add(self.parts.objective.spread(out, batch))
        return [*self.parts.objective.terms(out, batch), *out.aux]

    def _own_gradients(
        self, batches: Sequence[Batch], key: int, counts: Mapping[str, float], annotators: Sequence[Annotator]
    ) -> None:
        """The gradients of a step once more, without those of other ranks: to find out whose are bad."""
        engine, spread = self.parts.engine, self._spread
        engine.discard()
        self._spread = Spread()
        for batch in batches:
            with engine.micro(last=False):
                terms = self._terms(replace(batch.to(engine.device), dropout_key=key), annotators)
                engine.backward(loss_of(terms, counts))
        self._spread = spread

    def _after(self, tokens: int) -> Progress:
        step = self.progress.step + 1
        tokens += self.progress.tokens
        return replace(self.progress, step=step, tokens=tokens, epochs=self.parts.source.epochs(step))

    def _update(self, loss: float, grad_norm: float, rate: float, own_finite: bool, apart: Callable[[], None]) -> bool:
        """Change the weights, unless the gradient is not finite: then nothing is ever trained on it."""
        if math.isfinite(loss) and (math.isfinite(grad_norm) or self.parts.engine.rescales):
            updated = self.parts.engine.step(rate)  # False: fp16 overflow, the scale was halved
            if not updated:
                self.tell("warning", step=self.progress.step + 1, text="fp16 overflow: step skipped, scale halved")
            self._skips = 0 if updated else self._skips
            return updated
        what = f"loss {loss} and gradient norm {grad_norm} at step {self.progress.step + 1}"
        if self.parts.engine.updates_in_backward:
            raise too_late(what)
        rank, parameter = culprit(self.parts.engine, self.parts.policy, own_finite, apart)
        self.parts.engine.discard()
        self._skips += 1
        if self.parts.on_nonfinite == "stop" or self._skips > MOST_SKIPS_IN_A_ROW:
            raise UserError(
                f"{what}: not a number",
                where=f"rank {rank}, first bad parameter: {parameter}",
                why="an update with it would ruin the model; the weights are those of the step before",
                fix="lower optim.schedule.peak, or optim.on_nonfinite=skip to leave such steps out",
            )
        where = f"rank {rank}, first bad parameter: {parameter}"
        self.tell("warning", step=self.progress.step + 1, text=f"{what}: skipped; {where}")
        return False

    def _without_targets(self, counts: Mapping[str, float], clock: Clock) -> StepInfo:
        """A step whose every weight is 0: of a rollout it is told and passed over, of other rows it is an error."""
        self._empty += 1
        require_answers(self.progress.step + 1, self._empty, self.parts.writes_answers)
        self.tell("warning", step=self.progress.step + 1, text=TOLD)
        after = self._after(int(counts["input"]))
        rate = self.parts.schedule.rate_of_update(self.progress, after, self.parts.schedule_length)
        if self.parts.average is not None:
            self.parts.average.update(after.step)
        clock.lap("data")
        minutes = after.minutes + of_first(self.parts.engine, clock.total / 60)
        self.progress = replace(after, minutes=minutes)
        seconds = {**clock.laps, "total": clock.total}
        told = dict(self.parts.told())
        return StepInfo(self.progress, 0.0, told, rate, 0.0, int(counts["input"]), seconds, skipped=True)

    def _record(self, before: Progress, info: StepInfo) -> None:
        if self.parts.keep is not None and (found := self._spread.taken(self.parts.engine)):
            self.parts.keep(info.progress, found)
        event = info.event(self.parts.flops_per_token, self.parts.peak_flops)
        if self.finished or self.parts.log_every.due(before, self.progress):
            self.parts.log.append("step", **event)
        self.parts.view({"kind": "step", **event})

    def tell(self, kind: str, **values: Any) -> None:
        """Write an event, and show it to whoever watches."""
        self.parts.log.append(kind, **values)
        self.parts.view({"kind": kind, **values})
