"""What a checkpoint of a run holds, taken as one instant and written in the background."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import asdict
from pathlib import Path
from typing import Any

from safetensors.torch import save_file
from torch import Tensor

from llmtrainer.base.rundir import RunDir
from llmtrainer.base.units import Progress
from llmtrainer.core.pieces import is_piece, whole
from llmtrainer.core.protocols import Engine, Tokenizer
from llmtrainer.models.stored import Form, WholeModel
from llmtrainer.models.weights import MODEL
from llmtrainer.tokenizer.chat import Chat
from llmtrainer.training import checkpoint
from llmtrainer.training.average import FOLDER, MovingAverage
from llmtrainer.training.chats import GENERATION_FILE, generation_config
from llmtrainer.training.recipe import Save

OPTIMIZER, ROLLOUTS = "optimizer", "rollout"
"""Files of a checkpoint beside the model: `optimizer.safetensors`, or one of each process (see core/pieces.py)."""
State = Callable[[], Mapping[str, Tensor]]
"""Gives tensors as they are now."""


class Saver:
    """Takes the state of a run at one step and hands it to the writer; then keeps newest and best."""

    def __init__(
        self, run: RunDir, save: Save, recipe_yaml: str, tokenizer: Tokenizer,
        facts: Mapping[str, Any], form: Form, engine: Engine, parent: str | None, scores: Mapping[int, float],
        average: MovingAverage | None = None, chat: Chat | None = None, more: Mapping[str, State] | None = None,
        readable: Callable[[], AbstractContextManager[None]] = nullcontext,
    ) -> None:  # fmt: skip
        self._run = run
        self._recipe_yaml = recipe_yaml
        self._tokenizer = tokenizer if chat is None else chat.tokenizer
        self._facts = facts
        self._form = form
        self._engine = engine
        self._readable = readable
        """Around reading the weights."""
        self._parent = parent
        self._scores = dict(scores)
        self._average = average
        self._more = dict(more or {})
        """What else a run goes on from, by the name of its file."""
        self._generation = None if chat is None else generation_config(chat)
        """What a model of conversations says about where its answers stop."""
        self._keep = (save.keep_newest, save.keep_best, save.by)  # read here: S41 asks before the first save
        self._writer = checkpoint.Writer(save.background)

    @property
    def bytes_each(self) -> int:
        """Bytes of one checkpoint: weights, twice as much for the optimizer's moments, once more for an average."""
        weights = sum(tensor.numel() * tensor.element_size() for tensor in self._form.tensors().values())
        return (3 if self._average is None else 4) * weights

    def require_space(self) -> None:
        newest, best, _ = self._keep
        checkpoint.require_space(self._run, self.bytes_each, newest + best)

    def tidy(self) -> None:
        """Keep the newest and the best. Also what a crash between a checkpoint and this left undone."""
        newest, best, _ = self._keep
        self._run.retain(newest, self._scores, best)

    def save(self, progress: Progress, figures: Mapping[str, float]) -> None:
        """Take the state now; write it while training goes on."""
        self._writer.wait()  # two snapshots at once would double the memory
        score = self._score(figures)
        if score is not None:
            self._scores[progress.step] = score
        facts = {
            "step": progress.step,
            "tokens": progress.tokens,
            "progress": asdict(progress),
            "figures": dict(figures),
            "scores": {str(step): value for step, value in self._best().items()},
            "parent": self._parent,
            "time": time.time(),
            **self._facts,
        }
        folder = self._run.checkpoint(progress.step)
        self._parent = folder.name
        held = self._engine.state()     # every rank asks: some of it may lie with one of them alone
        writes = not self._engine.rank or self._engine.writers is not None
        with self._readable():
            weights = {".": self._weights()} if writes else {}
        if not writes:
            return      # every rank holds the same, and rank 0 writes it
        state = {OPTIMIZER: self._copied(held)}
        if self._engine.rank == 0:
            state |= {name: _frozen(take()) for name, take in self._more.items()}
        if self._average is not None:
            with self._average.in_place():
                weights[FOLDER] = self._weights()
        self._writer.submit(lambda: self._write(folder, weights, state, facts))

    def wait(self) -> None:
        self._writer.wait()

    @property
    def failed(self) -> bool:
        """Whether something went wrong in the background, which `wait` raises."""
        return self._writer.failed

    def _weights(self) -> dict[str, Tensor]:
        """Copies of the weights: of this process's pieces, where a folder takes pieces; else whole, for rank 0."""
        named = self._form.tensors()
        if self._in_pieces(named):
            return self._copied(named)
        whole_ones = {name: whole(value) for name, value in named.items()}
        return _frozen(whole_ones) if self._engine.rank == 0 else {}

    def _copied(self, named: Mapping[str, Tensor]) -> dict[str, Tensor]:
        writers = self._engine.writers
        return _frozen(named) if writers is None else writers.frozen(named)

    def _in_pieces(self, named: Mapping[str, Tensor]) -> bool:
        return isinstance(self._form, WholeModel) and any(map(is_piece, named.values()))

    def _write(
        self, folder: Path, weights: Mapping[str, dict[str, Tensor]], state: Mapping[str, dict[str, Tensor]],
        facts: dict[str, Any],
    ) -> None:  # fmt: skip
        """`weights` by the folder below the checkpoint that becomes a model: its own, and that of the average. `state`
        by what its file is called."""
        writers = self._engine.writers

        def fill(partial: Path) -> None:
            if writers is not None:
                # First what all processes do together: one that fails alone before it would keep the others waiting.
                for below, named in weights.items():
                    if self._in_pieces(named):
                        writers.write(named, partial / below, MODEL)
                writers.write(state[OPTIMIZER], partial, OPTIMIZER)
            if self._engine.rank == 0:
                self._fill_alone(partial, weights, state if writers is None else _without(state, OPTIMIZER))

        checkpoint.write(folder, fill, facts, writers)
        if self._engine.rank == 0:
            self.tidy()

    def _fill_alone(
        self, partial: Path, weights: Mapping[str, dict[str, Tensor]], state: Mapping[str, dict[str, Tensor]]
    ) -> None:
        for below, named in weights.items():
            if self._in_pieces(named):
                assert isinstance(self._form, WholeModel)
                self._form.describe(partial / below)
            else:
                self._form.write(named, partial / below)
            self._tokenizer.save(partial / below)
            if self._generation is not None:
                (partial / below / GENERATION_FILE).write_text(self._generation, encoding="utf-8")
        for name, tensors in state.items():
            save_file(tensors, partial / f"{name}.safetensors", {"format": "pt"})
        (partial / "recipe.yaml").write_text(self._recipe_yaml, encoding="utf-8")

    def _score(self, figures: Mapping[str, float]) -> float | None:
        by = self._keep[2] or next((name for name in figures if name.endswith("loss")), None)
        return None if by is None else figures.get(by)

    def _best(self) -> dict[int, float]:
        best = sorted(self._scores.items(), key=lambda item: (item[1], item[0]))
        return dict(best[: self._keep[1]])


def _without(state: Mapping[str, dict[str, Tensor]], stem: str) -> dict[str, dict[str, Tensor]]:
    return {name: tensors for name, tensors in state.items() if name != stem}


def _frozen(named: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Copies on the CPU: what is written is one instant, whatever the next step does."""
    return {name: tensor.detach().to("cpu", copy=True).contiguous() for name, tensor in named.items()}
