"""Tables as text: a header line with the names of the columns, then one document a row."""

from __future__ import annotations

import csv
from collections.abc import Iterator
from typing import Any, BinaryIO, ClassVar

from llmtrainer.base.errors import UserError
from llmtrainer.data.document import AnyPath, Reader, Reading, text_in

LONGEST = 2**30
"""Characters of one field, and bytes of one line."""


class Csv(Reader):
    """`.csv` has commas between its fields, `.tsv` tabs. A field with a comma, a tab, a newline or a quote in it
    stands in double quotes, and a quote in it is written twice."""

    suffixes: ClassVar[tuple[str, ...]] = (".csv", ".tsv")

    def records(self, stream: BinaryIO, path: AnyPath, reading: Reading) -> Iterator[tuple[Any, int | None]]:
        lines = _Lines(stream, path, reading)
        tabs = any(suffix.lower() == ".tsv" for suffix in path.suffixes[-2:])
        csv.field_size_limit(LONGEST)    # of the whole process: its own default of 128 KiB is less than a document
        rows = csv.reader(lines, delimiter="\t" if tabs else ",", strict=True)
        names: list[str] | None = None
        begins = 1
        while True:
            try:
                row = next(rows, None)
            except csv.Error as error:
                why = str(error)
                if lines.ended:
                    reading.broken_off("the last row breaks off", f"{path}, line {begins:,}", why)
                    return
                raise _no_row(why, path, begins) from error
            if row is None:
                return
            if names is None and row:
                names = _header(row, path, begins)
            elif row and names is not None:    # a blank line is none
                if len(row) != len(names):
                    why = f"it has {len(row):,} fields, the header {len(names):,}"
                    if lines.cut:
                        reading.broken_off("the last row breaks off", f"{path}, line {begins:,}", why)
                        return
                    raise _no_row(why, path, begins)
                yield dict(zip(names, row, strict=True)), begins
            begins = lines.number + 1


class _Lines:
    """Lines of text that know their number; a line in the middle of a quoted field counts too."""

    def __init__(self, stream: BinaryIO, path: AnyPath, reading: Reading) -> None:
        self._stream, self._path, self._reading = stream, path, reading
        self.number = self._byte = 0
        self.ended = self.cut = False
        """Whether the file was read to its end, and whether its last line had none."""

    def __iter__(self) -> _Lines:
        return self

    def __next__(self) -> str:
        line = self._stream.readline(LONGEST + 1)
        if not line:
            self.ended = True
            raise StopIteration
        self.number += 1
        if len(line) > LONGEST:
            raise _no_row(f"a line is longer than {LONGEST // 2**20:,} MiB", self._path, self.number)
        self.cut = not line.endswith((b"\n", b"\r"))
        text = text_in(line, self._reading, self._path, byte=self._byte, line=self.number)
        self._byte += len(line)
        return text.removeprefix("\ufeff") if self.number == 1 else text


def _header(row: list[str], path: AnyPath, line: int) -> list[str]:
    twice = next((name for name in row if row.count(name) > 1), None)
    if twice is not None:
        raise UserError(
            f"two columns are called `{twice}`", where=f"{path}, line {line:,}",
            why="the first line holds the names of the columns", fix="give each column a name of its own",
        )
    return row


def _no_row(why: str, path: AnyPath, line: int) -> UserError:
    return UserError(
        "a row does not fit its table", where=f"{path}, line {line:,}", why=why,
        fix='mend or delete the row (a field with a comma, newline or quote stands in "..."); nothing is left out '
        "silently",
    )
