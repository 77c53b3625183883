"""A trained reward model put to use: scores of many texts, packed without padding, and of answers to prompts."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray

from llmtrainer.base.errors import UserError
from llmtrainer.core.at_rest import at_rest
from llmtrainer.core.example import Example, Message
from llmtrainer.core.protocols import opening
from llmtrainer.core.rollout import Answer
from llmtrainer.data.collate import Row, end_to_end
from llmtrainer.models.stored import Policy
from llmtrainer.tokenizer.chat import Chat
from llmtrainer.training.models import Opened, Precision, open_model

Ids = Sequence[int]
TOKENS_PER_BATCH = 8192
"""Tokens of one forward pass where nobody chose."""


@torch.no_grad()
def scores_of(
    policy: Policy, rows: Sequence[Ids], tokens_per_batch: int = TOKENS_PER_BATCH,
    report: Callable[[int], None] | None = None,
) -> NDArray[np.float64]:
    """The score of each row of tokens, read behind its last one: [R]. Equal rows are read once.

    What a row scores does not depend on the order of the rows, not in one bit: they are put in an order of their own
    before they are packed. `report` hears how many rows are done. UserError for a row without tokens or beyond the
    model's context.
    """
    require_scores(policy)
    distinct = sorted({tuple(int(token) for token in row) for row in rows}, key=lambda row: (-len(row), row))
    _require_rows(policy, distinct)
    device = next(policy.parameters()).device
    found: dict[tuple[int, ...], float] = {}
    with at_rest(policy):
        for group in _packed(distinct, tokens_per_batch):
            batch = end_to_end([_read_whole(row, place) for place, row in enumerate(group)])
            score_S = policy(batch.to(device), ("score",)).score_S
            assert score_S is not None
            found |= dict(zip(group, score_S.double().cpu().tolist(), strict=True))
            if report is not None:
                report(len(group))
    return np.array([found[tuple(int(token) for token in row)] for row in rows], dtype=np.float64)


def _read_whole(row: Ids, place: int) -> Row:
    """A row of which every token is read: what follows the last counts for nothing."""
    tokens = np.array([*row, 0], dtype=np.int64)
    return Row(tokens, np.zeros(len(tokens), dtype=np.int32), place, np.zeros(len(tokens), dtype=np.float32))


def _packed(rows: Sequence[tuple[int, ...]], budget: int) -> list[list[tuple[int, ...]]]:
    """Neighbours together, as many as the budget holds; a longer row alone."""
    groups: list[list[tuple[int, ...]]] = []
    held = 0
    for row in rows:
        if not groups or held + len(row) > budget:
            groups.append([])
            held = 0
        groups[-1].append(row)
        held += len(row)
    return groups


def _require_rows(policy: Policy, rows: Sequence[Ids]) -> None:
    for row in rows:
        if not 0 < len(row) <= policy.context_length:
            raise UserError(
                f"a text of {len(row):,} tokens cannot be scored",
                why="there is nothing to read" if not row
                else f"the reward model reads {policy.context_length:,} tokens at most",
                fix="leave it out" if not row else "leave it out, or shorten it",
            )  # fmt: skip


def require_scores(policy: Policy, where: str | None = None) -> None:
    """UserError where a model gives no scores."""
    if policy.score is None:
        raise UserError(
            "this model gives no score", where=where, why="it has a head for the vocabulary and no other",
            fix="name a reward model: train one with objective.kind=reward and model.head.kind=score",
        )


@dataclass(frozen=True)
class Judge:
    """A reward model with its tokenizer and template: answers to prompts become the rows that it was trained on."""

    opened: Opened
    chat: Chat | None
    """What conversations become; None: prompt and answer as they stand."""
    tokens_per_batch: int = TOKENS_PER_BATCH

    def __call__(self, answers: Sequence[Answer]) -> list[float]:
        """What each answer is worth. UserError for an answer to a prompt of tokens, whose text nobody knows."""
        return self.scores([self.row(answer) for answer in answers]).tolist()

    def scores(self, rows: Sequence[Ids]) -> NDArray[np.float64]:
        """As `scores_of`."""
        return scores_of(self.opened.policy, rows, self.tokens_per_batch)

    def row(self, answer: Answer) -> tuple[int, ...]:
        """Prompt and answer as tokens of the reward model. An answer that broke off has no token that ends it."""
        if not answer.prompt:
            raise UserError(
                "a prompt of tokens cannot be shown to a reward model", where=str(self.opened.folder),
                why="its tokens are those of another model, and its text is not known", fix="prompts as text",
            )
        tokenizer, ended = self.opened.tokenizer, answer.finish != "length"
        if self.chat is not None and ended:
            return self.chat.row(Example((*answer.prompt, Message("assistant", answer.text)))).tokens
        if self.chat is not None:
            prompt = self.chat.prompt(answer.prompt)
        else:
            prompt = opening(tokenizer) + tokenizer.encode("".join(message.content for message in answer.prompt))
        end = [tokenizer.end] if ended else []
        return (*prompt, *tokenizer.encode_continuation(answer.text), *end)


def open_judge(
    path: str | Path, *, template: str | None = "auto", precision: Precision = "auto", device: str = "auto",
    tokens_per_batch: int = TOKENS_PER_BATCH,
) -> Judge:
    """The reward model of a run directory, a checkpoint, a Hugging Face or PEFT folder, or a hub id, with dropout off.

    template: as of Chat; None: texts stand as they are. UserError where the model gives no score.
    """
    opened = open_model(path, precision, device)
    require_scores(opened.policy, str(opened.folder))
    return Judge(opened, None if template is None else Chat(opened.tokenizer, template), tokens_per_batch)
