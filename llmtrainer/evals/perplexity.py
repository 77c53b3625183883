"""How well a policy predicts text it has not seen: nats per token, perplexity, bits per byte."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import NamedTuple

import torch
from pydantic import Field
from torch import Tensor

from llmtrainer.base.errors import UserError
from llmtrainer.core.at_rest import at_rest
from llmtrainer.core.batch import Batch
from llmtrainer.core.protocols import Policy, Tokenizer, opening
from llmtrainer.core.ranks import ALONE, Ranks, in_turns
from llmtrainer.core.suite import ContextPolicy, Read, Report, Suite

DOCUMENTS_AT_ONCE, CHARACTERS_AT_ONCE = 512, 4_000_000
"""How many documents are sorted by length together. Bounds memory, whatever the size of the data."""
SMALLEST_BATCH = 4096
"""Tokens of a micro-batch where nobody chose: enough to keep a processor busy, little for any memory."""


Text = str | Sequence[int]
"""A document, or the ids of one that was tokenised before."""


class Perplexity(Suite):
    """Mean surprise per predicted token over whole documents.

    A document is read whole up to the window, beyond it through windows that overlap by half, so that every
    token past the first window is predicted from at least half a window of text. The first token of a
    document has nothing before it and is not predicted; no id is added but those the tokenizer itself adds.
    """

    path: str | None = None
    """What to read: a file, a folder, a glob, or `stdlib:held_out`."""

    max_length: int | None = Field(default=None, ge=2)
    """Tokens of a window. Without one: the model's own context, which is also the upper limit."""

    tokens_per_batch: int | None = Field(default=None, ge=1)
    """Tokens of one forward pass, padding included: the memory knob. It changes no figure beyond rounding.
    Without one: 4,096, or one window if that is longer."""

    def run(
        self, policy: ContextPolicy, tokenizer: Tokenizer, read: Read, report: Report | None = None,
        ranks: Ranks = ALONE,
    ) -> dict[str, float]:  # fmt: skip
        """loss [nats per predicted token], perplexity, bits_per_byte, tokens, bytes, documents. UserError if
        no token can be predicted."""
        if self.path is None:
            raise UserError(
                f"`{self.title}` has nothing to read", fix="give it a `path`: a file or a folder of text"
            )
        total = Totals()
        for score in self.scores(policy, tokenizer, read(self.path), report, ranks):
            total.add(score)
        total.nats = ranks.sum({"nats": total.nats})["nats"]     # every rank has counted all tokens
        return total.figures(self.path)

    def scores(
        self, policy: ContextPolicy, tokenizer: Tokenizer, texts: Iterable[Text], report: Report | None = None,
        ranks: Ranks = ALONE,
    ) -> Iterator[Score]:  # fmt: skip
        """One Score per document, in the order of `texts`. Memory does not grow with their number. Every rank reads its
        share of the micro-batches that one process would read: the nats of the others' are 0 in its Scores."""
        window, budget = self._window(policy), self._budget(policy)
        begin = opening(tokenizer)
        for group in _groups(texts):
            written = [item if isinstance(item, str) else tokenizer.decode(item, skip_control=True) for item in group]
            encoded = iter(tokenizer.encode_batch([item for item in group if isinstance(item, str)]))
            ids = [begin + next(encoded) if isinstance(item, str) else item for item in group]
            yield from _score_group(policy, ids, written, window, budget, report, ranks)

    def _window(self, policy: ContextPolicy) -> int:
        context = policy.context_length
        if self.max_length is not None and self.max_length > context:
            raise UserError(
                f"max_length={self.max_length:,} is more than the model's context of {context:,} tokens",
                why="positions it was never trained on would spoil the figure",
                fix=f"max_length={context}, or leave it out",
            )
        return self.max_length or context

    def _budget(self, policy: ContextPolicy) -> int:
        window = self._window(policy)
        if self.tokens_per_batch is None:
            return max(SMALLEST_BATCH, window)
        if self.tokens_per_batch < window:
            raise UserError(
                f"tokens_per_batch={self.tokens_per_batch:,} does not hold one window of {window:,} tokens",
                why="a shorter window is another measurement, so it is never chosen silently",
                fix=f"tokens_per_batch={window}, or max_length={self.tokens_per_batch}",
            )
        return self.tokens_per_batch


@dataclass(frozen=True)
class Score:
    """What predicting one document cost."""

    ids: tuple[int, ...]
    """The document as the policy read it; ids[0] is not predicted."""
    nats: tuple[float, ...]
    """Surprise at ids[1], ids[2], ...: minus the logarithm of the probability each was given."""
    bytes: int
    """Length of the document's text in UTF-8."""

    @property
    def tokens(self) -> int:
        """Predicted tokens."""
        return len(self.nats)

    @property
    def total(self) -> float:
        """Nats of the whole document."""
        return math.fsum(self.nats)


class Totals:
    """Sums over documents, turned into figures once: never a mean of means."""

    def __init__(self) -> None:
        self.nats = 0.0
        self.tokens = self.documents = self.bytes = 0

    def add(self, score: Score) -> None:
        self.nats += score.total
        self.tokens += score.tokens
        self.bytes += score.bytes
        self.documents += 1

    def figures(self, origin: str) -> dict[str, float]:
        """The figures by name. UserError, naming `origin`, if no token was predicted."""
        if not self.tokens:
            raise UserError(
                "there is no token to predict", where=f"{origin}: {self.documents:,} documents",
                why="a document needs two tokens: the first has nothing before it",
                fix="name data with text in it",
            )
        return figures(self.nats, self.tokens, self.bytes) | {"documents": self.documents}


