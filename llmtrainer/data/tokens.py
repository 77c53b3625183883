"""Text that is tokenised already: ids from a file, cut into documents and checked against the vocabulary."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
from numpy.typing import NDArray

from llmtrainer.base.errors import UserError

if TYPE_CHECKING:
    from llmtrainer.core.protocols import Tokenizer

LONGEST = 2**28
"""Ids of one document: a file without a border is refused before it has filled the memory."""


@dataclass(frozen=True, slots=True)
class Ids:
    """Token ids as a file holds them, 1-D."""

    ids: NDArray[Any]
    border: Literal["document", "stream"] = "document"
    """Whether this is one document, or the next stretch of a file in which control ids mark where each one ends."""
    rule: str = "a record is a document"
    """How a document is known to be one."""


@dataclass(frozen=True)
class Vocabulary:
    """What a tokenizer says about ids, so that foreign ones can be checked and cut."""

    size: int
    end: int
    control: frozenset[int]

    @classmethod
    def of(cls, tokenizer: Tokenizer) -> Vocabulary:
        return cls(tokenizer.vocabulary, tokenizer.end, frozenset(tokenizer.control.values()))

    def checked(self, ids: NDArray[Any], where: str, before: int = 0) -> NDArray[np.int64]:
        """The ids, all of which the vocabulary has; UserError names the first that it has not, counted from 1
        behind the `before` ids that were checked already."""
        if ids.dtype.kind not in "iu":
            raise UserError(
                f"token ids of type {ids.dtype}", where=where, why="an id is a whole number",
                fix="save them as whole numbers, for example: numpy.save(FILE, ids.astype('uint16'))",
            )
        # Compared as they are: a large unsigned id would turn negative on its way to int64.
        wrong = (ids >= self.size) | (ids < 0)
        if wrong.any():
            place = int(wrong.argmax())
            raise UserError(
                f"id {int(ids[place]):,} is not in the vocabulary", where=f"{where}, token {before + place + 1:,}",
                why=f"the tokenizer has the ids 0 to {self.size - 1:,}: these were made with another one",
                fix="give the tokenizer that the file was made with: tokenizer=FOLDER",
            )
        return ids.astype(np.int64)

    def opened(self, ids: NDArray[np.int64]) -> NDArray[np.int64]:
        """A document without the end id that closes it, if one does: as a tokenizer gives the ids of a text."""
        return ids[:-1] if len(ids) and ids[-1] == self.end else ids


class Cutter:
    """Cuts a stream of ids into documents, by the rule that its first id gives away.

    begins with a control id other than the end   a document begins with each of them
    begins with the end id                        it stands before each document; it is put behind instead
    else                                          the end id closes each document; without one, all is one document
    """

    def __init__(self, vocabulary: Vocabulary) -> None:
        self._vocabulary = vocabulary
        self.rule = "one document a file"

    def cut(self, stretches: Iterable[NDArray[np.int64]], where: str) -> Iterator[NDArray[np.int64]]:
        """Documents in order. Together they hold every id of the stream, but for a leading end id."""
        mark: int | None = None
        before = False
        held: list[NDArray[np.int64]] = []
        count = 0
        for ids in stretches:
            if mark is None and len(ids):
                mark, before = self._mark(int(ids[0]))
                ids = ids[1:] if mark == self._vocabulary.end and before else ids
            cuts = np.flatnonzero(ids == mark) + (0 if before and mark != self._vocabulary.end else 1)
            start = 0
            for stop in cuts.tolist():
                if held or stop > start:
                    self._found(mark, before)
                    yield np.concatenate([*held, ids[start:stop]])
                held, count, start = [], 0, stop
            if start < len(ids):
                held.append(ids[start:])
                count += len(ids) - start
            if count > LONGEST:
                raise UserError(
                    f"a document has no end within {LONGEST:,} ids", where=where,
                    why=f"the end id of this tokenizer is {self._vocabulary.end:,}",
                    fix="one document a file, or its end id behind each; is it the right tokenizer?",
                )
        if held:
            yield np.concatenate(held)

    def _mark(self, first: int) -> tuple[int, bool]:
        """(the id that marks a border, whether it stands before a document)."""
        if first in self._vocabulary.control:
            return first, True
        return self._vocabulary.end, False

    def _found(self, mark: int | None, before: bool) -> None:
        behind = ", which is put behind it" if before and mark == self._vocabulary.end else ""
        self.rule = f"a document {'begins' if before else 'ends'} with id {mark:,}{behind}"


def columns_of(array: NDArray[Any], *, alone: bool) -> Iterator[Ids]:
    """An array as a file's ids: 1-D is a stream (one document unless `alone`), each row of 2-D a document."""
    assert array.ndim in (1, 2)
    if array.ndim == 2:
        yield from (Ids(row, rule="a row is a document") for row in array)
    else:
        yield Ids(array, "stream" if alone else "document")
