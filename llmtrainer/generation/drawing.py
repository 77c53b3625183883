"""The next token of rows that are at different places, and what training has to know of each draw."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from llmtrainer.generation.continuous import Row
from llmtrainer.generation.loop import Finish, Vocabulary, text_stream
from llmtrainer.generation.sampler import Kept, Sampled
from llmtrainer.generation.sampling import Sampling, distribution, draw, greedy, possible, require_ids, uniform


class Drawing:
    """Chooses tokens, decides which rows have ended, and keeps the record."""

    def __init__(
        self, sampling: Sampling, tokenizer: Vocabulary, rows: Sequence[Row], seed: int,
        numbers: Sequence[int],
    ) -> None:  # fmt: skip
        """numbers: what draws are a function of, for each row."""
        self.sampling, self.tokenizer, self.seed, self.numbers = sampling, tokenizer, seed, numbers
        self.ends = sorted({tokenizer.end, *sampling.stop_ids})
        self.texts = [text_stream(sampling, tokenizer, row.prompt) for row in rows] if sampling.stop else []
        self.finish: list[Finish | None] = [None] * len(rows)
        self.logp: list[list[float]] = [[] for _ in rows]
        self.kept: list[list[Kept | None]] = [[] for _ in rows]
        self.never: NDArray[np.int64] | None = None
        """Ids that no token is drawn from; None: no logits have come yet."""
        self._early: Kept | None = None
        """What a token is drawn from before the least length."""

    def choose(self, rows: list[Row], logits_BV: Tensor) -> list[bool]:
        """See continuous.Choose."""
        sampling = self.sampling
        if self.never is None:
            self._look_at(logits_BV.shape[1])
        early = [place for place, row in enumerate(rows) if len(row.tokens) < sampling.min_new_tokens]
        if early and self._early is not None:
            logits_BV = logits_BV.clone()
            logits_BV[torch.tensor(early)[:, None], torch.from_numpy(self._early.ids).long()] = -torch.inf
        logits_BV = possible(logits_BV, sampling, self.tokenizer.vocabulary)
        kept = [self._early if place in early else None for place in range(len(rows))]
        if sampling.temperature == 0.0:
            token_B = greedy(logits_BV)
            logp_B = logits_BV.log_softmax(dim=1).gather(1, token_B[:, None])[:, 0]
        else:
            probability_BV = distribution(logits_BV, sampling)
            token_B = draw(probability_BV, self._uniform(rows))
            logp_B = probability_BV.gather(1, token_B[:, None])[:, 0].log()
            if sampling.truncates:
                kept = _kept(probability_BV)
        return [
            self._note(row, token, logp, one)
            for row, token, logp, one in zip(rows, token_B.tolist(), logp_B.tolist(), kept, strict=True)
        ]

    def sampled(self, row: Row, version: str) -> Sampled:
        """A row that has ended."""
        finish, kept = self.finish[row.number], self.kept[row.number]
        assert finish is not None and self.never is not None
        logp = np.array(self.logp[row.number], dtype=np.float64)
        whole = any(one is not None for one in kept)
        return Sampled(
            tuple(row.tokens), finish, logp, logp, self.sampling.temperature, self.never,
            tuple(kept) if whole else None, version,
        )  # fmt: skip

    def _note(self, row: Row, token: int, logp: float, kept: Kept | None) -> bool:
        row.tokens.append(token)
        self.logp[row.number].append(logp)
        self.kept[row.number].append(kept)
        self.finish[row.number] = finish = self._finish(row, token)
        return finish is None

    def _finish(self, row: Row, token: int) -> Finish | None:
        if token == self.tokenizer.end:
            return "end"
        if self.texts:
            self.texts[row.number].feed(token)
        if token in self.sampling.stop_ids or (self.texts and self.texts[row.number].stopped):
            return "stop"
        return "length" if len(row.tokens) >= row.room else None

    def _uniform(self, rows: Sequence[Row]) -> Tensor:
        numbers = [uniform(self.seed, self.numbers[row.number], row.length) for row in rows]
        return torch.tensor(numbers, dtype=torch.float64)

    def _look_at(self, V: int) -> None:
        """What the head's width decides, at the first logits."""
        require_ids(self.sampling.stop_ids, V, "stop_ids")
        require_ids(self.sampling.suppress, V, "suppress")
        never = {*self.sampling.suppress, *range(self.tokenizer.vocabulary, V)}
        self.never = np.array(sorted(never), dtype=np.int64)
        ends = [number for number in self.ends if number < V]
        self._early = Kept(np.array(ends, dtype=np.int32), left_out=True) if ends else None


def _kept(probability_BV: Tensor) -> list[Kept | None]:
    """The ids of each row that a draw could have given."""
    return [_fewer(row_V) for row_V in (probability_BV > 0).cpu().numpy()]


def _fewer(kept_V: NDArray[np.bool_]) -> Kept | None:
    inside = int(kept_V.sum())
    if inside == len(kept_V):
        return None
    left_out = inside > len(kept_V) // 2
    return Kept(np.flatnonzero(kept_V != left_out).astype(np.int32), left_out)