def figures(nats: float, tokens: int, bytes: int) -> dict[str, float]:
    """loss = nats / tokens; perplexity = exp(loss); bits_per_byte = nats / (log 2 * bytes)."""
    loss = nats / tokens
    # Above a loss of 709 the exponential leaves float64: infinite is the honest answer, OverflowError is not.
    perplexity = math.exp(loss) if loss < 709.0 else math.inf
    bits_per_byte = nats / math.log(2.0) / bytes if bytes else math.nan
    means = {"loss": loss, "perplexity": perplexity, "bits_per_byte": bits_per_byte}
    return {**means, "tokens": tokens, "bytes": bytes}


class Window(NamedTuple):
    """Positions start..stop of document `document` are read; the targets from `first` on count."""

    document: int
    start: int
    stop: int
    first: int


def windows(document: int, positions: int, length: int) -> list[Window]:
    """Windows of at most `length` positions, one every half length, in which each position counts once.

    A document of n ids has n - 1 positions: position i reads ids[i] and predicts ids[i + 1]. The stride is
    the smaller half, so that at least half a window of text stands before what counts.
    """
    found: list[Window] = []
    counted = start = 0
    while counted < positions:
        stop = min(start + length, positions)
        found.append(Window(document, start, stop, counted))
        counted, start = stop, start + length // 2
    return found


def _groups(texts: Iterable[Text]) -> Iterator[list[Text]]:
    group: list[Text] = []
    characters = 0
    for text in texts:
        group.append(text)
        characters += len(text)
        if len(group) == DOCUMENTS_AT_ONCE or characters >= CHARACTERS_AT_ONCE:
            yield group
            group, characters = [], 0
    if group:
        yield group


def _score_group(
    policy: ContextPolicy,
    ids: Sequence[Sequence[int]],
    texts: Sequence[str],
    window: int,
    budget: int,
    report: Report | None,
    ranks: Ranks,
) -> Iterator[Score]:
    nats = [[0.0] * max(len(document) - 1, 0) for document in ids]
    bytes_of = [len(text.encode()) for text in texts]
    rows = [row for index, document in enumerate(ids) for row in windows(index, len(document) - 1, window)]
    device = next(policy.module.parameters()).device
    with _measuring(policy):
        for batch, own in in_turns(_by_length(rows, budget), ranks):
            values = policy(_batch(batch, ids).to(device), ("logp",)).logp_BT
            assert values is not None
            if not own:
                continue
            for row, logp_T in zip(batch, values.double().cpu(), strict=True):
                counted_N = logp_T[row.first - row.start : row.stop - row.start]
                nats[row.document][row.first : row.stop] = (-counted_N).tolist()
                if report is not None:
                    # A row's part of its document, rounded so that the parts add up to the whole.
                    size, positions = bytes_of[row.document], len(nats[row.document])
                    report(size * row.stop // positions - size * row.first // positions)
    if report is not None:
        report(sum(size for size, values in zip(bytes_of, nats, strict=True) if not values))
    for document, surprise, size in zip(ids, nats, bytes_of, strict=True):
        yield Score(tuple(document), tuple(surprise), size)


@contextmanager
def _measuring(policy: Policy) -> Iterator[None]:
    """Dropout off and no graph; afterwards the mode is what it was."""
    # Not inference_mode: what a module caches on the way, such as rotary tables, would be an inference tensor ever
    # after, and the next training step could not save it for its backward pass.
    with at_rest(policy.module), torch.no_grad():
        yield


def _by_length(rows: list[Window], budget: int) -> Iterator[list[Window]]:
    """Rows of like length together, the longest first, so that padding is little and memory peaks at once."""
    batch: list[Window] = []
    for row in sorted(rows, key=lambda row: row.start - row.stop):
        if batch and (len(batch) + 1) * (batch[0].stop - batch[0].start) > budget:
            yield batch
            batch = []
        batch.append(row)
    if batch:
        yield batch


def _batch(rows: list[Window], ids: Sequence[Sequence[int]]) -> Batch:
    B, T = len(rows), max(row.stop - row.start for row in rows)
    tokens_BT, targets_BT = torch.zeros(B, T, dtype=torch.int64), torch.zeros(B, T, dtype=torch.int64)
    weights_BT = torch.zeros(B, T)
    document_BT = torch.full((B, T), -1, dtype=torch.int32)
    for b, row in enumerate(rows):
        length = row.stop - row.start
        piece = torch.tensor(ids[row.document][row.start : row.stop + 1], dtype=torch.int64)
        tokens_BT[b, :length], targets_BT[b, :length] = piece[:-1], piece[1:]
        weights_BT[b, row.first - row.start : length] = 1.0
        document_BT[b, :length] = 0
    return Batch(
        tokens_BT=tokens_BT, targets_BT=targets_BT, weights_BT=weights_BT, document_BT=document_BT,
        position_BT=_positions(document_BT), sequence_BT=_sequences(document_BT), place_B=torch.arange(B),
    )


def _positions(document_BT: Tensor) -> Tensor:
    position_T = torch.arange(document_BT.shape[1], dtype=torch.int32)
    return torch.where(document_BT >= 0, position_T, torch.zeros_like(position_T))


def _sequences(document_BT: Tensor) -> Tensor:
    row_B1 = torch.arange(document_BT.shape[0], dtype=torch.int32)[:, None]
    return torch.where(document_BT >= 0, row_B1, torch.full_like(row_B1, -1))
