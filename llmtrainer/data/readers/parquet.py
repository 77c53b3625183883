"""Parquet tables, a few rows at a time and only the columns that hold the text."""

from __future__ import annotations

from collections.abc import Iterator
from typing import BinaryIO, ClassVar

from llmtrainer.base.errors import UserError
from llmtrainer.data.document import AnyPath, Reader, Reading

ROWS = 64
"""Rows decoded at a time."""
_BUFFER = 2**18


class Parquet(Reader):
    """One row is one document."""

    suffixes: ClassVar[tuple[str, ...]] = (".parquet",)
    seeks: ClassVar[bool] = True

    def records(self, stream: BinaryIO, path: AnyPath, reading: Reading) -> Iterator[tuple[object, int | None]]:
        import pyarrow
        from pyarrow.parquet import ParquetFile

        try:
            # A buffer and no read-ahead: a column chunk is read page by page, not whole.
            table = ParquetFile(stream, buffer_size=_BUFFER, pre_buffer=False)
            names = table.schema_arrow.names
            fields = list(reading.chosen(names))
            if not fields:
                reading.content_of(dict.fromkeys(names), str(path))
            for batch in table.iter_batches(ROWS, columns=fields, use_threads=False):
                for record in batch.to_pylist():
                    yield record, None
        except (pyarrow.ArrowInvalid, pyarrow.ArrowNotImplementedError, OSError) as error:
            raise UserError(
                "the table cannot be read", where=str(path), why=str(error).splitlines()[0],
                fix="fetch the file again; is it really parquet?",
            ) from error
