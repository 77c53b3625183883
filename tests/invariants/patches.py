"""Changes to the program, by name: arrangements that no setting makes, which must change nothing, and seeded bugs."""

from __future__ import annotations

import random
from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import pad

from llmtrainer.core import vocab_head
from llmtrainer.core.batch import Batch
from llmtrainer.core.objective import count, loss_of
from llmtrainer.data import budget, budget_source, comparison_source, source
from llmtrainer.data.collate import collate
from llmtrainer.models import decoder, paths
from llmtrainer.parallel.engines.ddp import DdpEngine
from llmtrainer.parallel.engines.single import SingleEngine
from llmtrainer.training import recipe, rollout, run, trainer  # noqa: F401  what a run imports

SOURCES: tuple[Any, ...] = (
    source.DiskSource, budget_source.BudgetSource, comparison_source.ComparisonSource, rollout.RolloutSource,
)
COLUMNS = 5
"""Columns of padding that `wider` adds to every micro-batch."""


def wider() -> None:
    """Every micro-batch with columns of padding."""
    for kind in SOURCES:
        _wrap(kind, "batches", lambda batches: [_widened(batch) for batch in batches])


def _widened(batch: Batch) -> Batch:
    def more(value: Tensor, fill: int = 0) -> Tensor:
        return pad(value, (*(0, 0) * (value.dim() - 2), 0, COLUMNS), value=fill)

    signals = {
        name: more(value) if "_BT" in name else value for name, value in batch.signals.items()
    }
    return replace(
        batch, tokens_BT=more(batch.tokens_BT), targets_BT=more(batch.targets_BT), weights_BT=more(batch.weights_BT),
        position_BT=more(batch.position_BT), document_BT=more(batch.document_BT, -1),
        sequence_BT=more(batch.sequence_BT, -1), signals=signals,
        place_BT=None if batch.place_BT is None else more(batch.place_BT),
    )  # fmt: skip


def neighbours() -> None:
    """Rows share micro-batches with others than before, in another order."""
    places = source.DiskSource._places
    source.DiskSource._places = lambda self, *given, **named: places(self, *given, **named)[::-1]    # type: ignore
    for module in (budget_source, comparison_source, rollout):
        module.cut_step = _shuffled_cut    # type: ignore[attr-defined]


