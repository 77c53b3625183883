"""Continuous batching: a row that ends makes room at once, and the next prompt enters."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Protocol

import torch
from torch import Tensor

from llmtrainer.generation.blocks import Blocks
from llmtrainer.generation.loop import padded

READ_AT_ONCE = 4096
"""Tokens of prompts that are read in one pass, padding included, unless a single prompt is longer."""


class Reading(Protocol):
    """What this asks of a policy's memory: keys and values in blocks."""

    def copy(self, source: int, target: int) -> None: ...

    def read(
        self, tokens_BT: Tensor, lengths_B: Tensor, tables: Sequence[Sequence[int]], before: Sequence[int]
    ) -> Tensor:
        """Put the first `lengths_B` of each row's tokens behind the `before` tokens in the blocks of its table;
        logits [B, V] of what follows them."""
        ...


@dataclass
class Row:
    """One answer as it grows."""

    number: int
    """Its place among all answers asked for."""
    prompt: Sequence[int]
    room: int
    """Tokens that it may have at most."""
    tokens: list[int] = field(default_factory=list)
    table: list[int] = field(default_factory=list)
    """Blocks of what was read of it."""

    @property
    def length(self) -> int:
        """Tokens of prompt and answer so far."""
        return len(self.prompt) + len(self.tokens)


@dataclass
class _Waiting:
    """Rows that go on behind the same tokens: the answers to a prompt, or one that had to leave."""

    tokens: Sequence[int]
    rows: deque[Row]
    table: list[int] | None = None
    """Blocks of the tokens, once they are read; all but the last are shared with the rows."""
    logits_V: Tensor | None = None


@dataclass
class Traffic:
    """What happened, for benchmarks and tests."""

    prompts_read: int = 0
    tokens_read: int = 0
    """Of prompts; each group's once."""
    rounds: int = 0
    rows_read: int = 0
    """Tokens of answers that were read."""
    most_rows: int = 0
    most_blocks: int = 0
    put_back: int = 0
    """Rows that left for lack of room, to be read again later."""


Choose = Callable[[list[Row], Tensor], list[bool]]
"""(rows, logits [B, V] of what follows each) -> whether each goes on. Appends to the rows' tokens."""


class Batching:
    """Rows in and out of one memory of blocks. Which token is chosen is somebody else's business."""

    def __init__(self, memory: Reading, blocks: Blocks, max_rows: int) -> None:
        self.memory, self.blocks, self.max_rows = memory, blocks, max_rows
        self.waiting: deque[_Waiting] = deque()
        self.running: list[Row] = []
        """In the order in which they entered."""
        self.traffic = Traffic()
        self._logits: list[Tensor] = []
        """Parts of [B, V] that together belong to `running`."""

    def add(self, prompt: Sequence[int], rows: Sequence[Row]) -> None:
        """Rows that answer one prompt."""
        self.waiting.append(_Waiting(prompt, deque(rows)))

    def run(self, choose: Choose) -> None:
        """Until every row has ended."""
        while self.waiting or self.running:
            self._admit()
            self.traffic.rounds += 1
            self.traffic.most_rows = max(self.traffic.most_rows, len(self.running))
            self.traffic.most_blocks = max(self.traffic.most_blocks, self.blocks.count - self.blocks.free)
            goes_on = choose(self.running, torch.cat(self._logits) if len(self._logits) > 1 else self._logits[0])
            for row, on in zip(self.running, goes_on, strict=True):
                if not on:
                    self._leave(row)
            self.running = [row for row, on in zip(self.running, goes_on, strict=True) if on]
            self._make_room()
            self._logits = [self._read_last_tokens()] if self.running else []

    def _admit(self) -> None:
        """Let rows enter, the first asked for first, as far as there is room, and read their prompts together."""
        entering: list[tuple[_Waiting, Row]] = []
        unread: list[_Waiting] = []
        places = 0
        while places < len(self.waiting) and len(self.running) + len(entering) < self.max_rows:
            group = self.waiting[places]
            if not self.running and not entering and not self._fits(group, 0):
                self._forget_prompts()
            if not self._fits(group, len(self.running) + len(entering)):
                break
            if group.table is None:
                group.table = self.blocks.take(self.blocks.needed(len(group.tokens)))
                unread.append(group)
            row = group.rows.popleft()
            whole = len(group.tokens) // self.blocks.size
            if group.rows:
                row.table = self.blocks.share(group.table[:whole])
                row.table += self.blocks.take(len(group.table) - whole)
            else:
                row.table = list(group.table)    # the last one takes over what the group holds
                places += 1
            entering.append((group, row))
        self._read_groups(unread)
        for group, row in entering:
            assert group.table is not None and group.logits_V is not None
            if row.table and row.table[-1] != group.table[-1]:
                self.memory.copy(group.table[-1], row.table[-1])
            self.running.append(row)
            self._logits.append(group.logits_V[None])
        for _ in range(places):
            self.waiting.popleft()

    def _fits(self, group: _Waiting, running: int) -> bool:
        """Whether the next row of a group finds its blocks, and every running row one more beside."""
        size, last = self.blocks.size, len(group.rows) == 1
        prompt = self.blocks.needed(len(group.tokens)) if group.table is None else 0
        own = 0 if last else self.blocks.needed(len(group.tokens)) - len(group.tokens) // size
        return self.blocks.free >= prompt + own + running

    def _read_groups(self, groups: list[_Waiting]) -> None:
        """Prompts of about one length together: padding is computed in attention."""
        groups = sorted(groups, key=lambda group: len(group.tokens))
        while groups:
            longest, number = 0, 0
            for group in groups:
                longest = max(longest, len(group.tokens))
                if number and longest * (number + 1) > READ_AT_ONCE:
                    break
                number += 1
            part, groups = groups[:number], groups[number:]
            tokens_BT, lengths_B = padded([group.tokens for group in part], torch.device("cpu"))
            tables = [group.table or [] for group in part]
            logits_BV = self.memory.read(tokens_BT, lengths_B, tables, [0] * number)
            for group, logits_V in zip(part, logits_BV, strict=True):
                group.logits_V = logits_V
            self.traffic.prompts_read += number
            self.traffic.tokens_read += int(lengths_B.sum())

    def _make_room(self) -> None:
        """A block for the next token of every row; the rows that entered last leave if there are not enough."""
        while sum(self._needs_block(row) for row in self.running) > self.blocks.free:
            if len(self.running) == 1:
                self._forget_prompts()
                break
            row = self.running.pop()
            self._leave(row)
            self.waiting.appendleft(_Waiting([*row.prompt, *row.tokens], deque([row])))
            self.traffic.put_back += 1
        for row in self.running:
            if self._needs_block(row):
                row.table += self.blocks.take(1)

    def _needs_block(self, row: Row) -> bool:
        return self.blocks.needed(row.length) > len(row.table)

    def _forget_prompts(self) -> None:
        """What waiting rows share is read again when they enter."""
        for group in self.waiting:
            if group.table is not None:
                self.blocks.give_back(group.table)
                group.table = group.logits_V = None

    def _leave(self, row: Row) -> None:
        self.blocks.give_back(row.table)
        row.table = []

    def _read_last_tokens(self) -> Tensor:
        tokens_B1 = torch.tensor([row.tokens[-1:] for row in self.running])
        one_B = torch.ones(len(self.running), dtype=torch.int64)
        self.traffic.rows_read += len(self.running)
        before = [row.length - 1 for row in self.running]
        return self.memory.read(tokens_B1, one_B, [row.table for row in self.running], before)