def _shuffled_cut(lengths: Any, most: int, ranks: int = 1, pair_cost: float = budget.PAIR_COST) -> Any:
    """The same number of micro-batches, filled by first fit in a shuffled order."""
    plain = budget.cut_step(lengths, most, ranks, pair_cost)
    bins: list[list[int]] = [[] for rank in plain for _ in rank]
    order = list(range(len(lengths)))
    random.Random(8).shuffle(order)
    order.sort(key=lambda place: -int(lengths[place]) // 32)      # long ones first, or they might not fit
    for place in order:
        fits = (held for held in reversed(bins) if sum(int(lengths[i]) for i in held) + int(lengths[place]) <= most)
        chosen = next(fits, None)
        if chosen is None:
            return plain
        chosen.append(place)
    made = iter([np.array(held, dtype=np.int64) for held in bins])
    return [[next(made) for _ in rank] for rank in plain]


def unpacked() -> None:
    """Conversations one a row, padded to the longest, instead of end to end."""
    budget_source.end_to_end = collate    # type: ignore[assignment]


def small_chunks() -> None:
    """The vocabulary's head in many chunks."""
    vocab_head._CHUNK_BYTES = 320 * 8 * 7
    vocab_head._SLICE_BYTES = 320 * 8 * 3
    vocab_head._SLICE_ROWS = 3


# Seeded bugs: each is invisible without the arrangement that shows it.


def mean_of_means() -> None:
    """Each micro-batch is divided by its own count, and their mean is taken."""
    own: list[Mapping[str, float]] = []
    terms_of = trainer.Trainer._terms

    def terms(self: Any, batch: Batch, *more: Any) -> Any:
        own[:] = [count([batch])]
        return terms_of(self, batch, *more)

    trainer.Trainer._terms = terms    # type: ignore[method-assign]
    trainer.loss_of = lambda terms, counts: loss_of(terms, own[0]) / counts["batches"]    # type: ignore


def overwritten_gradients() -> None:
    """Each backward pass begins with gradients of nothing."""
    backward = SingleEngine.backward

    def fresh(self: Any, loss: Tensor) -> None:
        for parameter in self._parameters:
            parameter.grad = None
        backward(self, loss)

    SingleEngine.backward = fresh    # type: ignore[method-assign]


def averaged_over_ranks() -> None:
    """Gradients are averaged over ranks, though the loss was divided by what all ranks have."""
    reduce = DdpEngine._reduce

    def averaged(self: Any, bucket: Any) -> Any:
        bucket.buffer().div_(self.world_size)
        return reduce(self, bucket)

    DdpEngine._reduce = averaged    # type: ignore[method-assign]


def around_the_wrapper() -> None:
    """The policy is called inside of DDP's wrapper, which then reduces nothing."""
    DdpEngine.forward = SingleEngine.forward    # type: ignore[method-assign]


def one_document() -> None:
    """Sequences of a row can see each other."""
    joined = budget_source.end_to_end
    budget_source.end_to_end = lambda rows: _as_one_document(joined(rows))    # type: ignore[assignment]


def _as_one_document(batch: Batch) -> Batch:
    one_BT = torch.zeros_like(batch.document_BT)
    return replace(batch, document_BT=one_BT, sequence_BT=one_BT)


def padding_counts() -> None:
    """A loss is divided by all places of a micro-batch."""

    def by_shape(batches: Any) -> dict[str, float]:
        batches = list(batches)
        return {**count(batches), "tokens": float(sum(batch.tokens_BT.numel() for batch in batches))}

    trainer.count = by_shape    # type: ignore[attr-defined]


def masks_by_row() -> None:
    """Dropout follows a row's place in its micro-batch."""

    def places(batch: Batch) -> tuple[Tensor, Tensor | None]:
        if batch.place_BT is None:
            return torch.arange(len(batch.place_B)), None
        return torch.zeros_like(batch.place_BT), torch.arange(batch.place_BT.numel())[None]

    Batch.places = property(places)    # type: ignore[assignment]


def running_positions() -> None:
    """Positions do not begin anew with every answer to a shared prompt."""
    made = comparison_source.collate_comparisons

    def running(*given: Any, **named: Any) -> Batch:
        batch = made(*given, **named)
        position_BT = torch.arange(batch.tokens_BT.shape[1], dtype=torch.int32)[None]
        return replace(batch, position_BT=position_BT)

    comparison_source.collate_comparisons = running    # type: ignore[attr-defined]


def last_chunk_lost() -> None:
    """The head forgets its last position where there are several chunks."""
    plain = vocab_head.log_probabilities

    def forgetful(hidden_ND: Tensor, weight_VD: Tensor, *given: Any, **named: Any) -> dict[str, Tensor]:
        found = plain(hidden_ND, weight_VD, *given, **named)
        if hidden_ND.shape[0] * weight_VD.shape[0] * hidden_ND.element_size() > vocab_head._CHUNK_BYTES:
            found = {name: torch.cat([value[:-1], value[-1:] * 0]) for name, value in found.items()}
        return found

    vocab_head.log_probabilities = forgetful


def other_masks_again() -> None:
    """Activations that are computed again are computed with another dropout mask."""
    plain, seen = decoder.dropout, set[Any]()

    def forgetful(x_BTD: Tensor, rate: float, key: int, place: Tensor, site: int, *more: Any) -> Tensor:
        call = key, site, tuple(place.flatten().tolist())
        again = call in seen
        seen.add(call)
        return plain(x_BTD, rate, key + again, place, site, *more)

    decoder.dropout = forgetful    # type: ignore[attr-defined]


def compiled_otherwise() -> None:
    """What is compiled is not quite what it was compiled from."""
    plain = torch.compile

    def otherwise(function: Any, **named: Any) -> Any:
        made = plain(function, **named)
        if function.__name__ != "_finish":
            return made
        return lambda *given: made(*given) * (1 + 1e-7)

    torch.compile = otherwise    # type: ignore[assignment]


def momentum_forgotten() -> None:
    """A run goes on without what its optimizer remembered."""
    load = SingleEngine.load_state

    def forgetful(self: Any, state: Mapping[str, Tensor]) -> None:
        load(self, {name: value * 0 if name.endswith("exp_avg") else value for name, value in state.items()})

    SingleEngine.load_state = forgetful    # type: ignore[method-assign]


def sees_itself_alone() -> None:
    """One of the ways to attend forgets a little."""
    plain = paths.PATHS["sdpa"]
    paths.PATHS["sdpa"] = lambda *given, **named: plain(*given, **named) * (1 + 1e-7)


def _wrap(kind: Any, name: str, then: Callable[[Any], Any]) -> None:
    plain = getattr(kind, name)
    setattr(kind, name, lambda self, *given: then(plain(self, *given)))


PATCHES: dict[str, Callable[[], None]] = {
    function.__name__: function
    for function in (
        wider, neighbours, unpacked, small_chunks, mean_of_means, overwritten_gradients, averaged_over_ranks,
        around_the_wrapper, one_document, padding_counts, masks_by_row, running_positions, last_chunk_lost,
        other_masks_again, compiled_otherwise, momentum_forgotten, sees_itself_alone,
    )
}
